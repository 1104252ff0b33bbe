"""Candidates of arbitrary transfer sets: procedural images, and real ones by name or path.

``noise-uniform``, ``noise-gaussian``, ``structured`` (smooth noise of random coarseness), ``shapes``, ``mixed``,
``leaves`` and ``cutouts`` (:mod:`zskd_nni.data.procedural`) read no image. Everything else is read by
:func:`zskd_nni.data.datasets.load_images`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zskd_nni.data.datasets import NAMED_SETS, LabelledImages, load_images
from zskd_nni.data.procedural import start_images
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import sha256_of_bytes
from zskd_nni.runtime.rng import generator

PROCEDURAL = ("noise-uniform", "noise-gaussian", "structured", "shapes", "mixed", "leaves", "cutouts")
_BLOCK = 1000


@dataclass(frozen=True)
class ImageLocation:
    """Where real images are, and which of them to take.

    Attributes:
        root: folder of named data sets; by default that of the variable ``ZSKD_NNI_DATA``.
        download: let torchvision fetch them there.
        base: the folder that relative paths start from.
        part: ``all`` images, the ``held-out`` tenth (the same for every seed), or the ``other`` nine tenths.
    """

    root: Path | None = None
    download: bool = False
    base: Path | None = None
    part: str = "all"


def procedural_images(kind: str, count: int, spec: InputSpec, random: torch.Generator, deviation: float) -> Tensor:
    """``(count, C, H, W)`` images of a procedural source, in the value range.

    Args:
        kind: one of :data:`PROCEDURAL`.
        count: how many.
        spec: shape and value range.
        random: the generator that everything is drawn from.
        deviation: standard deviation of ``noise-gaussian`` about the middle of the range, as a fraction of the range.
    """
    if kind == "noise-gaussian":
        middle, width = (spec.low + spec.high) / 2, deviation * (spec.high - spec.low)
        noise = torch.randn((count, *spec.shape), generator=random)
        return noise.mul_(width).add_(middle).clamp_(spec.low, spec.high)
    name = {"noise-uniform": "uniform", "structured": "smooth"}.get(kind, kind)
    return start_images(name, count, spec, random)[0]


class Candidates:
    """The candidates of all sources, in blocks. A block depends only on the seed, its source and its place in it.

    Args:
        sources: names of procedural sources, data sets or paths; they take turns.
        spec: shape and value range.
        limit: the most candidates of each procedural source.
        seed: names the random streams. Real images come in an order drawn from it and from the data set's name, or
            the images' content where they have no name.
        where: where the real images are.
        split: of named data sets.
        deviation: of ``noise-gaussian``, as :func:`procedural_images` takes it.

    Attributes:
        blocks: source, number of the first image, and number of images of each block, in order.
        data: fingerprints of the real images, by source.

    Raises:
        UserError: a data set cannot be read.
    """

    def __init__(
        self,
        sources: Sequence[str],
        spec: InputSpec,
        limit: int,
        seed: int,
        where: ImageLocation | None = None,
        *,
        split: str = "train",
        deviation: float = 0.25,
    ) -> None:
        self.spec, self.seed, self.split, self.deviation = spec, seed, split, deviation
        self._real: dict[str, LabelledImages] = {}
        self.data: dict[str, str] = {}
        by_source: list[list[tuple[str, int, int]]] = []
        for name in dict.fromkeys(sources):
            count = limit
            if name not in PROCEDURAL:
                images = self._read(name, where or ImageLocation())
                self.data[name] = sha256_of_bytes(images.images.contiguous().numpy().tobytes())
                # By content: a file's path depends on the working folder, and the set must not.
                stream = name if name in NAMED_SETS else self.data[name]
                order = torch.randperm(len(images), generator=generator(seed, "order of candidates", stream))
                self._real[name] = images.subset(order)
                count = len(images)
            by_source.append([(name, first, min(_BLOCK, count - first)) for first in range(0, count, _BLOCK)])
        longest = max(map(len, by_source))
        self.blocks = [blocks[turn] for turn in range(longest) for blocks in by_source if turn < len(blocks)]

    def _read(self, name: str, where: ImageLocation) -> LabelledImages:
        path = name if name in NAMED_SETS or where.base is None else str(where.base / name)
        if name not in NAMED_SETS and not Path(path).exists():
            raise UserError(
                f"ATS has no source {name!r}: name one of {', '.join((*PROCEDURAL, *NAMED_SETS))}, an .npz "
                "file or a folder of images."
            )
        images = load_images(path, self.split, where.root, where.download)
        if where.part == "all":
            return images
        order = torch.randperm(len(images), generator=generator(0, "held-out candidates", len(images)))
        held_out = -(-len(images) // 10)
        if held_out == len(images):
            raise UserError(f"The source {name} has too few images ({held_out}) to hold some out.")
        return images.subset(order[:held_out] if where.part == "held-out" else order[held_out:])

    def __len__(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    @property
    def total(self) -> int:
        """How many images there are in all blocks."""
        return sum(count for _, _, count in self.blocks)

    def block(self, number: int) -> Tensor:
        """Images ``(n, C, H, W)`` of a block, in the value range."""
        name, first, count = self.blocks[number]
        if name in self._real:
            return self._real[name].pixels(slice(first, first + count), self.spec)
        random = generator(self.seed, "candidates", name, first)
        return procedural_images(name, count, self.spec, random, self.deviation)
