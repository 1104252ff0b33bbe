"""Synthesis and distillation over and over under a memory limit: flat memory and file handles, a steady rate.

    python tests/faults/soak.py [seconds]

A cycle makes a store, teaches a student on it, plays ZSKT and compresses under NNI. What it costs is measured twice:
in calls of functions, the same on any machine, which grow where hooks, handlers or lists pile up; and in yardsticks,
its seconds of CPU over those of a fixed computation just before and after it, because a busy neighbour on the same
core makes every second of CPU worth less. Seconds still tell little of a few cycles, so they are judged over many.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from subjects import SUBJECTS  # noqa: E402

LIMIT = 3 << 30  # bytes of private memory
MOST_GROWTH = 0.05  # of resident memory, from the first quarter to the end
STEADY = 1.25  # cost of the cheapest of the last cycles beside the cheapest of the first
MANY = 40  # cycles from which seconds are judged
MOST_MORE_CALLS = 0.002  # of functions, from the second cycle to the last; thirty in a million were seen
CYCLE = ("synthesis", "student", "zskt", "fused", "arbitrary set")


def resident() -> int:
    """Bytes of resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def yardstick() -> float:
    """Seconds of CPU of a fixed computation: a convolution and its gradient, the least of five."""
    images = torch.ones(32, 16, 24, 24, requires_grad=True)
    weight = torch.ones(16, 16, 3, 3)
    seconds = []
    for _ in range(5):
        started = time.process_time()
        torch.nn.functional.conv2d(images, weight).sum().backward()
        seconds.append(time.process_time() - started)
    return min(seconds)


def cycle() -> None:
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        for name in CYCLE:
            place = folder / name.replace(" ", "-")
            place.mkdir()
            SUBJECTS[name].run(place)
    finally:
        shutil.rmtree(folder)


def calls_of(work: Callable[[], None]) -> int:
    """Functions, of Python and of C, that the work calls in this thread."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def soak(seconds: float, tell: Callable[[str], None] = print) -> dict[str, float]:
    """Cycles for so many seconds.

    Raises:
        AssertionError: memory or file handles grow, or the rate falls.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    cycle()  # builds what later ones reuse
    first_calls = calls_of(cycle)
    end, told = time.monotonic() + seconds, time.monotonic()
    memory: list[int] = []
    files: list[int] = []
    costs: list[float] = []
    while time.monotonic() < end or len(costs) < 6:
        before = yardstick()
        started = time.process_time()
        cycle()
        spent = time.process_time() - started
        costs.append(2.0 * spent / (before + yardstick()))
        gc.collect()
        memory.append(resident())
        files.append(handles())
        if time.monotonic() - told > 60:
            told = time.monotonic()
            tell(f"{len(costs)} cycles, {memory[-1] / 2**20:.0f} MiB, {files[-1]} handles, {spent:.2f} s of CPU each")
    quarter = max(3, len(costs) // 4)
    early, late = slice(0, quarter), slice(-quarter, None)
    growth = statistics.median(memory[late]) / statistics.median(memory[early]) - 1
    pace = min(costs[late]) / min(costs[early])
    more_calls = calls_of(cycle) / first_calls - 1
    result = {
        "cycles": len(costs),
        "resident_mib": round(memory[-1] / 2**20, 1),
        "growth": round(growth, 4),
        "handles_before": files[0],
        "handles_after": files[-1],
        "calls": first_calls,
        "more_calls": round(more_calls, 5),
        "pace": round(pace, 3),
    }
    tell(json.dumps(result))
    assert growth < MOST_GROWTH, f"memory grows: {result}"
    assert files[-1] <= files[0], f"file handles grow: {result}"
    assert abs(more_calls) < MOST_MORE_CALLS, f"a cycle calls more functions, or fewer, than it did: {result}"
    assert len(costs) < MANY or pace < STEADY, f"it becomes slower: {result}"
    return result


if __name__ == "__main__":
    soak(float(sys.argv[1]) if len(sys.argv) > 1 else 1200.0)
