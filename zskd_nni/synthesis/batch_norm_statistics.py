"""What a teacher's BatchNorm layers remember of its training images, and how far a batch of images is from it.

Every BatchNorm keeps the mean and the variance of each of its channels over the training. They are part of the
teacher's weights, and say more about its data than its answers do: images whose own statistics are alike look, to each
layer, like training images as a crowd (DeepInversion: Yin et al., CVPR 2020, 1912.08795, section 3.2, equation 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zskd_nni.training.losses import channel_moments, statistics_distance


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The layers of a network that keep running statistics, in definition order; there may be none."""
    return [module for module in model.modules() if _keeps_statistics(module)]


def _keeps_statistics(module: nn.Module) -> TypeGuard[_BatchNorm]:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


@dataclass(frozen=True)
class Moments:
    """Mean and biased variance of each channel over some images and all positions.

    Attributes:
        count: images.
        mean: ``(C,)``.
        variance: ``(C,)``.
    """

    count: int
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Those of ``(N, C, ...)`` features."""
        return cls(len(features), *channel_moments(features))

    def joined(self, other: Moments | None) -> Moments:
        """Those of both together, as many positions an image taken for granted."""
        if other is None or not other.count:
            return self
        count = self.count + other.count
        mean = (self.count * self.mean + other.count * other.mean) / count
        spreads = [m.count * (m.variance + (m.mean - mean).square()) for m in (self, other)]
        return Moments(count, mean, (spreads[0] + spreads[1]) / count)


class Crowd:
    """Images in flight and those that have left, as a teacher's BatchNorm layers see them together.

    Images leave one by one, and where no fresh one takes the place the rest would become ever fewer: the last alone
    would be asked to have the statistics of all training images. Those that left therefore stay in the crowd as they
    last were.

    Args:
        model: the teacher's network, in ``eval()``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = batch_norms(model)
        self.left = 0
        self._past: list[Moments] = []  # of those that left, by call of a layer
        self._passing: list[Tensor] = []  # what went into the layers in the last pass

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """As :func:`statistics_distances`, of all images together."""
        distances: list[Tensor] = []
        self._passing = []

        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert _keeps_statistics(module) and module.running_mean is not None and module.running_var is not None
            past = self._past[len(distances)] if self._past else None
            found = Moments.of(inputs[0]).joined(past)
            distances.append(statistics_distance(found.mean, found.variance, module.running_mean, module.running_var))
            self._passing.append(inputs[0].detach())

        hooks = [module.register_forward_pre_hook(note) for module in self.layers]
        try:
            yield distances
        finally:
            for hook in hooks:
                hook.remove()

    def leave(self, rows: Tensor) -> None:
        """The images at these rows of the last pass are not in the next one and have no successor."""
        past: list[Moments | None] = [*self._past] or [None] * len(self._passing)
        self._past = [Moments.of(f[rows]).joined(p) for f, p in zip(self._passing, past, strict=True)]
        self.left += len(rows)


@contextmanager
def statistics_distances(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, each pass of a batch through a BatchNorm appends its distance from what the layer remembers.

    The scalars are :func:`zskd_nni.training.losses.statistics_distance`; their sum is DeepInversion's feature
    regularisation.
    """
    with Crowd(model).watching() as distances:
        yield distances
