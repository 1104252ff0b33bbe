"""Figures that were measured before, read from the files in ``results/`` and shown with their names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zskd_nni.research.reproduction.page import group_records, mean_and_deviation, take_out_older
from zskd_nni.research.reproduction.records import read_records
from zskd_nni.research.reproduction.tables import TABLES
from zskd_nni.research.display import Table
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json

RESULTS = Path("results")


def repository() -> Path:
    """The copy of the repository that the current folder lies in: what notebooks read and write is found from there.

    Raises:
        UserError: the current folder lies in none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "results").is_dir():
            return folder
    raise UserError(f"{here} lies in no copy of the repository (a folder with notebooks and results in it).")


def recipe_records(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The runs of a packaged recipe, one a seed, as they were kept; none where the file is not there.

    Raises:
        UserError: the file holds something else.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        return []
    records = read_json(path)
    whole = isinstance(records, list) and all(isinstance(record, dict) for record in records)
    if not whole or not all({"accuracy", "parameters", "controls", "provenance"} <= set(record) for record in records):
        raise UserError(f"{path} holds no runs of a recipe.")
    return records


def recipes_table(names: Sequence[str], folder: Path = RESULTS) -> Table:
    """What packaged recipes reached on test data: mean and standard deviation over their seeds."""
    columns = ["recipe", "teacher", "student", "with real data", "not distilled", "on noise", "parameters"]
    rows, files, missing, seeds = [], [], [], set()
    for name in names:
        records = recipe_records(name, folder)
        if not records:
            rows.append([name, *["-"] * 6])
            missing.append(name)
            continue
        files.append(str(folder / f"{name}.json"))
        seeds |= {record["provenance"]["seed"] for record in records}
        first = records[0]
        integers = first["accuracy"].get("student_int8") is not None
        key = "student_int8" if integers else "student"

        def over(values: Sequence[float | None]) -> str:
            return mean_and_deviation([value for value in values if value is not None])

        controls = [
            over(
                [
                    record["controls"].get(kind, {}).get("accuracy_int8" if integers else "accuracy")
                    for record in records
                ]
            )
            for kind in ("none", "noise")
        ]
        rows.append(
            [
                name,
                f"{first['accuracy']['teacher']:.2f}",
                over([record["accuracy"][key] for record in records]) + (" (int8)" if integers else ""),
                over([record["real_data"]["accuracy"][key] for record in records if "real_data" in record]),
                *controls,
                f"{first['parameters']['teacher']:,} to {first['parameters']['student']:,}",
            ]
        )
    caption = ""
    if files:
        numbers = ", ".join(map(str, sorted(seeds)))
        caption = f"Test accuracy in percent over the seeds {numbers}, read from {', '.join(files)}."
    if missing:
        caption += f" Not run yet: {', '.join(missing)}."
    return Table(columns, rows, caption.strip())


def reproduction_table(pair: str, folder: Path = RESULTS / "reproduce") -> Table:
    """What ``zskd-nni reproduce`` has measured for a pair: a row for each cell of its table of all methods.

    Where a cell was run at full size that is shown, else what there is. Ablations are on the page of results.
    """
    name, cells = next(
        (name, [cell.name for cell in table.cells if cell.pair == pair])
        for name, table in TABLES.items()
        if any(cell.pair == pair for cell in table.cells)
    )
    found = group_records(
        record for record in read_records(folder) if record["pair"] == pair and record["cell"] in cells
    )
    older = take_out_older(found)
    groups = {}
    for cell in cells:
        scales = sorted((scale for named, scale in found if named == cell), key=lambda scale: scale != "full")
        groups.update({(cell, scale): found[cell, scale] for scale in scales[:1]})
    columns = ["method", "scale", "images", "student", "agreement", "transition error", "seeds"]
    rows = []
    for (_, scale), group in groups.items():
        first = group[0]

        def over(values: Sequence[float | None], digits: int = 2) -> str:
            return mean_and_deviation([value for value in values if value is not None], digits)

        method = " ".join(part for part in (first["method"], first["preset"], first["variant"]) if part)
        rows.append(
            [
                method + ("" if first.get("data_free", True) else " (reads real images)"),
                scale,
                "-" if first["impressions"] is None else f"{first['impressions']:,}",
                over([record["accuracy"]["student"] for record in group]),
                over([None if record["agreement"] is None else 100 * record["agreement"] for record in group]),
                over([record["mte"] for record in group], 3),
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
