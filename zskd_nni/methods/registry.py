"""Methods by name, from the entry-point group ``zskd_nni.methods``.

A third party's method is a package with an entry point in that group; nothing here needs to change.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from zskd_nni.data.sources import TransferSource
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.validation import build_settings

GROUP = "zskd_nni.methods"


@dataclass(frozen=True)
class TransferRequest:
    """What a recipe asks of a method.

    Attributes:
        size: number of distinct images, for a method with a fixed set.
        batch_size: images in a batch.
        seed: names the random streams.
        folder: for the files of the method.
        options: the method's own keys of the recipe's ``transfer`` section, preset applied and checked.
        label: shown beside the progress.
        quiet: no progress.
        held_out: these images serve for measuring, and must not be among those of the training request.
        reserved: in a training request, how many images are held out; a method with real images leaves them unused.
        root: folder of the data sets, for a method that reads data.
        download: let torchvision fetch missing data sets into ``root``.
        base: folder that relative paths of data start from.
        fit: how the recipe fits real images of another size (``evaluation.fit``); by default as ``fit_shape`` does.
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
    fit: str | None = None

    def set_arguments(self) -> dict[str, Any]:
        """The keyword arguments that functions take which make a fixed set of images in a folder."""
        return {name: getattr(self, name) for name in ("size", "seed", "folder", "label", "quiet")}


class Method(Protocol):
    """The object that an entry point of the group names.

    Attributes:
        name: as in ``transfer.method``.
        presets: names of the presets.

    Optional attributes: ``data_free = False`` for a method that reads real data; if that depends on the options, these
    have it as a property. ``default_preset`` for recipes that name none; else it is ``best``, or the first where there
    is no ``best``. ``ignores_other_keys = True`` allows keys in a recipe that the options do not have.
    """

    name: str
    presets: tuple[str, ...]

    def options(self, preset: str, given: Mapping[str, Any]) -> Any:
        """The preset with the recipe's own keys over it, checked.

        Raises:
            ValueError: an unknown preset or key, or a value outside its range.
        """

    def source(self, teacher: Teacher, request: TransferRequest) -> TransferSource:
        """Make the transfer source, or resume making it."""


def is_data_free(method: Method, options: Any = None) -> bool:
    """Whether a method uses the teacher alone; its options decide if they say so."""
    return bool(getattr(options, "data_free", getattr(method, "data_free", True)))


def default_preset(method: Method) -> str:
    """The preset of a recipe that names none."""
    fallback = "best" if "best" in method.presets else method.presets[0]
    return str(getattr(method, "default_preset", fallback))


def preset_for(method: Method, preset: str, teacher: Teacher) -> str:
    """The preset that stands for ``preset`` with this teacher; see :func:`preset_for_kind`."""
    return preset_for_kind(method, preset, teacher.spec.shape[0])


def preset_for_kind(method: Method, preset: str, channels: int) -> str:
    """The preset that stands for ``preset`` with a kind of teacher.

    A method may have a preset ``NAME-colour`` beside ``NAME``, for teachers of colour images.

    Args:
        method: whose preset it is.
        preset: its name.
        channels: of the teacher's images.
    """
    colour = f"{preset}-colour"
    return colour if colour in method.presets and channels == 3 else preset


def method_names() -> list[str]:
    """Names of all installed methods."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def find_method(name: str) -> Method:
    """The method called ``name``.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    for entry in entry_points(group=GROUP, name=name):
        try:
            return entry.load()
        except Exception as error:  # a third party's package may raise anything
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
    """The images that a student of ``teacher`` is trained on, as a recipe's ``transfer`` section makes them.

    Args:
        teacher: the trained network.
        folder: for the files of the method; the same call again finds them finished, or resumes.
        size: number of distinct images, for a method with a fixed set.
        method: name of an installed method.
        preset: one of the method's presets; its own default where none is named.
        batch_size: images in a batch.
        seed: names the random streams.
        quiet: no progress.
        **options: the method's own keys, put over the preset, such as ``synthesis={"max_steps": 60}``.

    Raises:
        UserError: there is no such method, preset or key, or the folder holds something else.

    Example:
        >>> import tempfile, torch
        >>> from zskd_nni import load_teacher
        >>> teacher = load_teacher("lenet5-digits")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     source = transfer_source(
        ...         teacher, folder, size=16, batch_size=8, quiet=True, synthesis={"max_steps": 2}
        ...     )
        ...     source.batch(0, torch.Generator()).shape
        torch.Size([8, 1, 32, 32])
    """
    found = find_method(method)
    try:
        checked = found.options(preset_for(found, preset or default_preset(found), teacher), options)
    except ValueError as error:
        raise UserError(f"{method}: {error}") from error
    return found.source(teacher, TransferRequest(size, batch_size, seed, Path(folder), checked, quiet=quiet))


class PresetMethod:
    """The part of a method that turns a preset and a recipe's keys into settings.

    Args:
        name: as in ``transfer.method``.
        kind: the settings class of the method's keys.
        presets: plain values of each preset.
    """

    def __init__(self, name: str, kind: type[Any], presets: Mapping[str, Mapping[str, Any]]) -> None:
        self.name, self.presets = name, tuple(presets)
        self._kind, self._values = kind, presets

    def options(self, preset: str, given: Mapping[str, Any]) -> Any:
        """The preset with the recipe's own keys over it, section by section, checked.

        Raises:
            ValueError: an unknown preset or key, or a value outside its range.
        """
        if preset not in self._values:
            raise ValueError(f"preset: {self.name} has {', '.join(self.presets)}, not {preset!r}")
        merged = {**self._values[preset], **given}
        for key, value in given.items():
            if isinstance(value, Mapping) and isinstance(self._values[preset].get(key), Mapping):
                merged[key] = {**self._values[preset][key], **value}
        return build_settings(self._kind, merged)
