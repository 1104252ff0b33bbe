"""Reading the records that runs leave, and matching them with the cells of the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json

Record = dict[str, Any]
FORMAT = "zskd_nni reproduction 1"


class _Strict(BaseModel):
    """Other keys are allowed; values have to be of the type as JSON has it, and numbers finite."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Accuracy(_Strict):
    teacher: float
    student: float | None


class _Provenance(_Strict):
    teacher: str


class _Record(_Strict):
    cell: str
    pair: str
    method: str
    preset: str | None
    variant: str | None
    seed: int
    scale: str
    impressions: int | None
    accuracy: _Accuracy
    agreement: float | None
    calibration_error: dict[str, float | None]
    mte: float | None
    networks: dict[str, Any]
    ingredients: dict[str, Any]
    seconds: dict[str, float | None]
    device: str
    selected_on: str
    provenance: _Provenance


NEEDED = tuple(_Record.model_fields)


def teacher_of(record: Record) -> str:
    """Fingerprint of the record's teacher."""
    return record["provenance"]["teacher"]


def read_record(path: Path) -> Record:
    """One record.

    Raises:
        UserError: the file is no valid record.
    """
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path} is no record of zskd-nni reproduce; move it out of the folder.")
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = str(problem["loc"][0])
        wrong = f"{key!r} is {record[key]!r}" if key in record else f"it lacks {key!r}"
        raise UserError(f"{path} is no valid record: {wrong}. Remove it, and run its cell again.") from error
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
