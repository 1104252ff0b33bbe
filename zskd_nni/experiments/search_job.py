"""What a search hands to its trials and leaves behind: recipes whose paths hold in the folder they lie in."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zskd_nni.data import NAMED_SETS
from zskd_nni.methods.ats import PROCEDURAL
from zskd_nni.recipe import LoadedRecipe
from zskd_nni.zoo.trained import MADE_HERE, trained_names

_NOT_FILES = (*NAMED_SETS, *PROCEDURAL)


def relocated(loaded: LoadedRecipe, folder: Path, carry: bool = False) -> dict[str, Any]:
    """A recipe's plain mapping for a file in ``folder``, without its ``search`` section.

    Args:
        loaded: the recipe.
        folder: where it shall hold.
        carry: copy the files it names into ``folder``, so that the folder can go to another machine.
    """
    source = copy.deepcopy(loaded.source)
    source.pop("search", None)
    for section in ("teacher", "student"):
        _name_made_here(source.get(section))
    for place, key in _places(source):
        text = place[key]
        file, colon, name = text.rpartition(":") if key == "model" else (text, "", "")
        path = (loaded.base or Path.cwd()) / file
        if not path.exists():
            continue  # not a file, or one whose absence is said elsewhere
        if carry and path.is_file():
            shutil.copyfile(path, folder / path.name)
            moved = path.name
        else:
            moved = os.path.relpath(path, folder)
        place[key] = f"{moved}{colon}{name}"
    return source


def _name_made_here(network: Any) -> None:
    """``zoo:NAME`` may be found in the current folder, which is not that of a trial; then the file is named."""
    weights = network.get("weights") if isinstance(network, dict) else None
    if isinstance(weights, str) and weights.startswith("zoo:") and weights[4:] not in trained_names():
        made = MADE_HERE / f"{weights[4:]}.safetensors"
        if made.is_file():
            network["weights"] = str(made.resolve())


def _places(source: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Where a recipe may name a file: container and key."""
    for section in ("teacher", "student"):
        network = source.get(section)
        if isinstance(network, dict):
            if ".py:" in str(network.get("model", "")):
                yield network, "model"
            if isinstance(network.get("weights"), str) and not network["weights"].startswith("zoo:"):
                yield network, "weights"
    for section in ("evaluation", "transfer"):
        content = source.get(section)
        if isinstance(content, dict) and isinstance(content.get("data"), str) and content["data"] not in _NOT_FILES:
            yield content, "data"
    transfer = source.get("transfer")
    sources = transfer.get("sources") if isinstance(transfer, dict) else None
    if isinstance(sources, list):
        for index, name in enumerate(sources):
            if isinstance(name, str) and name not in _NOT_FILES:
                yield sources, index
