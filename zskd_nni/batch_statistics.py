"""What a teacher's BatchNorm layers remember of its training images, and how far a batch of images is from it.

Every BatchNorm keeps the mean and the variance of each of its channels over the training. They are part of the
teacher's weights, and say more about its data than its answers do: images whose own statistics are alike look, to each
layer, like training images as a crowd (DeepInversion: Yin et al., CVPR 2020, 1912.08795, section 3.2, equation 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zskd_nni.losses import statistics_distance


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The layers of a network that keep running statistics, in definition order; there may be none."""
    return [module for module in model.modules() if _keeps_statistics(module)]


def _keeps_statistics(module: nn.Module) -> TypeGuard[_BatchNorm]:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


@contextmanager
def statistics_distances(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, each pass of a batch through a BatchNorm appends its distance from what the layer remembers.

    The scalars are :func:`zskd_nni.losses.statistics_distance`; their sum is DeepInversion's feature regularisation.
    """
    distances: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert _keeps_statistics(module) and module.running_mean is not None and module.running_var is not None
        distances.append(statistics_distance(inputs[0], module.running_mean, module.running_var))

    hooks = [module.register_forward_pre_hook(note) for module in batch_norms(model)]
    try:
        yield distances
    finally:
        for hook in hooks:
            hook.remove()
