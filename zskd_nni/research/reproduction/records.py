"""Reading the records that runs leave."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json

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
    "ingredients",
    "seconds",
    "fingerprint",
    "device",
    "selected_on",
    "provenance",
)
_KINDS: dict[str, type] = {
    **dict.fromkeys(("cell", "pair", "method", "scale", "fingerprint"), str),
    **dict.fromkeys(("accuracy", "seconds", "ingredients", "provenance"), dict),
    "seed": int,
}


def _number(value: Any, optional: bool = True) -> bool:
    """Whether it is a finite number; None counts as one where it may be absent."""
    if value is None:
        return optional
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _inside(record: Mapping[str, Any]) -> dict[str, bool]:
    """Which values, whose kinds are right, have sound parts."""
    accuracy, errors = record["accuracy"], record["calibration_error"]
    return {
        "accuracy": _number(accuracy.get("teacher"), False) and "student" in accuracy and _number(accuracy["student"]),
        "calibration_error": isinstance(errors, dict) and all(map(_number, errors.values())),
        "seconds": all(map(_number, record["seconds"].values())),
        "impressions": record["impressions"] is None or type(record["impressions"]) is int,
        "agreement": _number(record["agreement"]),
        "mte": _number(record["mte"]),
        "variant": record["variant"] is None or isinstance(record["variant"], str),
        "preset": record["preset"] is None or isinstance(record["preset"], str),
        "provenance": isinstance(record["provenance"].get("teacher"), str),
    }


def read_record(path: Path) -> dict[str, Any]:
    """One record.

    Raises:
        UserError: the file is no sound record.
    """
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path} is no record of zskd-nni reproduce; move it out of the folder.")
    missing = [key for key in NEEDED if key not in record]
    if missing:
        raise UserError(f"{path} is not a whole record: it lacks {missing[0]!r}. Remove it, and run its cell again.")
    wrong = next((key for key, kind in _KINDS.items() if not isinstance(record[key], kind)), None)
    if wrong is None:
        wrong = next((key for key, sound in _inside(record).items() if not sound), None)
    if wrong is not None:
        raise UserError(f"{path}: {wrong!r} is {record[wrong]!r}. Remove the file, and run its cell again.")
    return record


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a folder, in the order of their file names; none where there is no folder.

    Raises:
        UserError: a file is no sound record, or two are of one run.
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
