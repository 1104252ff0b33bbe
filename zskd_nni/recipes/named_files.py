"""The files that a recipe names: networks, weights and images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zskd_nni.data.candidates import PROCEDURAL
from zskd_nni.data.datasets import NAMED_SETS

_NOT_FILES = (*NAMED_SETS, *PROCEDURAL)


@dataclass(frozen=True)
class NamedFile:
    """A place in a recipe's plain mapping that names a file or folder.

    Attributes:
        key_path: of the recipe.
        container: the mapping or list that holds the name.
        key: of the name in the container.
    """

    key_path: str
    container: Any
    key: str | int

    @property
    def text(self) -> str:
        """The name as the recipe has it."""
        return str(self.container[self.key])

    @property
    def file(self) -> str:
        """The name without the factory in ``file.py:factory``."""
        return self.text.rpartition(":")[0] if self.key == "model" else self.text

    def path(self, base: Path | None) -> Path:
        """The path from the recipe's folder; from the current one where there is none."""
        return (base or Path.cwd()) / self.file

    def rename(self, file: str) -> None:
        """Name another file in its place."""
        self.container[self.key] = file + self.text[len(self.file) :]


def named_files(source: dict[str, Any]) -> Iterator[NamedFile]:
    """All places of a recipe's plain mapping that may name a file; whether it exists is not looked at."""
    for section in ("teacher", "student"):
        network = source.get(section)
        if isinstance(network, dict):
            if ".py:" in str(network.get("model", "")):
                yield NamedFile(f"{section}.model", network, "model")
            if isinstance(network.get("weights"), str) and not network["weights"].startswith("zoo:"):
                yield NamedFile(f"{section}.weights", network, "weights")
    for section in ("evaluation", "transfer"):
        content = source.get(section)
        if isinstance(content, dict) and _may_be_file(content.get("data")):
            yield NamedFile(f"{section}.data", content, "data")
    transfer = source.get("transfer")
    sources = transfer.get("sources") if isinstance(transfer, dict) else None
    for index, name in enumerate(sources if isinstance(sources, list) else ()):
        if _may_be_file(name):
            yield NamedFile(f"transfer.sources.{index}", sources, index)


def _may_be_file(name: Any) -> bool:
    return isinstance(name, str) and name not in _NOT_FILES
