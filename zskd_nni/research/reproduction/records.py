"""Reading the records that runs leave, and matching them with the cells of the tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json

Record = dict[str, Any]
FORMAT = "zskd_nni reproduction 1"
NEEDED = (
    "cell",
    "pair",
    "method",
    "preset",
    "variant",
    "seed",
    "scale",
    "impressions",
    "accuracy",
    "agreement",
    "calibration_error",
    "mte",
    "networks",
    "ingredients",
    "seconds",
    "device",
    "selected_on",
    "provenance",
)
_KINDS: dict[str, type] = {
    **dict.fromkeys(("cell", "pair", "method", "scale"), str),
    **dict.fromkeys(("accuracy", "seconds", "networks", "ingredients", "provenance"), dict),
    "seed": int,
}


def teacher_of(record: Record) -> str:
    """Fingerprint of the record's teacher."""
    return str(record["provenance"]["teacher"])


def _is_number(value: Any, optional: bool = True) -> bool:
    """Whether it is a finite number, or None if that is allowed."""
    if value is None:
        return optional
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_parts(record: Mapping[str, Any]) -> dict[str, bool]:
    """For each key whose value has the right type: whether its parts are valid."""
    accuracy, errors = record["accuracy"], record["calibration_error"]
    return {
        "accuracy": _is_number(accuracy.get("teacher"), False)
        and "student" in accuracy
        and _is_number(accuracy["student"]),
        "calibration_error": isinstance(errors, dict) and all(map(_is_number, errors.values())),
        "seconds": all(map(_is_number, record["seconds"].values())),
        "impressions": record["impressions"] is None or type(record["impressions"]) is int,
        "agreement": _is_number(record["agreement"]),
        "mte": _is_number(record["mte"]),
        "variant": record["variant"] is None or isinstance(record["variant"], str),
        "preset": record["preset"] is None or isinstance(record["preset"], str),
        "provenance": isinstance(record["provenance"].get("teacher"), str),
    }


def read_record(path: Path) -> Record:
    """One record.

    Raises:
        UserError: the file is no valid record.
    """
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path} is no record of zskd-nni reproduce; move it out of the folder.")
    missing = [key for key in NEEDED if key not in record]
    if missing:
        raise UserError(f"{path} is an incomplete record: it lacks {missing[0]!r}. Remove it, and run its cell again.")
    wrong = next((key for key, kind in _KINDS.items() if not isinstance(record[key], kind)), None)
    if wrong is None:
        wrong = next((key for key, valid in _check_parts(record).items() if not valid), None)
    if wrong is not None:
        raise UserError(f"{path}: {wrong!r} is {record[wrong]!r}. Remove the file, and run its cell again.")
    return record


def read_records(folder: Path) -> list[Record]:
    """All records of a folder, in the order of their file names; none if there is no folder.

    Raises:
        UserError: a file is no valid record, or two files are records of the same run.
    """
    found: dict[tuple[str, str, int], Path] = {}
    records = []
    for path in sorted(folder.glob("*.json")):
        record = read_record(path)
        run = (record["cell"], record["scale"], record["seed"])
        if run in found:
            raise UserError(f"{found[run]} and {path} are records of one run, which would count twice; remove one.")
        found[run] = path
        records.append(record)
    return records


def read_run_file(path: Path, kinds: dict[str, type]) -> dict[str, Any]:
    """A JSON file of an unfinished run, with at least these keys.

    Raises:
        UserError: it lacks one, or a value has another type.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not all(
        key in content and isinstance(content[key], kinds[key]) for key in kinds
    ):
        raise UserError(f"{path} is incomplete. Remove it, and run its cell again.")
    return content
