"""Synthesis and distillation over and over under a memory limit: flat memory and file handles, a steady rate.

    python tests/faults/soak.py [seconds]

A cycle makes a store, teaches a student on it, plays ZSKT and compresses under NNI. Its cost is measured in seconds
of CPU, which depend little on what else the machine does.
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

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from subjects import SUBJECTS  # noqa: E402

LIMIT = 3 << 30  # bytes of private memory
MOST_GROWTH = 0.05  # of resident memory, from the first quarter to the end
STEADY = 1.25  # CPU seconds of a cycle at the end beside those at the beginning
CYCLE = ("synthesis", "student", "zskt", "fused", "arbitrary set")


def resident() -> int:
    """Bytes of resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def soak(seconds: float, tell: Callable[[str], None] = print) -> dict[str, float]:
    """Cycles for so many seconds.

    Raises:
        AssertionError: memory or file handles grow, or the rate falls.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    end, told = time.monotonic() + seconds, time.monotonic()
    memory: list[int] = []
    files: list[int] = []
    costs: list[float] = []
    while time.monotonic() < end or len(costs) < 8:
        folder = Path(tempfile.mkdtemp(prefix="soak-"))
        started = time.process_time()
        try:
            for name in CYCLE:
                place = folder / name.replace(" ", "-")
                place.mkdir()
                SUBJECTS[name].run(place)
        finally:
            shutil.rmtree(folder)
        costs.append(time.process_time() - started)
        gc.collect()
        memory.append(resident())
        files.append(handles())
        if time.monotonic() - told > 60:
            told = time.monotonic()
            tell(
                f"{len(costs)} cycles, {memory[-1] / 2**20:.0f} MiB, {files[-1]} handles, {costs[-1]:.2f} s of CPU each"
            )
    quarter = max(2, len(costs) // 4)
    growth = statistics.median(memory[-quarter:]) / statistics.median(memory[quarter : 2 * quarter]) - 1
    pace = statistics.median(costs[-quarter:]) / statistics.median(costs[quarter : 2 * quarter])
    result = {
        "cycles": len(costs),
        "resident_mib": round(memory[-1] / 2**20, 1),
        "growth": round(growth, 4),
        "handles_before": files[1],
        "handles_after": files[-1],
        "pace": round(pace, 3),
    }
    tell(json.dumps(result))
    assert growth < MOST_GROWTH, f"memory grows: {result}"
    assert files[-1] <= files[1], f"file handles grow: {result}"
    assert pace < STEADY, f"it becomes slower: {result}"
    return result


if __name__ == "__main__":
    soak(float(sys.argv[1]) if len(sys.argv) > 1 else 1200.0)
