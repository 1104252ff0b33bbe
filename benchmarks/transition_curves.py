"""A figure of transition curves, from the records of ``zskd-nni reproduce``.

    python benchmarks/transition_curves.py cifar10-wrn --out docs/pictures/transitions-cifar10-wrn.png

One chart for each row whose mean transition error was measured, of its first seed at that scale.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from zskd_nni.research.reproduction.records import read_records
from zskd_nni.research.tutorial.figures import transitions_picture
from zskd_nni.training.metrics import TransitionResult

ROOT = Path(__file__).resolve().parent.parent


def result_of(record: dict[str, Any]) -> TransitionResult:
    """What was measured, from its record."""
    measured, curves = record["mte_measured_on"], record["transition_curves"]
    followed, other = (torch.tensor(curves[name], dtype=torch.float64) for name in ("student", "teacher"))
    return TransitionResult(
        record["mte"], measured["images"], measured["steps"], measured["step_size"], followed, other
    )


def chosen(records: list[dict[str, Any]], pair: str, scale: str) -> dict[str, TransitionResult]:
    """By the cell's name without its pair, of the first seed there is."""
    found: dict[str, TransitionResult] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        if record["pair"] == pair and record["scale"] == scale and "transition_curves" in record:
            found.setdefault(record["cell"].removeprefix(f"{pair}-"), result_of(record))
    return found


def main() -> None:
    """Parse the arguments and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", help="as in docs/reproduction.md")
    parser.add_argument("--scale", default="full")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "reproduce")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    results = chosen(read_records(arguments.results), arguments.pair, arguments.scale)
    if not results:
        raise SystemExit(
            f"{arguments.results} has no record of {arguments.pair} at scale {arguments.scale} with curves."
        )
    picture = transitions_picture(results)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(arguments.out)
    print(f"{arguments.out}: {picture.alt}")


if __name__ == "__main__":
    main()
