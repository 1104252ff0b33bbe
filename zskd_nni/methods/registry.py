"""Methods by name, from the entry-point group ``zskd_nni.methods``.

A method of somebody else's is a package with an entry point in that group; nothing here needs to change.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, TypeVar

from zskd_nni.data.sources import TransferSource
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.validation import build_settings

GROUP = "zskd_nni.methods"
T = TypeVar("T")


@dataclass(frozen=True)
class TransferRequest:
    """What a recipe asks of a method.

    Attributes:
        size: number of distinct images, where the method holds any.
        batch_size: images in a batch.
        seed: names the random streams.
        folder: where the method may keep what it makes.
        options: the method's own keys of the recipe's ``transfer`` section, preset applied and checked.
        label: shown beside the progress.
        quiet: no progress.
        held_out: these images are to measure on, and must not be among those of the other request.
        reserved: how many images the other request holds out; a method of few real images leaves them over.
        root: where a method that reads data finds it, as evaluation data is found.
        download: let torchvision fetch it there.
        base: the folder that a relative path is meant from.
    """

    size: int
    batch_size: int
    seed: int
    folder: Path
    options: Any
    label: str = "impressions"
    quiet: bool = False
    held_out: bool = False
    root: Path | None = None
    download: bool = False
    base: Path | None = None
    reserved: int = 0


class Method(Protocol):
    """What an entry point of the group gives.

    Attributes:
        name: as in ``transfer.method``.
        presets: names of the presets.

    A method that reads real data says so by an attribute ``data_free = False``; one that does so with some options
    only, by such a property of its options. What a recipe gets that names no preset is ``default_preset`` where the
    method has such an attribute, else ``best`` where there is one, else the first. ``passes_over_other_keys = True``
    lets a recipe hold keys that its options do not have.
    """

    name: str
    presets: tuple[str, ...]

    def options(self, preset: str, given: Mapping[str, Any]) -> Any:
        """The preset with the recipe's own keys put over it, checked.

        Raises:
            ValueError: an unknown preset or key, or a value outside its range.
        """
        ...

    def source(self, teacher: Teacher, request: TransferRequest) -> TransferSource:
        """Make, or take up again, the transfer source."""
        ...


def is_data_free(method: Method, options: Any = None) -> bool:
    """Whether a method works from the teacher alone; its options have the last word."""
    return bool(getattr(options, "data_free", getattr(method, "data_free", True)))


def default_preset(method: Method) -> str:
    """The preset of a method for which none is named."""
    fallback = "best" if "best" in method.presets else method.presets[0]
    return str(getattr(method, "default_preset", fallback))


def method_names() -> list[str]:
    """Names of all installed methods."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def find_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            try:
                return entry.load()
            except Exception as error:  # somebody else's package may raise anything
                raise UserError(f"The method {name!r} ({entry.value}) cannot be loaded: {error}") from error
    names = method_names()
    near = sorted(difflib.get_close_matches(name, names, 2))
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise UserError(f"There is no method {name!r}; there are {', '.join(names)}.{hint}")


def transfer_source(
    teacher: Teacher,
    folder: str | Path,
    size: int = 12000,
    *,
    method: str = "zskd",
    preset: str | None = None,
    batch_size: int = 128,
    seed: int = 0,
    quiet: bool = False,
    **options: Any,
) -> TransferSource:
    """What a student of ``teacher`` learns on, as a recipe's ``transfer`` section makes it.

    Args:
        teacher: the trained network.
        folder: where the method keeps what it makes; the same call again takes up what is there.
        size: number of distinct images, where the method holds any.
        method: name of an installed method.
        preset: one of the method's presets; its own default where none is named.
        batch_size: images in a batch.
        seed: names the random streams.
        quiet: no progress.
        **options: the method's own keys, put over the preset, such as ``synthesis={"max_steps": 60}``.

    Raises:
        UserError: there is no such method, preset or key, or the folder holds something else.
    """
    found = find_method(method)
    try:
        checked = found.options(preset or default_preset(found), options)
    except ValueError as error:
        raise UserError(f"{method}: {error}") from error
    return found.source(teacher, TransferRequest(size, batch_size, seed, Path(folder), checked, quiet=quiet))


def preset_options(
    kind: type[T], method: str, presets: Mapping[str, Mapping[str, Any]], preset: str, given: Mapping[str, Any]
) -> T:
    """A preset with the recipe's own keys put over it, section by section, checked.

    Args:
        kind: the settings class.
        method: its name, for messages.
        presets: plain values of each preset.
        preset: which one.
        given: the recipe's own keys.

    Raises:
        ValueError: an unknown preset or key, or a value outside its range.
    """
    if preset not in presets:
        raise ValueError(f"preset: {method} has {', '.join(presets)}, not {preset!r}")
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in presets[preset].items()}
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            merged[key].update(value)
        else:
            merged[key] = value
    return build_settings(kind, merged)
