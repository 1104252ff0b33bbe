"""Minutes of one core against test accuracy, for an AlexNet without half of its channels.

    python benchmarks/time_to_accuracy.py                      # what is not measured yet, seed 0
    python benchmarks/time_to_accuracy.py --ways ours --seeds 1 2

All ways are the recipe ``cifar10-prune50`` with another budget or other images: the same pruned network, trained by the
same distillation. Each point is a run of its own, and test data is read once at its end. The points at the recipe's own
scales come from its records in ``results/``. A finished run is not repeated, a stopped one continues.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compare_rivals import made_in

from zskd_nni.pipeline import Run
from zskd_nni.recipes.load import load_recipe
from zskd_nni.runtime.files import make_folder, write_json

RESULTS = Path(__file__).resolve().parent.parent / "results"
RECORD = RESULTS / "time-to-accuracy.json"
RECIPE = "cifar10-prune50"
# A run of the recipe makes 500 held-out images too, which its student does not need.
SHORT = ("controls=[]", "transfer.held_out=10")
REAL = ("transfer.method=real", "transfer.data=cifar10", "transfer.size=50000", "transfer.fresh=null")
# What ZSKD's released code does for CIFAR-10: batches of 100 from uniform noise, 1,500 steps of Adam at 0.001, and no
# other images beside the impressions. One batch alone is made here, so that its rows of one class play no part.
PUBLISHED = (
    "transfer.preset=paper",
    "transfer.synthesis={start: uniform, range: rescale, learning_rate: 0.001, max_steps: 1500, slots: 100}",
    "transfer.fresh=null",
)


@dataclass(frozen=True)
class Way:
    """Where the images come from.

    Attributes:
        changes: of the recipe.
        budgets: impressions (None for real images, which need no making) and steps of the student.
    """

    changes: tuple[str, ...]
    budgets: tuple[tuple[int | None, int], ...]


WAYS = {
    "ours": Way((), ((500, 200), (1000, 600), (10000, 6400))),
    "published": Way(PUBLISHED, ((100, 400),)),
    "real": Way(REAL, ((None, 100), (None, 400), (None, 6400))),
}


def measure(way: str, size: int | None, steps: int, seed: int, runs: Path) -> dict[str, Any]:
    """Run one budget, and return its point."""
    images = (f"transfer.size={size}",) if size else ()
    changes = [*SHORT, *WAYS[way].changes, *images, f"distillation.steps={steps}"]
    folder = runs / f"{way}-{size or 'all'}-{steps}-seed{seed}"
    report = Run(load_recipe(RECIPE, changes, seed), folder).compress()
    return point(way, size, steps, report)


def point(way: str, size: int | None, steps: int, report: dict[str, Any]) -> dict[str, Any]:
    """What the plot needs of a report, or of a record of one."""
    stages = ("synthesis",) if way != "real" else ()
    return {
        "way": way,
        "impressions": size,
        "steps": steps,
        "seed": report["recipe"]["seed"],
        "seconds": made_in(report["seconds"], "student", *stages),
        "accuracy": report["accuracy"]["student"],
        "provenance": report["provenance"],
    }


def of_the_recipe() -> list[dict[str, Any]]:
    """The points of the recipe's records at its two scales, and of their twins on real images."""
    points = []
    for path in (RESULTS / f"{RECIPE}-quick.json", RESULTS / f"{RECIPE}.json"):
        for record in json.loads(path.read_text()) if path.exists() else []:
            size, steps = record["recipe"]["transfer"]["size"], record["recipe"]["distillation"]["steps"]
            points.append(point("ours", size, steps, record))
            if "real_data" in record:
                twin = {**record, **record["real_data"], "recipe": record["recipe"]}
                points.append(point("real", None, steps, twin))
    return points


def main() -> None:
    """Measure what is missing and write every point as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--steps", nargs="+", type=int, help="only budgets of so many steps")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/time-to-accuracy"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = make_folder(given.runs)
    points: dict[tuple[Any, ...], dict[str, Any]] = {}
    key = ("way", "impressions", "steps", "seed")
    for one in [*(json.loads(RECORD.read_text()) if RECORD.exists() else []), *of_the_recipe()]:
        points[tuple(one[name] for name in key)] = one
    budgets = [(way, *budget) for way in given.ways for budget in WAYS[way].budgets]
    budgets = [budget for budget in budgets if given.steps is None or budget[2] in given.steps]
    for seed in given.seeds:
        for way, size, steps in sorted(budgets, key=lambda budget: budget[2]):  # the short ones first
            if (way, size, steps, seed) not in points:
                found = points[way, size, steps, seed] = measure(way, size, steps, seed, runs)
                print({name: value for name, value in found.items() if name != "provenance"}, flush=True)
            write_json(RECORD, sorted(points.values(), key=lambda one: (one["way"], one["steps"], one["seed"])))


if __name__ == "__main__":
    main()
