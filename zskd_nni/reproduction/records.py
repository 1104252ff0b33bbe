"""Reading the records that runs leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zskd_nni.errors import UserError
from zskd_nni.files import read_json

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
    if wrong is None and not isinstance(record["provenance"].get("teacher"), str):
        wrong = "provenance"
    if wrong is not None:
        raise UserError(f"{path}: {wrong!r} is {record[wrong]!r}. Remove the file, and run its cell again.")
    return record


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a folder, in the order of their file names; none where there is no folder.

    Raises:
        UserError: a file is no sound record.
    """
    return [read_record(path) for path in sorted(folder.glob("*.json"))]
