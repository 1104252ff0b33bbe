"""Trained teachers that come with the package: weights as safetensors, and how they were trained as JSON.

Larger ones do not come with it. ``zskd-nni train-teacher NAME --out teachers`` trains them where recipes find them.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json

LOCAL_TEACHERS = Path("teachers")  # in the current folder: teachers that are too large to ship


def _shipped_folder() -> Path:
    return Path(str(resources.files("zskd_nni.models.zoo") / "weights"))


def trained_names() -> list[str]:
    """Names of the shipped teachers, as in ``zoo:NAME``."""
    return sorted(path.stem for path in _shipped_folder().glob("*.safetensors"))


def trained_weights(name: str) -> Path:
    """The safetensors file of a shipped teacher, or of one that was trained into ``teachers/``.

    Raises:
        UserError: there is none of that name.
    """
    if name in trained_names():
        return _shipped_folder() / f"{name}.safetensors"
    local = LOCAL_TEACHERS / f"{name}.safetensors"
    if "/" in name or "\\" in name or not local.is_file():
        raise UserError(
            f"No trained weights {name!r} come with the package; {', '.join(trained_names())} do. Others are trained "
            f"on real data by zskd-nni train-teacher NAME --out {LOCAL_TEACHERS}, and looked for there, in the current "
            "folder."
        )
    return local


def training_record(name: str) -> dict[str, Any]:
    """How a trained teacher was made: network, data, settings, seed, accuracy, versions."""
    return read_json(trained_weights(name).with_suffix(".json"))
