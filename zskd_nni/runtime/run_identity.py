"""Whose folder is it? What a run is made of stands in a file there, and another run is refused with the difference."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import plain, read_json

# Metadata of a settings field that is younger than folders and records which people have: where it has its default,
# which changes nothing, it is left out of identities, so that those stay good.
LATER = {"later": True}
# Metadata of a field behind whose values the mathematics has changed: a number that stands beside them in identities,
# so that what was begun with the older one is not gone on with. It begins with 2, and rises.
MEANING = "meaning"


def settings_identity(settings: Any) -> dict[str, Any]:
    """A settings dataclass as JSON has it, for an identity: its fields by name, those of fields that are such too."""

    def described(value: Any) -> Any:
        if not is_dataclass(value):
            return value
        found: dict[str, Any] = {}
        for field in fields(value):
            if field.metadata.get("later") and getattr(value, field.name) == field.default:
                continue
            found[field.name] = described(getattr(value, field.name))
            if MEANING in field.metadata:
                found[f"{field.name}_{MEANING}"] = field.metadata[MEANING]
        return found

    return plain(described(settings))


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


def resume_or_refuse(folder: Path, name: str, kind: str, identity: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call of the same run has written into ``folder / name``; empty where the folder is new.

    Args:
        folder: of the run; it exists, and this process holds its lock.
        name: of the JSON file that has the run's identity under the key ``identity``.
        kind: what such a run is called, for messages.
        identity: of the run that asks.

    Raises:
        UserError: the file is damaged, the folder is another run's, or it holds something else.
    """
    path = folder / name
    if path.exists():
        known = read_json(path)
        if not isinstance(known, dict) or not isinstance(known.get("identity"), dict):
            raise UserError(f"{path} is damaged; remove {folder} to start over.")
        difference = describe_difference(known["identity"], identity)
        if difference:
            raise UserError(f"{folder} belongs to another {kind} ({difference}). Use another output folder.")
        return known
    if any(entry.name != ".lock" for entry in folder.iterdir()):
        raise UserError(f"{folder} is not empty and no {kind} of this recipe made it. Use another output folder.")
    return {}
