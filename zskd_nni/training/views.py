"""Views: augmented images with the teacher's answers, which may be shown to the student several times.

The teacher is often the larger part of a distillation step. Where each view is shown ``repeats`` times, its answers
are computed once and kept on disk. Views are made in blocks: all of a block are shown, then again in another order, and
then the next block takes their place. So memory and disk do not grow with the number of steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from zskd_nni.runtime.rng import generator

BLOCK = 100
"""Batches in a block."""


@dataclass(frozen=True)
class Views:
    """A batch as the student sees it.

    Attributes:
        images: augmented, ``(N, C, H, W)`` in the teacher's value range.
        logits: the teacher's, ``(N, K)``.
        hidden: outputs of the teacher's matched layers, each ``(N, ...)``.
        whole: images of the whole batch, of which these may be one process's part.
    """

    images: Tensor
    logits: Tensor
    hidden: tuple[Tensor, ...]
    whole: int


MakeViews = Callable[[int, torch.Generator], Views]


class RepeatedViews:
    """Gives each batch of views several times, from disk after the first time.

    What step gets which batch depends on the step alone. A batch that is not on disk, as after a resume, is made again,
    and is the same to the bit.

    Args:
        make: makes a batch from its number and a generator, from which alone it draws.
        repeats: how often each batch is shown.
        seed: names the random streams.
        block: batches in a block.

    Example:
        >>> def make(number, random):
        ...     return Views(torch.full((1, 1), float(number)), torch.zeros(1, 2), (), 1)
        >>> views = RepeatedViews(make, repeats=2, seed=0, block=3)
        >>> [int(views.batch(step).images) for step in range(3)]
        [0, 1, 2]
        >>> sorted(int(views.batch(step).images) for step in range(3, 6))
        [0, 1, 2]
    """

    def __init__(self, make: MakeViews, repeats: int, seed: int, block: int = BLOCK) -> None:
        self.make, self.repeats, self.seed, self.block = make, repeats, seed, block
        self._folder = tempfile.TemporaryDirectory(prefix="zskd-nni-views-")
        self._block_on_disk = -1

    def number(self, step: int) -> int:
        """The batch that is shown at a step (from 0)."""
        block, within = divmod(step, self.block * self.repeats)
        showing, position = divmod(within, self.block)
        if showing:
            order = torch.randperm(self.block, generator=generator(self.seed, "views", block, showing))
            position = int(order[position])
        return block * self.block + position

    def batch(self, step: int) -> Views:
        """The views of a step, from disk if they are there."""
        number = self.number(step)
        if number // self.block != self._block_on_disk:
            self._block_on_disk = number // self.block
            for file in Path(self._folder.name).iterdir():
                file.unlink()
        file = Path(self._folder.name) / f"{number}.safetensors"
        if file.exists():
            return _load(file)
        made = self.make(number, generator(self.seed, "view", number))
        # As they come from disk, where the memory format is lost: sums over another one round differently.
        hidden = tuple(value.contiguous() for value in made.hidden)
        views = Views(made.images.contiguous(), made.logits.contiguous(), hidden, made.whole)
        _save(views, file)
        return views


def _save(views: Views, file: Path) -> None:
    hidden = {f"hidden.{index}": value for index, value in enumerate(views.hidden)}
    tensors = {"images": views.images, "logits": views.logits, **hidden}
    save_file(tensors, file, {"whole": str(views.whole), "device": str(views.images.device)})


def _load(file: Path) -> Views:
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
        tensors = {name: content.get_tensor(name).to(metadata["device"]) for name in content.keys()}  # noqa: SIM118
    hidden = tuple(tensors[f"hidden.{index}"] for index in range(len(tensors) - 2))
    return Views(tensors["images"], tensors["logits"], hidden, int(metadata["whole"]))
