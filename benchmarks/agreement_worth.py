"""What agreement says where there is no test data: the estimates of every recorded run beside what test data say.

    python benchmarks/agreement_worth.py          # prints it
    python benchmarks/agreement_worth.py --write  # and puts it into docs/reliability.md

A run without test data can only report how often its student chooses the teacher's class on *held-out* images (made as
those that the student was trained on, with another seed) and on *procedural* ones. The runs in ``results/*.json`` also
had test data. The table shows each estimate next to the agreement on test data, and by how many points it is off.
Recipes that train nothing are left out: their student is the teacher, before it is quantized. The records of
``results/reproduce`` have no such estimates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packaged_recipes import only_calibrates, over_seeds, recipe_results

from zskd_nni.runtime.files import write_atomic

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reliability.md"
BEGINNING, END = "<!-- of benchmarks/agreement_worth.py -->", "<!-- to here -->"
ESTIMATES = ("agreement_held_out", "agreement_neutral")
HEAD = (
    "| recipe | trained on | seeds | on held-out images | on procedural images | on test data | accuracy, teacher "
    "| accuracy, student | held-out is off by | procedural is off by |"
)


def runs() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The records of each recipe that trains a student, by its name and by what the student is trained on."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in recipe_results():
        for record in json.loads(path.read_text()):
            if "agreement_held_out" in record and not only_calibrates(record):
                found.setdefault((path.stem, record["recipe"]["transfer"]["method"]), []).append(record)
                if record.get("real_data", {}).get("agreement_held_out") is not None:
                    found.setdefault((path.stem, "real images"), []).append(record["real_data"])
    return found


def off_by(records: Sequence[dict[str, Any]], estimate: str) -> list[float]:
    """Percentage points from the agreement on test data to an estimate of it, for each record that has it."""
    return [100 * (one[estimate] - one["agreement"]) for one in records if one.get(estimate) is not None]


def table() -> str:
    """The table as Markdown, mean and standard deviation over the seeds."""
    lines = [HEAD, "| " + " | ".join(["---"] * HEAD.count(" | ")) + " | --- |"]
    for (name, images), records in runs().items():
        shares = [
            over_seeds([100 * one[key] for one in records if one.get(key) is not None])
            for key in (*ESTIMATES, "agreement")
        ]
        accuracies = [over_seeds([one["accuracy"][network] for one in records]) for network in ("teacher", "student")]
        errors = [f"{statistics.mean(errors):+.1f}" if (errors := off_by(records, key)) else "-" for key in ESTIMATES]
        teacher = accuracies[0].partition(" ")[0]  # the same for every seed
        lines.append(
            f"| {' | '.join([f'`{name}`', images, str(len(records)), *shares, teacher, accuracies[1], *errors])} |"
        )
    return "\n".join(lines)


def summary() -> str:
    """How far off the estimates of the data-free runs have been, in one sentence for each."""
    data_free = [one for (_, images), records in runs().items() if images != "real images" for one in records]
    said = []
    for name, key in zip(("held-out", "procedural"), ESTIMATES, strict=True):
        errors = off_by(data_free, key)
        below = sorted(-error for error in errors)
        ends = dict.fromkeys(f"{end:.0f}" for end in (below[0], below[-1]))  # one where both are the same
        said.append(
            f"In {len(errors)} data-free runs agreement on {name} images was {' to '.join(ends)} points below "
            f"agreement on test data (median {statistics.median(below):.0f})."
        )
    return " ".join(said)


def section() -> str:
    """What stands on the page between the marks."""
    return f"{BEGINNING}\n{table()}\n\n{textwrap.fill(summary(), 120, break_on_hyphens=False)}\n{END}"


def main() -> None:
    """Parse the arguments and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        text = PAGE.read_text()
        before, after = text.partition(BEGINNING)[0], text.partition(END)[2]
        write_atomic(PAGE, f"{before}{section()}{after}")
    print(f"{table()}\n\n{summary()}")


if __name__ == "__main__":
    main()
