"""Our own rows: a packaged recipe's images and quantization, and the same on noise and on real images."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from rivals.pairs import Pair, teacher_of
from zskd_nni.compression.quantization.quantize import quantize, simulated
from zskd_nni.data.sources import NoiseSource, TransferSource
from zskd_nni.methods.registry import transfer_source
from zskd_nni.recipes.compression_config import CompressionRun, QuantizationConfig
from zskd_nni.recipes.load import load_recipe
from zskd_nni.runtime.files import make_folder, write_json

RUNS = Path("runs") / "rivals"
# The packaged recipes of 4-bit weights have the options, the others have not: each row says for itself.
PLAIN = {"ranges": "extremes", "rounding": "nearest", "correct_biases": False}
OPTIONS = {"ranges": "least_error", "rounding": "joint", "correct_biases": True}
Made = tuple[nn.Module, float]  # with the seconds that its images took, if they were made before


def impressions(pair: Pair, task: str, seed: int) -> Made:
    """Our recipe, with NNI's own ranges and rounding."""
    return _quantized(pair, task, seed, *_impressions(pair, task, seed))


def impressions_with_options(pair: Pair, task: str, seed: int) -> Made:
    """Our recipe, with the options that the rivals' ideas have become."""
    return _quantized(pair, task, seed, *_impressions(pair, task, seed), options=OPTIONS)


def noise(pair: Pair, task: str, seed: int) -> Made:
    """NNI's quantizer, calibrated on uniform noise."""
    return _quantized(pair, task, seed, NoiseSource(teacher_of(pair).spec, 128))


def real_images(pair: Pair, task: str, seed: int) -> Made:
    """The row of our recipe, on as many real training images."""
    return _quantized(pair, task, seed, _real(pair, task, seed))


def real_images_with_options(pair: Pair, task: str, seed: int) -> Made:
    """The same with the options."""
    return _quantized(pair, task, seed, _real(pair, task, seed), options=OPTIONS)


def _real(pair: Pair, task: str, seed: int) -> TransferSource:
    size = load_recipe(*pair.quantized[task]).recipe.transfer.size
    return transfer_source(teacher_of(pair), RUNS / "real", size, method="real", seed=seed, data=pair.data)


def _impressions(pair: Pair, task: str, seed: int) -> tuple[TransferSource, float]:
    """The recipe's impressions, which all bits share, and the seconds that they took when they were made."""
    folder = make_folder(RUNS / f"{pair.teacher}-seed{seed}")
    loaded, told, started = load_recipe(*pair.quantized[task], seed), folder / "seconds.json", time.perf_counter()
    source = loaded.transfer_source(teacher_of(pair), folder / "impressions")
    if not told.exists():
        write_json(told, time.perf_counter() - started)
        return source, 0.0
    return source, json.loads(told.read_text()) - (time.perf_counter() - started)


def _quantized(
    pair: Pair,
    task: str,
    seed: int,
    images: TransferSource,
    seconds: float = 0.0,
    options: Mapping[str, Any] = PLAIN,
) -> Made:
    teacher, run = teacher_of(pair), CompressionRun(seed=seed, quiet=True)
    config = config_with(pair, task, options)
    return simulated(quantize(teacher.student(), config, teacher, images, run=run)), seconds


def config_with(pair: Pair, task: str, options: Mapping[str, Any]) -> QuantizationConfig:
    """The recipe's section on quantization, with ``PLAIN`` or ``OPTIONS``."""
    config = load_recipe(*pair.quantized[task]).recipe.compression.quantization
    assert config is not None
    return replace(config, **options)
