"""What each part of the colour recipe is worth: one part changed or left out at a time, on a validation slice.

    python benchmarks/colour_parts.py --seeds 0 1

The recipe is ``cifar10-prune50`` at its scale ``quick`` with half as many steps. The last 5,000 training images of
CIFAR-10 take the place of the test split, and a teacher that has not seen them that of the shipped one. Each run is
kept in ``results/colour-parts.json`` and not repeated; what was stopped continues. ``--table`` prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from recipe_on_a_slice import slice_settings, slice_teacher

from zskd_nni.pipeline import Run
from zskd_nni.recipes.load import load_recipe
from zskd_nni.runtime.files import write_json
from zskd_nni.runtime.provenance import provenance

RECIPE = "cifar10-prune50"
RECORDS = Path(__file__).resolve().parent.parent / "results" / "colour-parts.json"
BASE = ["distillation.steps=800", "controls=[]"]


class Part(NamedTuple):
    """A variant: what is changed, and whether its images are those of the unchanged recipe."""

    changes: tuple[str, ...] = ()
    own_images: bool = False


PARTS: dict[str, Part] = {
    "nothing changed": Part(),
    "8 steps of synthesis": Part(("transfer.synthesis={max_steps: 8}",), True),
    "32 steps of synthesis": Part(("transfer.synthesis={max_steps: 32}",), True),
    "no synthesis: dead leaves": Part(("transfer={method: procedural, kind: leaves}",), True),
    "starts of uniform noise": Part(("transfer.synthesis={start: uniform}",), True),
    "no BatchNorm statistics": Part(("transfer.synthesis={batch_statistics: 0}",), True),
    "no total variation": Part(("transfer.synthesis={total_variation: [0, 0]}",), True),
    "one class a target (class impressions)": Part(("transfer.method=class-impressions",), True),
    "no fresh dead leaves": Part(("transfer.fresh=null",)),
    "half of each batch fresh dead leaves": Part(("transfer.fresh_share=0.5",)),
    "no hidden layers": Part(("distillation.features=none",)),
    "hidden layers at weight 1": Part(("distillation.feature_weight=1",)),
    "no CutMix, no mixup": Part(("distillation.augmentation.cutmix=0", "distillation.augmentation.mixup=0")),
    "no augmentation at all": Part(("distillation.augmentation={}",)),
    "temperature 20": Part(("distillation.temperature=20",)),
    "each view shown twice": Part(("distillation.repeats=2",)),
    "each view shown four times": Part(("distillation.repeats=4",)),
    "batches of 128": Part(("distillation.batch=128",)),
}


def run(part: str, seed: int, out: Path) -> dict[str, Any]:
    """Train the student of a variant on the slice's teacher; the record of it."""
    changes, own_images = PARTS[part]
    weights, images = slice_teacher(RECIPE, out)
    loaded = load_recipe(RECIPE, [*slice_settings(weights, images), *BASE, *changes], seed, "quick")
    slug = "".join(letter if letter.isalnum() else "-" for letter in part.lower())
    of_the_base = out / f"parts-nothing-changed-seed{seed}" / "impressions"
    shared = None if own_images or not changes else of_the_base
    report = Run(loaded, out / f"parts-{slug}-seed{seed}", impressions=shared).compress()
    return {
        "part": part,
        "seed": seed,
        "accuracy": report["accuracy"]["student"],
        "agreement": report["agreement"],
        "seconds": report["seconds"],
        "impressions": report["impressions"] and report["impressions"]["impressions"],
        "changes": list(changes),  # the recipe itself names files of this machine
        "provenance": provenance("cpu", seed),
    }


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table: accuracy on the slice by part, and how far it is from the unchanged recipe, seed by seed."""

    def of(part: str) -> dict[int, dict[str, Any]]:
        return {one["seed"]: one for one in records if one["part"] == part}

    base = of("nothing changed")
    lines = ["| changed | accuracy | difference | training, seconds |", "| --- | --- | --- | --- |"]
    for part in PARTS:
        found = of(part)
        if not found:
            continue
        values = [one["accuracy"] for one in found.values()]
        gaps = [one["accuracy"] - base[seed]["accuracy"] for seed, one in found.items() if seed in base]
        seconds = statistics.median(one["seconds"]["distillation of student"] for one in found.values())
        difference = "" if part == "nothing changed" else f"{statistics.mean(gaps):+.1f}"
        shown = ", ".join(f"{value:.2f}" for value in values)
        lines.append(f"| {part} | {shown} | {difference} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is not in the records yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS), metavar="PART")
    parser.add_argument("--out", type=Path, default=Path("runs/slice"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the table of what has been run")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else []
    if not given.table:
        for seed in given.seeds:
            for part in given.parts:
                if not any(one["part"] == part and one["seed"] == seed for one in records):
                    records.append(run(part, seed, given.out))
                    write_json(RECORDS, records)
    print(table(records))


if __name__ == "__main__":
    main()
