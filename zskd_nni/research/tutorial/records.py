"""Results measured before, read from the files in ``results/`` and shown with the names of these files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zskd_nni.research.display import Table
from zskd_nni.research.reproduction.page import (
    group_records,
    mean_and_deviation,
    percent_agreement,
    student_accuracies,
    take_out_older,
)
from zskd_nni.research.reproduction.records import read_records
from zskd_nni.research.reproduction.tables import TABLES
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json

RESULTS = Path("results")


def repository() -> Path:
    """The repository that the current folder is in; notebooks find what they read and write from there.

    Raises:
        UserError: the current folder is in none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "results").is_dir():
            return folder
    raise UserError(f"{here} lies in no copy of the repository (a folder with notebooks and results in it).")


def recipe_records(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The committed runs of a packaged recipe, one a seed; none if there is no file.

    Raises:
        UserError: the file holds something else.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        return []
    records = read_json(path)
    needed = {"accuracy", "parameters", "controls", "provenance"}
    if not isinstance(records, list) or not all(isinstance(one, dict) and needed <= set(one) for one in records):
        raise UserError(f"{path} holds no runs of a recipe.")
    return records


def recipes_table(names: Sequence[str], folder: Path = RESULTS) -> Table:
    """What packaged recipes reached on test data: mean and standard deviation over their seeds."""
    columns = ["recipe", "teacher", "student", "with real data", "not distilled", "on noise", "parameters"]
    found = {name: recipe_records(name, folder) for name in names}
    rows = [_recipe_row(name, records) if records else [name, *["-"] * 6] for name, records in found.items()]
    seeds = sorted({record["provenance"]["seed"] for records in found.values() for record in records})
    files = ", ".join(str(folder / f"{name}.json") for name, records in found.items() if records)
    missing = ", ".join(name for name, records in found.items() if not records)
    captions = []
    if files:
        captions.append(f"Test accuracy in percent over the seeds {', '.join(map(str, seeds))}, read from {files}.")
    if missing:
        captions.append(f"Not run yet: {missing}.")
    return Table(columns, rows, " ".join(captions))


def _recipe_row(name: str, records: list[dict[str, Any]]) -> list[str]:
    first = records[0]
    suffix = "_int8" if first["accuracy"].get("student_int8") is not None else ""
    controls = [
        mean_and_deviation(record["controls"].get(kind, {}).get(f"accuracy{suffix}") for record in records)
        for kind in ("none", "noise")
    ]
    real = (record["real_data"]["accuracy"][f"student{suffix}"] for record in records if "real_data" in record)
    student = mean_and_deviation(record["accuracy"][f"student{suffix}"] for record in records)
    return [
        name,
        f"{first['accuracy']['teacher']:.2f}",
        student + (" (int8)" if suffix else ""),
        mean_and_deviation(real),
        *controls,
        f"{first['parameters']['teacher']:,} to {first['parameters']['student']:,}",
    ]


def reproduction_table(pair: str, folder: Path = RESULTS / "reproduce") -> Table:
    """What ``zskd-nni reproduce`` has measured for a pair: a row for each cell of its table of all methods.

    A cell that was run at full size is shown at that size, others at the size there is. Ablations are on the page of
    results.
    """
    name, table = next((name, table) for name, table in TABLES.items() if any(c.pair == pair for c in table.cells))
    cells = [cell.name for cell in table.cells if cell.pair == pair]
    groups = group_records(r for r in read_records(folder) if r["pair"] == pair and r["cell"] in cells)
    older = take_out_older(groups)
    columns = ["method", "scale", "images", "student", "agreement", "transition error", "seeds"]
    rows = []
    for cell in cells:
        scales = sorted((scale for named, scale in groups if named == cell), key=lambda scale: scale != "full")
        for scale in scales[:1]:
            group = groups[cell, scale]
            first = group[0]
            method = " ".join(part for part in (first["method"], first["preset"], first["variant"]) if part)
            rows.append(
                [
                    method + ("" if first.get("data_free", True) else " (reads real images)"),
                    scale,
                    "-" if first["impressions"] is None else f"{first['impressions']:,}",
                    mean_and_deviation(student_accuracies(group)),
                    mean_and_deviation(map(percent_agreement, group)),
                    mean_and_deviation((record["mte"] for record in group), 3),
                    ", ".join(str(record["seed"]) for record in group),
                ]
            )
    caption = f"Test accuracy and agreement in percent, read from {folder / pair}-*.json."
    if older:
        caption += f" Left out, of other settings or another teacher: {', '.join(older)}."
    if not rows:
        rows = [["none yet", *["-"] * 6]]
        caption = f"There is no {folder / pair}-*.json yet; zskd-nni reproduce {name} writes such records."
    return Table(columns, rows, caption)
