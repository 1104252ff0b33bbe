"""What a user waits for: ``results/bench-costs.json``, for a quiet machine.

    python benchmarks/costs.py

Each figure is the median over fresh processes, after one that is not counted. The limits are those that the project
wants to keep; ``docs/benchmarks.md`` shows both. The start of Python itself is taken off where the row says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from zskd_nni.runtime.files import write_json
from zskd_nni.runtime.provenance import provenance

RESULTS = Path(__file__).resolve().parent.parent / "results" / "bench-costs.json"
_LEAVES = """
import time, torch
from zskd_nni.data.dead_leaves import dead_leaves
from zskd_nni.models.input_spec import InputSpec
torch.set_num_threads(1)
make = lambda: dead_leaves(1000, InputSpec((3, 32, 32)), torch.Generator().manual_seed(0))
make()
started = time.perf_counter()
print(sum(len(make()) for _ in range(5)) / (time.perf_counter() - started))
"""


def seconds(*arguments: str, runs: int = 7) -> float:
    """The median time of a Python process."""
    taken = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def demo() -> float:
    """The demo as ``make demo`` runs it, once everything is installed."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, "-m", "zskd_nni", "demo", "--out", f"{folder}/demo"]
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - started


def rate(code: str) -> float:
    """What a process prints."""
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def measured() -> list[dict[str, Any]]:
    """All rows: what, measured, limit, unit."""
    bare = seconds("-c", "pass")
    return [
        {"what": "`import zskd_nni`, above Python's own start", "value": seconds("-c", "import zskd_nni") - bare,
         "most": 0.1, "unit": "s"},
        {"what": "`zskd-nni --help`", "value": seconds("-m", "zskd_nni", "--help"), "most": 0.5, "unit": "s"},
        {"what": "`zskd-nni demo`, after the installation", "value": demo(), "most": 45, "unit": "s"},
        {"what": "procedural images of 3x32x32 (dead leaves), one core", "value": rate(_LEAVES), "least": 2000,
         "unit": "images a second"},
    ]  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    machine = {**provenance("cpu", 0), "cores": os.cpu_count()}
    rows = [{**row, "value": float(f"{row['value']:.3g}")} for row in measured()]
    write_json(given.out, [{**row, "command": "python benchmarks/costs.py", "provenance": machine} for row in rows])
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
