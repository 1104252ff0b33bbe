"""An arbitrary transfer set in its folder: ``set.json`` and ``set.safetensors``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import fingerprint_of, read_json, sha256_of_file
from zskd_nni.runtime.tensors import load_tensors

DESCRIPTION, IMAGES = "set.json", "set.safetensors"
FORMAT = "zskd_nni transfer set 1"


class TransferSet:
    """A finished set in its folder: ``set.json`` and ``set.safetensors``.

    Attributes:
        folder: where it is.
        description: the content of ``set.json``: identity, counts by class, checksum.
    """

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.folder, self.description = folder, description

    @classmethod
    def open(cls, folder: str | Path) -> TransferSet:
        """Read a set's description.

        Raises:
            UserError: there is none, or it is not sound.
        """
        path = Path(folder) / DESCRIPTION
        if not path.is_file():
            raise UserError(f"{folder} is not a transfer set: it has no {DESCRIPTION}.")
        description = read_json(path)
        sound = isinstance(description, dict) and description.get("format") == FORMAT
        if (
            not sound
            or not isinstance(description.get("identity"), dict)
            or not isinstance(description.get("sha256"), str)
            or not isinstance(description.get("counts"), dict)
            or description.get("fingerprint") != fingerprint_of(description["identity"])
        ):
            raise UserError(f"{path} is not sound. Remove the folder to make the set anew.")
        return cls(Path(folder), description)

    @property
    def fingerprint(self) -> str:
        """Of what this set is."""
        return self.description["fingerprint"]

    @property
    def counts(self) -> dict[str, list[int]]:
        """By class: ``candidates`` seen, and images ``own``, ``repeats`` and ``nearest`` in the set."""
        return self.description["counts"]

    def whole(self) -> bool:
        """Whether the images are there, as their checksum says."""
        path = self.folder / IMAGES
        return path.is_file() and sha256_of_file(path) == self.description["sha256"]

    def images(self) -> Tensor:
        """All images ``(N, C, H, W)``, float16.

        Raises:
            UserError: they are missing or damaged.
        """
        if not self.whole():
            raise UserError(f"{self.folder / IMAGES} is not as written; run the same command again to make it anew.")
        # A copy: what was read is a window on the file, which somebody may damage meanwhile.
        return load_tensors(self.folder / IMAGES)[0]["images"].clone()
