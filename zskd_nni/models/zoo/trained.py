"""Trained teachers that come with the package: weights as safetensors, and where they come from as JSON.

The larger ones do not come with it; ``zskd-nni train-teacher NAME --out teachers`` makes them where recipes find them.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json


def trained_folder() -> Path:
    """Where the shipped weights lie."""
    return Path(str(resources.files("zskd_nni.models.zoo") / "weights"))


# Of the current folder, for teachers that are too large to ship.
MADE_HERE = Path("teachers")


def trained_names() -> list[str]:
    """Names of the shipped teachers, as in ``zoo:NAME``."""
    return sorted(path.stem for path in trained_folder().glob("*.safetensors"))


def trained_weights(name: str) -> Path:
    """The safetensors file of a shipped teacher, or of one that was trained into ``teachers/``.

    Raises:
        UserError: there is none of that name.
    """
    if name in trained_names():
        return trained_folder() / f"{name}.safetensors"
    made = MADE_HERE / f"{name}.safetensors"
    if "/" in name or "\\" in name or not made.is_file():
        raise UserError(
            f"No trained weights {name!r} come with the package; {', '.join(trained_names())} do. Others are made from "
            f"real data by zskd-nni train-teacher NAME --out {MADE_HERE} and found there, in the current folder."
        )
    return made


def provenance(name: str) -> dict[str, Any]:
    """How a shipped teacher was made: network, data, settings, seed, accuracy, versions."""
    return read_json(trained_weights(name).with_suffix(".json"))
