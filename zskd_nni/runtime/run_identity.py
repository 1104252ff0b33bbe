"""Which run does a folder belong to? A JSON file in it describes the run; any other run is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json

# Raise the number when an identity or the folder's content changes its meaning.
RUN_FORMAT = "zskd_nni run 2"
# Keys that version 0.1 recorded among the settings, although they are not settings.
RETIRED = ("batch_statistics_meaning",)


def check_format(content: dict[str, Any], expected: str, path: Path, remedy: str) -> None:
    """Refuse a file that another version of this package wrote.

    Args:
        content: of the file; its key ``format`` names the format. Version 0.1 wrote run folders without one.
        expected: the format that this version reads.
        path: of the file or of its folder, for the message.
        remedy: a sentence that says how to make the content again.

    Raises:
        UserError: the format is another one.
    """
    if content.get("format") != expected:
        raise UserError(
            f"{path} was made by another version of zskd_nni (its format is {content.get('format')!r}, this version "
            f"reads {expected!r}). {remedy}"
        )


def with_defaults(recorded: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Recorded settings over the defaults, also nested ones: a setting that is newer than the record gets its default.

    Example:
        >>> with_defaults({"steps": 5, "moves": {"shear": 2}}, {"steps": 1, "moves": {"shear": 0, "flip": 0}})
        {'steps': 5, 'moves': {'shear': 2, 'flip': 0}}
    """
    result = dict(defaults)
    for key, value in recorded.items():
        if key in RETIRED:
            continue
        nested = isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping)
        result[key] = with_defaults(value, defaults[key]) if nested else value
    return result


def describe_difference(old: dict[str, Any], new: dict[str, Any], path: str = "") -> str:
    """The first difference between two JSON-able mappings as ``key.path is A there, B here``; empty if none."""
    for key in sorted(old.keys() | new.keys()):
        here = f"{path}{key}"
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = describe_difference(a, b, f"{here}.")
            if inner:
                return inner
        elif a != b:
            return f"{here} is {_short(a)} there, {_short(b)} here"
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:20] + "..."


def resume_or_refuse(
    folder: Path,
    name: str,
    kind: str,
    identity: dict[str, Any],
    complete: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """What an earlier call of the same run wrote into ``folder / name``; empty if the folder is new.

    Args:
        folder: of the run; it exists, and this process holds its lock.
        name: of the JSON file. It has :data:`RUN_FORMAT` under ``format`` and the run's identity under ``identity``.
        kind: what such a run is called, for messages.
        identity: of the run that asks.
        complete: gives keys that are newer than a recorded identity their defaults, before the two are compared.

    Raises:
        UserError: the file is damaged or of another version, or the folder belongs to another run or holds something
            else.
    """
    path = folder / name
    if path.exists():
        known = read_json(path)
        if not isinstance(known, dict) or not isinstance(known.get("identity"), dict):
            raise UserError(f"{path} is damaged; remove {folder} to start over.")
        check_format(
            known,
            RUN_FORMAT,
            folder,
            f"The {kind} cannot be continued: run the same command with a new output folder, or remove this one first.",
        )
        difference = describe_difference(complete(known["identity"]), identity)
        if difference:
            raise UserError(f"{folder} belongs to another {kind} ({difference}). Use another output folder.")
        return known
    if any(entry.name != ".lock" for entry in folder.iterdir()):
        raise UserError(f"{folder} is not empty and no {kind} of this recipe made it. Use another output folder.")
    return {}
