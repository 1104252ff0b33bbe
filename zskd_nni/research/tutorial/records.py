"""Results measured before, read from the files in ``results/`` and shown with the names of these files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zskd_nni.pipeline.comparison import bits_of
from zskd_nni.recipes.schema import completed
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
from zskd_nni.training.checkpoint import History

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
        student + (f" ({bits_of(first['recipe']['compression']['quantization'])})" if suffix else ""),
        mean_and_deviation(real),
        *controls,
        f"{first['parameters']['teacher']:,} to {first['parameters']['student']:,}",
    ]


def histories_of(folder: str | Path) -> dict[str, History]:
    """The losses of all trainings of a finished run, by whom they taught."""
    found = {}
    for file, label in (
        ("student", "student"),
        ("control-noise", "control on noise"),
        ("control-leaves", "control on leaves"),
    ):
        path = Path(folder, "state", f"{file}.json")
        losses = read_json(path)["record"].get("distillation") if path.exists() else None
        if losses:
            found[label] = History(losses["steps"], losses["losses"])
    return found


def beside_record(report: Mapping[str, Any], name: str, folder: Path = RESULTS) -> Table:
    """A run of a packaged recipe beside the committed record of its seed, and in what the two differ.

    Args:
        report: of the run, :meth:`zskd_nni.pipeline.Run.compress`.
        name: of the record: ``results/NAME.json``.
        folder: of the records.
    """
    records = recipe_records(name, folder)
    record = next((one for one in records if one["recipe"]["seed"] == report["recipe"]["seed"]), None)
    here, there = _accuracies(report), _accuracies(record or {})
    columns = ("test accuracy, %", "this run", "record of this seed", "difference, points", "records, all seeds")
    if record is None:
        rows = [(what, _figure(value), "-", "-", "-") for what, value in here.items()]
        return Table(columns, rows, f"There is no record of seed {report['recipe']['seed']} in {folder / name}.json.")
    rows = []
    for what, value in here.items():
        known = [one for one in (_accuracies(record).get(what) for record in records) if one is not None]
        then = there.get(what)
        gap = None if value is None or then is None else value - then
        spread = f"{min(known):.2f} to {max(known):.2f}" if known else "-"
        rows.append((what, _figure(value), _figure(then), "-" if gap is None else f"{gap:+.2f}", spread))
    made, now = record["provenance"], report["provenance"]
    caption = (
        f"Record: {folder / name}.json, seed {made['seed']}, commit {made['commit'][:8]}, "
        f"zskd_nni {made['versions']['zskd_nni']}. This run: seed {now['seed']}, commit {(now['commit'] or '-')[:8]}, "
        f"zskd_nni {now['versions']['zskd_nni']}. {_differences(record['recipe'], report['recipe'])}"
    )
    return Table(columns, rows, caption)


def _accuracies(record: Mapping[str, Any]) -> dict[str, float | None]:
    """Accuracies of a record or report by what was measured: in floating point, then in integers if there are any."""
    known, controls = record.get("accuracy") or {}, record.get("controls") or {}
    labels = {"none": "not distilled", "noise": "distilled on noise", "leaves": "distilled on leaves"}
    found = {"teacher": known.get("teacher")}
    for suffix, precision in (("", ""), ("_int8", ", int8")):
        if suffix and known.get("student_int8") is None:
            continue
        found[f"student{precision}"] = known.get(f"student{suffix}")
        for kind in (kind for kind in labels if kind in controls):
            found[f"control: {labels[kind]}{precision}"] = controls[kind].get(f"accuracy{suffix}")
    return found


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _differences(record: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """In which settings two recipes differ, as a sentence."""
    old, new = _flat(completed(dict(record))), _flat(completed(dict(recipe)))
    words = ("name", "description", "selected_on", "scale")
    other = [key for key in sorted(old | new) if old.get(key) != new.get(key) and key not in words]
    if not other:
        return "The recipe is the same, to the last key."
    told = ", ".join(f"{key} {new.get(key)} in the place of {old.get(key)}" for key in other)
    return f"The recipe differs from the record's: {told}."


def _flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """A nested mapping with key paths as keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return found


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


def beside_reproduction(
    accuracies: Mapping[str, float | None], scale: str, seed: int, folder: Path = RESULTS / "reproduce"
) -> Table:
    """Students beside the records that ``zskd-nni reproduce`` left of the same cells and seed.

    Args:
        accuracies: test accuracy in percent by name of the cell; None where it was not measured.
        scale: of the records.
        seed: of the records.
        folder: of the records.
    """
    records = [one for one in read_records(folder) if one["cell"] in accuracies and one["scale"] == scale]
    rows, commits = [], set()
    for cell, value in accuracies.items():
        of_cell = {one["seed"]: one for one in records if one["cell"] == cell}
        known = of_cell.get(seed, {}).get("accuracy", {}).get("student")
        commits |= {of_cell[seed]["provenance"]["commit"][:8]} if seed in of_cell else set()
        all_seeds = [one["accuracy"]["student"] for one in of_cell.values() if one["accuracy"]["student"] is not None]
        spread = f"{min(all_seeds):.2f} to {max(all_seeds):.2f}" if all_seeds else "-"
        gap = "-" if value is None or known is None else f"{value - known:+.2f}"
        rows.append((cell, _figure(value), _figure(known), gap, spread))
    columns = ("test accuracy, %", "this run", "record of this seed", "difference, points", "records, all seeds")
    made = ", ".join(sorted(commits)) or "-"
    return Table(columns, rows, f"Records: {folder}/CELL-seed{seed}.json, seed {seed}, scale {scale}, commits {made}.")
