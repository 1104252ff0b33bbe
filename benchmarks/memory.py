"""Peak memory with 100,000 impressions and with 1,000, and the cost of reading them: ``results/bench-memory.json``.

    python benchmarks/memory.py                       # a few minutes on one core
    python benchmarks/memory.py --sizes 500 5000      # smaller; no file is written

Each side is a separate process. It makes its store, or trains a LeNet-5-Half on it for as many steps as an epoch of the
large store has. Its largest physical memory is measured (``ru_maxrss``). This includes the interpreter, PyTorch and
mapped pages of files, but not the system's file cache. Images take few steps here, because memory does not depend on
their number.

The second ratio is that of the CPU time of training steps with images on disk and in memory, one of each in turn.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zskd_nni.data.augmentation import Augmentation
from zskd_nni.data.lazy_images import LazyImages
from zskd_nni.data.sources import StoredSource, TransferSource
from zskd_nni.methods.zskd import ZskdSettings, ZskdTargets
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.models.zoo import lenet5, lenet5_half
from zskd_nni.runtime.files import write_json
from zskd_nni.runtime.provenance import provenance
from zskd_nni.synthesis import ImpressionStore, SynthesisSettings, synthesize
from zskd_nni.training.distillation import DistillationSettings, distill

RESULTS = Path(__file__).resolve().parent.parent / "results" / "bench-memory.json"
BATCH = 128
MOST, LEAST = 1.1, 0.97


def teacher() -> Teacher:
    """A LeNet-5 with random weights: memory does not depend on them."""
    torch.manual_seed(0)
    return Teacher(lenet5(), InputSpec((1, 32, 32)))


def make(size: int, folder: Path) -> None:
    """A store of ``size`` impressions of one step."""
    own = teacher()
    settings = SynthesisSettings(max_steps=1)
    synthesize(own, ZskdTargets(own, ZskdSettings()), settings, size=size, seed=0, folder=folder, quiet=True)


def source_of(images: Tensor | LazyImages) -> StoredSource:
    """Batches of a store's images."""
    return StoredSource(images, BATCH, 0, "store")


def train_student(source: TransferSource, steps: int) -> None:
    """Train a student on the images of a store."""
    torch.manual_seed(1)
    settings = DistillationSettings(steps=steps, batch=BATCH, augmentation=Augmentation())
    distill(lenet5_half(), teacher(), source, settings, quiet=True)


def peak(*arguments: object) -> float:
    """Peak memory of a separate process, in MiB."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def child(what: str, size: int, steps: int, folder: Path) -> None:
    """One side of a memory ratio: does the work and prints its peak memory."""
    if what == "synthesis":
        make(size, folder)
    else:
        train_student(source_of(ImpressionStore.open(folder).lazy_images()), steps)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


class InTurn:
    """Batches from two sources in turn, and the CPU time from the start of one step to the start of the next."""

    def __init__(self, *sides: StoredSource) -> None:
        self.sides = sides
        self.seconds: tuple[list[float], list[float]] = ([], [])
        self.size, self.batch_size, self.fingerprint = sides[0].size, sides[0].batch_size, "in turn"
        self._started: float | None = None

    def batch(self, step: int, random: torch.Generator, student: nn.Module | None = None) -> Tensor:
        """The next batch, from the source whose turn it is."""
        now = time.process_time()
        if self._started is not None:
            self.seconds[(step - 1) % 2].append(now - self._started)
        self._started = now
        return self.sides[step % 2].batch(step, random, student)

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing."""


def measure(sizes: tuple[int, int], timed: int, folder: Path) -> list[dict[str, Any]]:
    """The records."""
    steps = sizes[1] // BATCH
    peaks = {
        what: [peak(what, size, steps, folder / str(size)) for size in sizes] for what in ("synthesis", "distillation")
    }
    records = [
        {
            "name": f"peak memory of {what}, {sizes[1]:,} impressions against {sizes[0]:,}",
            "unit": "MiB",
            "ratio": round(large / small, 3),
            "target": MOST,
            "at_most": True,
            "ours": round(large, 1),
            "theirs": round(small, 1),
        }
        for what, (small, large) in peaks.items()
    ]
    store = ImpressionStore.open(folder / str(sizes[1]))
    turns = InTurn(source_of(store.lazy_images()), source_of(store.images()))
    train_student(turns, 2 * timed)
    disk, memory = (statistics.median(seconds[10:]) for seconds in turns.seconds)
    records.append(
        {
            "name": f"student training (LeNet-5-Half, batch {BATCH}), images on disk against in memory",
            "unit": "steps a CPU second",
            "ratio": round(memory / disk, 3),
            "target": LEAST,
            "ours": round(1 / disk, 1),
            "theirs": round(1 / memory, 1),
            "pairs": timed,
        }
    )
    source = provenance("cpu", 0)
    return [{**record, "device": "cpu", "provenance": source} for record in records]


def main() -> None:
    """Parse the arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs=2, type=int, default=[1000, 100_000])
    parser.add_argument("--timed", type=int, default=400, help="steps of each side of the second ratio")
    parser.add_argument("--out", type=Path, help=f"default for the default sizes: {RESULTS.name}")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        what, size, steps, folder = arguments.child
        child(what, int(size), int(steps), Path(folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        records = measure(tuple(arguments.sizes), arguments.timed, Path(folder))
    for record in records:
        print(f"{record['name']}: {record['ratio']:g}x; {record['ours']:g} and {record['theirs']:g} {record['unit']}")
    out = arguments.out or (RESULTS if arguments.sizes == [1000, 100_000] else None)
    if out is not None:
        write_json(out, records)


if __name__ == "__main__":
    main()
