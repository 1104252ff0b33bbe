"""Recipes of a search's trials, and of its result, with paths that are valid from their folder."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from zskd_nni.models.zoo.trained import LOCAL_TEACHERS, trained_names
from zskd_nni.recipes.key_paths import get_at
from zskd_nni.recipes.load import LoadedRecipe
from zskd_nni.recipes.named_files import NamedFile, named_files
from zskd_nni.recipes.search_space import corners, with_parameters
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import fingerprint_of, make_folder, sha256_of_bytes, sha256_of_file, write_atomic

FILES = "files"


def relocated(loaded: LoadedRecipe, folder: Path, copy_files: bool = False, under: str = "") -> dict[str, Any]:
    """A recipe's plain mapping for a file in ``folder``, without its ``search`` section.

    Args:
        loaded: the recipe.
        folder: the file's folder.
        copy_files: copy the files that the recipe names into ``folder / "files"``, so that the folder can be moved to
            another machine.
        under: change only paths at or below this key path; all where empty.

    Raises:
        UserError: a folder is to be copied, or a file cannot be read.
    """
    source = _trial_source(loaded)
    for named in _existing_files(source, loaded.base):
        if not under or f"{named.key_path}.".startswith(f"{under}."):
            path = named.path(loaded.base)
            named.rename(_copied(named.key_path, path, folder) if copy_files else os.path.relpath(path, folder))
    return source


def relocated_choices(
    loaded: LoadedRecipe, space: Mapping[str, Any], folder: Path, copy_files: bool = False
) -> list[dict[str, Any]]:
    """The choices of a search space that name files, for recipes in ``folder``.

    Args:
        loaded: the recipe that is searched.
        space: the search space.
        folder: of the trials' recipe.
        copy_files: as of :func:`relocated`.

    Returns:
        For each such choice ``path`` in the recipe, ``value`` in the space, and ``moved``, the value in ``folder``.

    Raises:
        UserError: as of :func:`relocated`.
    """
    choices = []
    for path, value, chosen in _with_each_choice(loaded, space):
        moved = get_at(relocated(chosen, folder, copy_files, path), path)
        if moved != value:
            choices.append({"path": path, "value": value, "moved": moved})
    return choices


def file_hashes(loaded: LoadedRecipe, space: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the files and folders that a recipe and the choices of a search space name, by their names there."""
    found = {named.text: path for named, path in _files_of_search(loaded, space)}
    hashes = {path: _content_hash(path) for path in set(found.values())}
    return {text: hashes[path] for text, path in sorted(found.items())}


def check_transfer_files(loaded: LoadedRecipe) -> None:
    """Refuse a recipe whose transfer images are neither a known set nor an existing file or folder.

    Raises:
        UserError: the file or folder is missing.
    """
    for named in named_files(_trial_source(loaded)):
        if named.key_path.startswith("transfer.") and not os.path.exists(named.path(loaded.base)):
            raise UserError(
                f"{named.key_path}: there is no file or folder {named.text}, and no data set has this name."
            )


def check_files_can_be_copied(loaded: LoadedRecipe, space: Mapping[str, Any]) -> None:
    """Refuse early what :func:`relocated` and :func:`relocated_choices` cannot copy.

    Raises:
        UserError: the recipe, or a choice of the space, names a folder.
    """
    for named, path in _files_of_search(loaded, space):
        _require_file(named.key_path, path)


def _files_of_search(loaded: LoadedRecipe, space: Mapping[str, Any]) -> Iterator[tuple[NamedFile, Path]]:
    """The existing files that a recipe and the choices of a space name, and their paths."""
    for recipe in (loaded, *(chosen for *_, chosen in _with_each_choice(loaded, space))):
        for named in _existing_files(_trial_source(recipe), recipe.base):
            yield named, named.path(recipe.base)


def _with_each_choice(loaded: LoadedRecipe, space: Mapping[str, Any]) -> Iterator[tuple[str, Any, LoadedRecipe]]:
    """Key path, value, and the recipe with this value, for all values of a space that can be tried."""
    for path, value, flat in corners(space):
        source = with_parameters(loaded.source, flat)
        yield path, value, replace(loaded, source=with_parameters(source, {path: value}))


def _trial_source(loaded: LoadedRecipe) -> dict[str, Any]:
    """The recipe's plain mapping without ``search``; ``zoo:NAME`` of weights that lie in the current folder is a path.

    A trial has another current folder.
    """
    source = copy.deepcopy(loaded.source)
    source.pop("search", None)
    for section in ("teacher", "student"):
        network = source.get(section) or {}
        weights = network.get("weights") or ""
        if weights.startswith("zoo:") and weights[4:] not in trained_names():
            here = LOCAL_TEACHERS / f"{weights[4:]}.safetensors"
            if here.is_file():
                network["weights"] = str(here.resolve())
    return source


def _existing_files(source: dict[str, Any], base: Path | None) -> list[NamedFile]:
    return [named for named in named_files(source) if os.path.exists(named.path(base))]


def _content_hash(path: Path) -> str:
    if path.is_file():
        return sha256_of_file(path)
    inside = sorted(entry for entry in path.rglob("*") if entry.is_file())
    return fingerprint_of([[entry.relative_to(path).as_posix(), sha256_of_file(entry)] for entry in inside])


def _require_file(key_path: str, path: Path) -> None:
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no file"
        raise UserError(
            f"{key_path}: {path} is {kind}, and a search copies only files to other machines; name a file, such "
            "as an .npz of the images."
        )


def _copied(key_path: str, path: Path, folder: Path) -> str:
    """Copy a file into ``folder / "files"``; returns its path from ``folder``.

    A hash in the name keeps two files of one name apart. Python can import the name, and NNI copies it without warning.
    """
    _require_file(key_path, path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{key_path}: {path} cannot be read ({error.strerror}).") from error
    stem = re.sub(r"\W", "_", path.stem, flags=re.ASCII)
    name = f"{FILES}/_{stem}_{sha256_of_bytes(content)[:12]}{path.suffix}"
    if not (folder / name).exists():
        write_atomic(make_folder(folder / FILES) / Path(name).name, content)
    return name
