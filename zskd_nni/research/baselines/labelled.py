"""Batches of labelled images, and a few of each class."""

from __future__ import annotations

import torch
from torch import Tensor

from zskd_nni.data.datasets import LabelledImages
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.rng import generator


class LabelledBatches:
    """Batches of a labelled set, in a fresh order every epoch, as a stored transfer set has them.

    Args:
        data: images and labels.
        spec: the network's input.
        batch_size: images in a batch; a smaller set gives all its images.
        seed: names the orders.
    """

    def __init__(self, data: LabelledImages, spec: InputSpec, batch_size: int, seed: int) -> None:
        self.data, self.spec, self.seed = data, spec, seed
        self.batch_size = min(batch_size, len(data))
        self._per_epoch = len(data) // self.batch_size
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images ``(batch_size, C, H, W)`` in the value range and labels ``(batch_size,)`` of a step."""
        epoch, position = divmod(step, self._per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, torch.randperm(len(self.data), generator=generator(self.seed, "order", epoch)))
        index = self._order[1][position * self.batch_size : (position + 1) * self.batch_size]
        return self.data.pixels(index, self.spec), self.data.labels[index]


def few_of_each(data: LabelledImages, count: int, classes: int, seed: int) -> LabelledImages:
    """``count`` images of each class, drawn by the seed; of a smaller number the first of a larger one's.

    Raises:
        UserError: a class has fewer.
    """
    order = torch.randperm(len(data), generator=generator(seed, "few", len(data)))
    labels = data.labels[order]
    chosen = []
    for k in range(classes):
        found = order[labels == k][:count]
        if len(found) < count:
            raise UserError(f"{data.name} has {len(found)} images of class {k}, not {count}.")
        chosen.append(found)
    return data.subset(torch.cat(chosen))
