"""What a search hands to its trials and leaves behind: recipes whose paths hold in the folder they lie in."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zskd_nni.data.candidates import PROCEDURAL
from zskd_nni.data.datasets import NAMED_SETS
from zskd_nni.models.zoo.trained import MADE_HERE, trained_names
from zskd_nni.recipes.key_paths import get_at
from zskd_nni.recipes.load import LoadedRecipe
from zskd_nni.recipes.search_space import corners, with_parameters
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import fingerprint_of, make_folder, sha256_of_bytes, sha256_of_file, write_atomic

FILES = "files"
_NOT_FILES = (*NAMED_SETS, *PROCEDURAL)


def relocated(loaded: LoadedRecipe, folder: Path, carry: bool = False, under: str = "") -> dict[str, Any]:
    """A recipe's plain mapping for a file in ``folder``, without its ``search`` section.

    Args:
        loaded: the recipe.
        folder: where it shall hold.
        carry: copy the files it names into ``folder / "files"``, so that the folder can go to another machine.
        under: leave alone what does not stand at or below this key path.

    Raises:
        UserError: what is to be carried is a folder, or cannot be read.
    """
    source = _plain(loaded)
    for where, place, key, path in _named(source, loaded.base):
        if under and not f"{where}.".startswith(f"{under}."):
            continue
        moved = f"{FILES}/{_carried(where, path, folder / FILES)}" if carry else os.path.relpath(path, folder)
        _, colon, name = place[key].rpartition(":") if key == "model" else ("", "", "")
        place[key] = f"{moved}{colon}{name}"
    return source


def relocated_choices(
    loaded: LoadedRecipe, space: Mapping[str, Any], folder: Path, carry: bool = False
) -> list[dict[str, Any]]:
    """What a search space offers that names files, beside what it becomes in ``folder``.

    Args:
        loaded: the recipe that is searched.
        space: the search space.
        folder: where trials look.
        carry: copy the files, as :func:`relocated` does.

    Returns:
        ``path`` in the recipe, ``value`` as the space has it and ``moved`` of every such choice.

    Raises:
        UserError: as :func:`relocated`.
    """
    choices = []
    for path, value, chosen in _choices(loaded, space):
        moved = get_at(relocated(chosen, folder, carry, path), path)
        if moved != value:
            choices.append({"path": path, "value": value, "moved": moved})
    return choices


def named_files(loaded: LoadedRecipe, space: Mapping[str, Any], known: Sequence[str] = ()) -> dict[str, str]:
    """The files and folders that a recipe and the choices of a search space name, and hashes of their content.

    Args:
        loaded: the recipe that is searched.
        space: the search space.
        known: sections of the recipe whose own files are left out.

    Returns:
        Hashes by what the recipe calls the files.
    """
    own = [entry for entry in _named(_plain(loaded), loaded.base) if entry[0].split(".")[0] not in known]
    passed = {path for *_, path in _named(_plain(loaded), loaded.base)} - {path for *_, path in own}
    brought = [entry for *_, chosen in _choices(loaded, space) for entry in _named(_plain(chosen), chosen.base)]
    found = {str(place[key]): path for _, place, key, path in (*own, *brought) if path not in passed}
    hashes = {path: _content_hash(path) for path in set(found.values())}
    return {text: hashes[path] for text, path in sorted(found.items())}


def check_there(loaded: LoadedRecipe) -> None:
    """Refuse a recipe whose transfer images are neither a known set nor something that is there.

    Raises:
        UserError: the file or folder is missing.
    """
    source = _plain(loaded)
    there = {where for where, *_ in _named(source, loaded.base)}
    for where, place, key in _places(source):
        if where.startswith("transfer.") and where not in there:
            raise UserError(f"{where}: there is no file or folder {place[key]}, and no set of images is called so.")


def _content_hash(path: Path) -> str:
    if path.is_file():
        return sha256_of_file(path)
    inside = sorted(entry for entry in path.rglob("*") if entry.is_file())
    return fingerprint_of([[entry.relative_to(path).as_posix(), sha256_of_file(entry)] for entry in inside])


def check_carried(loaded: LoadedRecipe, space: Mapping[str, Any]) -> None:
    """Refuse beforehand what :func:`relocated` and :func:`relocated_choices` cannot carry.

    Raises:
        UserError: a recipe, or a choice of the space, names a folder or something else that is no file.
    """
    for chosen in (loaded, *(chosen for *_, chosen in _choices(loaded, space))):
        for where, _, _, path in _named(_plain(chosen), chosen.base):
            _require_file(where, path)


def _choices(loaded: LoadedRecipe, space: Mapping[str, Any]) -> Iterator[tuple[str, Any, LoadedRecipe]]:
    """What can be tried of a space: key path, value, and the recipe with it but without what is nested in it."""
    for path, value, flat in corners(space):
        source = with_parameters(loaded.source, flat)
        yield path, value, replace(loaded, source=with_parameters(source, {path: value}))


def _require_file(where: str, path: Path) -> None:
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no file"
        raise UserError(
            f"{where}: {path} is {what}, and a search hands nothing but files to other machines; name a file, such as "
            "an .npz of the images."
        )


def _carried(where: str, path: Path, folder: Path) -> str:
    """Copy a file into ``folder``; returns the name it has there.

    The name has a part of the content's hash, so that two files of one name do not overwrite each other. It is one
    that Python can import and that NNI carries without a warning.
    """
    _require_file(where, path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{where}: {path} cannot be read ({error.strerror}).") from error
    stem = re.sub(r"\W", "_", path.stem, flags=re.ASCII)
    name = f"{'_' if stem[:1].isdigit() else ''}{stem}_{sha256_of_bytes(content)[:12]}{path.suffix}"
    if not (folder / name).exists():
        write_atomic(make_folder(folder) / name, content)
    return name


def _plain(loaded: LoadedRecipe) -> dict[str, Any]:
    source = copy.deepcopy(loaded.source)
    source.pop("search", None)
    for section in ("teacher", "student"):
        _name_made_here(source.get(section))
    return source


def _name_made_here(network: Any) -> None:
    """``zoo:NAME`` may be found in the current folder, which is not that of a trial; then the file is named."""
    weights = network.get("weights") if isinstance(network, dict) else None
    if isinstance(weights, str) and weights.startswith("zoo:") and weights[4:] not in trained_names():
        made = MADE_HERE / f"{weights[4:]}.safetensors"
        if made.is_file():
            network["weights"] = str(made.resolve())


def _named(source: dict[str, Any], base: Path | None) -> Iterator[tuple[str, Any, Any, Path]]:
    """What a recipe names and is there: key path, container, key, path on this machine."""
    for where, place, key in _places(source):
        text = place[key]
        path = (base or Path.cwd()) / (text.rpartition(":")[0] if key == "model" else text)
        if path.exists():  # else it is not a file, or one whose absence is said elsewhere
            yield where, place, key, path


def _places(source: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Where a recipe may name a file: key path, container and key."""
    for section in ("teacher", "student"):
        network = source.get(section)
        if isinstance(network, dict):
            if ".py:" in str(network.get("model", "")):
                yield f"{section}.model", network, "model"
            if isinstance(network.get("weights"), str) and not network["weights"].startswith("zoo:"):
                yield f"{section}.weights", network, "weights"
    for section in ("evaluation", "transfer"):
        content = source.get(section)
        if isinstance(content, dict) and isinstance(content.get("data"), str) and content["data"] not in _NOT_FILES:
            yield f"{section}.data", content, "data"
    transfer = source.get("transfer")
    sources = transfer.get("sources") if isinstance(transfer, dict) else None
    if isinstance(sources, list):
        for index, name in enumerate(sources):
            if isinstance(name, str) and name not in _NOT_FILES:
                yield f"transfer.sources.{index}", sources, index
