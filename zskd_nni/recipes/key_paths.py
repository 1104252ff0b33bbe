"""Key paths such as ``compression.pruning.config_list.0.sparse_ratio`` into plain mappings and lists."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


def set_at(content: dict[str, Any], path: str, value: Any) -> None:
    """Put ``value`` at ``path``. Missing mappings on the way are created; a list never grows.

    Raises:
        ValueError: a part of the path is empty, is no index of a list, or lies below a plain value.

    Example:
        >>> recipe = {"transfer": {"size": 100}}
        >>> set_at(recipe, "distillation.steps", 5)
        >>> recipe
        {'transfer': {'size': 100}, 'distillation': {'steps': 5}}
    """
    keys = path.split(".")
    if not all(keys):
        raise ValueError(f"a key path is key.path, not {path!r}")
    place: Any = content
    for depth, key in enumerate(keys):
        index: Any = key
        where = ".".join(keys[:depth])
        if isinstance(place, list):
            if not (key.isascii() and key.isdigit() and int(key) < len(place)):
                raise ValueError(f"{where} is a list of {len(place)}; {key!r} is no index of it")
            index = int(key)
        elif not isinstance(place, dict):
            raise ValueError(f"{where} is {place!r}, which has no keys")
        if depth == len(keys) - 1:
            place[index] = value
        elif isinstance(place, dict) and place.get(key) is None:
            place[key] = {}
        place = place[index]


def get_at(content: Any, path: str) -> Any:
    """The value at a path where :func:`set_at` has put one."""
    for key in path.split("."):
        content = content[int(key)] if isinstance(content, list) else content[key]
    return content


def apply_changes(source: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put values at key paths of a recipe's plain mapping.

    A preset belongs to a method: where ``transfer.method`` changes and the changes name no preset, the new method gets
    its default one.

    Raises:
        ValueError: as of :func:`set_at`, with the path in front.
    """
    method = section_of(source, "transfer").get("method", "zskd")
    for path, value in changes.items():
        try:
            set_at(source, path, copy.deepcopy(value))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    preset_named = changes.keys() & {"transfer", "transfer.preset"}
    if changes.get("transfer.method", method) != method and not preset_named:
        section_of(source, "transfer").pop("preset", None)


def section_of(source: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The mapping at a key of a recipe's plain mapping; an empty one where something else is, or nothing."""
    section = source.get(name)
    return section if isinstance(section, dict) else {}
