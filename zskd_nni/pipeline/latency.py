"""The latency of one image in onnxruntime."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch import Tensor

from zskd_nni.models.onnx_session import onnx_session

_WARM_UP = 10


def median_latencies(
    models: dict[str, Path], image: Tensor, rounds: int = 200, seconds: float = 4.0
) -> dict[str, float]:
    """Median milliseconds of one image on one CPU thread, by name.

    The models take turns, so that other work on the machine slows all of them alike.

    Args:
        models: ``.onnx`` files with an input ``images``.
        image: ``(1, C, H, W)`` in the value range.
        rounds: turns of each model.
        seconds: no turn begins after this time, but each model has at least three.
    """
    # With one thread onnxruntime works on the caller's, and may leave it flushing denormal numbers or not. In a thread
    # of its own it does not change what this process computes.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_measure, models, image, rounds, seconds).result()


def _measure(models: dict[str, Path], image: Tensor, rounds: int, seconds: float) -> dict[str, float]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    sessions = {name: onnx_session(path, options) for name, path in models.items()}
    feed = {"images": image.numpy().astype(np.float32)}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(_WARM_UP):
        for session in sessions.values():
            session.run(["logits"], feed)
    end = time.monotonic() + seconds
    for turn in range(rounds):
        if turn >= 3 and time.monotonic() > end:
            break
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(["logits"], feed)
            times[name].append(time.perf_counter() - started)
    return {name: round(1000 * statistics.median(taken), 4) for name, taken in times.items()}
