"""What a larger task costs, a seeded ResNet-18 of 1,000 classes at 3x224x224: ``results/bench-larger-task.json``.

    python benchmarks/larger_task.py                # some ten minutes on two cores
    python benchmarks/larger_task.py --only leaves calibration

Each stage is a separate process that does a little of its work, and then some more. The difference gives the seconds of
a unit (an image, a step); what is asked for is calculated from it. Peak memory is that of the process, which does not
grow with the number of units: images are written to disk as they are made.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision

from zskd_nni import DistillationSettings, InputSpec, QuantizationConfig, Teacher, distill, quantize, transfer_source
from zskd_nni.data.dead_leaves import dead_leaves
from zskd_nni.data.sources import StoredSource
from zskd_nni.runtime.files import write_json
from zskd_nni.runtime.provenance import provenance

RESULTS = Path(__file__).resolve().parent.parent / "results" / "bench-larger-task.json"
SPEC = InputSpec((3, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
BATCH = 32
INT8 = {"op_types": ["Conv2d", "Linear"], "target_names": ["_input_", "weight"], "quant_dtype": "int8"}


@dataclass(frozen=True)
class Stage:
    """A stage of the task.

    Attributes:
        work: does so many units of it.
        sizes: units that are measured, a few and more.
        asked: units of the task.
        unit: name of a unit.
    """

    work: Callable[[int], object]
    sizes: tuple[int, int]
    asked: int
    unit: str


def teacher() -> Teacher:
    """A ResNet-18 with random weights: time and memory do not depend on them."""
    torch.manual_seed(0)
    return Teacher(torchvision.models.resnet18(), SPEC)


def leaves(count: int) -> torch.Tensor:
    """Procedural images that fill the frame."""
    return dead_leaves(count, SPEC, torch.Generator().manual_seed(0))


def impressions(count: int) -> None:
    """Impressions of 16 steps with the default recipe for colour and BatchNorm, a batch at a time."""
    with tempfile.TemporaryDirectory() as folder:
        transfer_source(teacher(), folder, size=count, synthesis={"slots": min(BATCH, count)}, quiet=True)


def calibration(count: int) -> None:
    """Ranges of all inputs of convolutions and of the classifier, for 8 bits, from procedural images."""
    own = teacher()
    images = StoredSource(leaves(count), BATCH, 0, "leaves")
    quantize(own.student(), QuantizationConfig([INT8], calibration_images=count), own, images)


def distillation(steps: int) -> None:
    """Steps of a student of the same shape."""
    own = teacher()
    settings = DistillationSettings(steps=steps, batch=BATCH)
    distill(own.student(), own, StoredSource(leaves(BATCH), BATCH, 0, "leaves"), settings, quiet=True)


STAGES = {
    "leaves": Stage(leaves, (32, 128), 1000, "image"),
    "impressions": Stage(impressions, (16, 48), 1000, "image"),
    "calibration": Stage(calibration, (32, 96), 1000, "image"),
    "distillation": Stage(distillation, (2, 6), 100, f"step of {BATCH}"),
}


def child(name: str, size: int) -> None:
    """Do so many units of a stage, and print the seconds and the peak memory in MiB."""
    STAGES[name].work(min(STAGES[name].sizes) if name != "distillation" else 1)  # warms up
    started = time.perf_counter()
    STAGES[name].work(size)
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def measured(name: str, threads: int) -> dict[str, Any]:
    """The record of a stage."""
    stage, found = STAGES[name], []
    for size in stage.sizes:
        command = [sys.executable, __file__, "--child", name, str(size), "--threads", str(threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    (few, _), (more, peak) = found
    each = (more - few) / (stage.sizes[1] - stage.sizes[0])
    return {
        "name": name,
        "unit": stage.unit,
        "units": stage.asked,
        "seconds_a_unit": float(f"{each:.3g}"),
        "minutes": float(f"{(few + each * (stage.asked - stage.sizes[0])) / 60:.3g}"),
        "peak_mib": round(peak),
        "measured_on": list(stage.sizes),
        "threads": threads,
        "provenance": provenance("cpu", 0),
    }


def main() -> None:
    """Parse the arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        child(arguments.child[0], int(arguments.child[1]))
        return
    for name in arguments.only:
        kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
        record = measured(name, arguments.threads)
        write_json(arguments.out, [*(one for one in kept if one["name"] != name), record])
        print({key: value for key, value in record.items() if key != "provenance"}, flush=True)


if __name__ == "__main__":
    main()
