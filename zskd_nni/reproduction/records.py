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
    "device",
    "selected_on",
    "provenance",
)


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
    return record


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a folder, in the order of their file names; none where there is no folder.

    Raises:
        UserError: a file is no sound record.
    """
    return [read_record(path) for path in sorted(folder.glob("*.json"))]
