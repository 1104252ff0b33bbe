"""The distance between the BatchNorm statistics of images and the running statistics of the teacher's training.

A BatchNorm keeps a running mean and variance of each channel. They are part of the teacher's weights, and they carry
more information about its training images than its logits do. Images with the same statistics look, to each layer, like
a batch of training images (DeepInversion: Yin et al., CVPR 2020, 1912.08795, section 3.2, equation 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeGuard

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zskd_nni.models.hooks import hooked
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

    def merged(self, other: Moments | None) -> Moments:
        """Those of both groups of images together; all images have the same number of positions."""
        if other is None or not other.count:
            return self
        count = self.count + other.count
        mean = (self.count * self.mean + other.count * other.mean) / count
        spreads = [m.count * (m.variance + (m.mean - mean).square()) for m in (self, other)]
        return Moments(count, mean, (spreads[0] + spreads[1]) / count)


class StatisticsTracker:
    """Compares the images of each pass, together with retired ones, with the teacher's running statistics.

    Images finish one by one. Where no new image takes the place, the batch shrinks, and the last image alone would be
    asked to have the statistics of all training images. Retired images therefore stay in the sums as they last were.

    Args:
        model: the teacher's network, in ``eval()``.

    Attributes:
        retired: how many images are retired.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = {path: module for path, module in model.named_modules() if _keeps_statistics(module)}
        self.retired = 0
        self._of_retired: list[Moments] = []  # one entry a call of a layer
        self._inputs: list[Tensor] = []  # of the layers in the last pass

    @contextmanager
    def distances(self) -> Iterator[list[Tensor]]:
        """Within the block, each BatchNorm that a batch passes appends its distance, a scalar."""
        found: list[Tensor] = []
        self._inputs = []

        def compare(path: str, features: Tensor) -> None:
            module = self.layers[path]
            assert module.running_mean is not None and module.running_var is not None
            retired = self._of_retired[len(found)] if self._of_retired else None
            moments = Moments.of(features).merged(retired)
            found.append(statistics_distance(moments.mean, moments.variance, module.running_mean, module.running_var))
            self._inputs.append(features.detach())

        with hooked(self.model, self.layers, before=compare):
            yield found

    def retire(self, rows: Tensor) -> None:
        """The images at these rows of the last pass are finished, and no new ones take their places."""
        known: list[Moments | None] = [*self._of_retired] or [None] * len(self._inputs)
        self._of_retired = [Moments.of(f[rows]).merged(m) for f, m in zip(self._inputs, known, strict=True)]
        self.retired += len(rows)


def statistics_distances(model: nn.Module) -> AbstractContextManager[list[Tensor]]:
    """Within the block, each BatchNorm that a batch passes appends its distance from its running statistics, a scalar.

    The scalars are :func:`zskd_nni.training.losses.statistics_distance`; their sum is DeepInversion's feature
    regularisation.
    """
    return StatisticsTracker(model).distances()
