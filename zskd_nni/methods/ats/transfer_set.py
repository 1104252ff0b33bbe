"""An arbitrary transfer set in its folder: ``set.json`` describes it, ``set.safetensors`` holds the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import fingerprint_of, read_json, sha256_of_file
from zskd_nni.runtime.tensors import load_tensors

DESCRIPTION, IMAGES = "set.json", "set.safetensors"
FORMAT = "zskd_nni transfer set 1"


class _Description(BaseModel):
    """The content of ``set.json``."""

    model_config = ConfigDict(strict=True)

    format: str
    fingerprint: str
    identity: dict[str, Any]
    sha256: str
    counts: dict[str, list[int]]


class TransferSet:
    """A finished set in its folder.

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
            UserError: there is none, or it is not valid.
        """
        path = Path(folder) / DESCRIPTION
        if not path.is_file():
            raise UserError(f"{folder} is not a transfer set: it has no {DESCRIPTION}.")
        description = read_json(path)
        damaged = UserError(f"{path} is not valid. Remove the folder to make the set again.")
        try:
            found = _Description.model_validate(description)
        except ValidationError as error:
            raise damaged from error
        if found.format != FORMAT or found.fingerprint != fingerprint_of(found.identity):
            raise damaged
        return cls(Path(folder), description)

    @property
    def fingerprint(self) -> str:
        """Of the identity."""
        return self.description["fingerprint"]

    @property
    def counts(self) -> dict[str, list[int]]:
        """By class: ``candidates`` seen, and images ``own``, ``repeats`` and ``nearest`` in the set."""
        return self.description["counts"]

    def is_intact(self) -> bool:
        """Whether the images are there and match their checksum."""
        path = self.folder / IMAGES
        return path.is_file() and sha256_of_file(path) == self.description["sha256"]

    def images(self) -> Tensor:
        """All images ``(N, C, H, W)``, float16.

        Raises:
            UserError: they are missing or damaged.
        """
        if not self.is_intact():
            raise UserError(f"{self.folder / IMAGES} is not as written; run the same command again to make it anew.")
        # A copy: the loaded tensor is a view of the file, which might be damaged later.
        return load_tensors(self.folder / IMAGES)[0]["images"].clone()
