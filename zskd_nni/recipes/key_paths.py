"""Key paths such as ``compression.pruning.config_list.0.sparse_ratio`` into plain mappings and lists."""

from __future__ import annotations

from typing import Any


def set_at(content: dict[str, Any], path: str, value: Any) -> None:
    """Put ``value`` at ``path``; mappings that are missing on the way are made, lists are never made longer.

    Raises:
        ValueError: the path is empty somewhere, or leads through a list by what is no index of it, or through a value.
    """
    keys = path.split(".")
    if not all(keys):
        raise ValueError(f"a key path is key.path, not {path!r}")
    place: Any = content
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(place, list):
            if not (key.isascii() and key.isdigit() and int(key) < len(place)):
                where = ".".join(keys[:depth])
                raise ValueError(f"{where} is a list of {len(place)}; {key!r} is no index of it")
            index = int(key)
            if last:
                place[index] = value
            else:
                place = place[index]
        elif isinstance(place, dict):
            if last:
                place[key] = value
            else:
                if place.get(key) is None:
                    place[key] = {}
                place = place[key]
        else:
            raise ValueError(f"{'.'.join(keys[:depth])} is {place!r}, which has no keys")


def get_at(content: Any, path: str) -> Any:
    """What lies at a path where :func:`set_at` has put something."""
    for key in path.split("."):
        content = content[int(key)] if isinstance(content, list) else content[key]
    return content
