"""The files that a recipe names: networks, weights and images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zskd_nni.data.candidates import PROCEDURAL
from zskd_nni.data.datasets import NAMED_SETS
from zskd_nni.models.foreign import ONNX_SUFFIX
from zskd_nni.recipes.key_paths import section_of

_TRANSFORMERS = "transformers:"
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
        """The name without the factory in ``file.py:factory``, and without ``transformers:``."""
        if self.key == "model" and ".py:" in self.text:
            return self.text.rpartition(":")[0]
        return self.text.removeprefix(_TRANSFORMERS)

    def path(self, base: Path | None) -> Path:
        """The path from the recipe's folder; from the current one where there is none."""
        return (base or Path.cwd()) / self.file

    def rename(self, file: str) -> None:
        """Name another file in its place."""
        before, after = self.text.split(self.file, 1)
        self.container[self.key] = before + file + after


def named_files(source: dict[str, Any]) -> Iterator[NamedFile]:
    """All places of a recipe's plain mapping that may name a file; whether it exists is not looked at."""
    for name in ("teacher", "student"):
        network = section_of(source, name)
        if _is_own_network(str(network.get("model", ""))):
            yield NamedFile(f"{name}.model", network, "model")
        if isinstance(weights := network.get("weights"), str) and not weights.startswith("zoo:"):
            yield NamedFile(f"{name}.weights", network, "weights")
    for name in ("evaluation", "transfer"):
        content = section_of(source, name)
        if _may_be_file(content.get("data")):
            yield NamedFile(f"{name}.data", content, "data")
    if isinstance(section_of(source, "transfer").get("also"), str):
        yield NamedFile("transfer.also", section_of(source, "transfer"), "also")
    sources = section_of(source, "transfer").get("sources")
    for index, text in enumerate(sources if isinstance(sources, list) else ()):
        if _may_be_file(text):
            yield NamedFile(f"transfer.sources.{index}", sources, index)


def _is_own_network(model: str) -> bool:
    folder = model.startswith(_TRANSFORMERS) and model != _TRANSFORMERS
    return ".py:" in model or model.lower().endswith(ONNX_SUFFIX) or folder


def _may_be_file(name: Any) -> bool:
    return isinstance(name, str) and name not in _NOT_FILES
