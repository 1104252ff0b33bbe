"""Constants that removed channels leave behind, moved into the biases of the layers that read them.

A removed channel is not always zero where it is removed: a BatchNorm that no mask silences, or a sigmoid, turns the
zeros into a constant. For a layer that reads a constant without padding it is the same as a bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.compression.pruning.channel_flow import CONVOLUTIONS, is_padded
from zskd_nni.models.hooks import hooked

_FLAT = 1e-5  # relative spread below which a channel counts as constant: rounding only
Range = tuple[Tensor, Tensor]  # the smallest and the largest value of each channel, (C,) both


@contextmanager
def input_ranges(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Range]]:
    """Within the block, the ranges of the input channels of some layers over all forward passes, by module path.

    Args:
        model: the network.
        names: module paths of convolutions and linear layers.
    """
    ranges: dict[str, Range] = {}

    def note(name: str, x: Tensor) -> None:
        axis = -1 if isinstance(model.get_submodule(name), nn.Linear) else 1
        values = x.detach().movedim(axis, 0).flatten(1)  # (channels, values)
        low, high = values.amin(1), values.amax(1)
        known = ranges.get(name, (low, high))
        ranges[name] = torch.minimum(low, known[0]), torch.maximum(high, known[1])

    with hooked(model, names, before=note):
        yield ranges


def constants_in(channels: Range) -> Tensor | None:
    """The value of each of some channels ``(K,)``, None if one of them varies."""
    low, high = channels
    value = (low + high) / 2
    if bool(((high - low) > _FLAT * value.abs().clamp_min(1.0)).any()):
        return None
    return torch.where(value.abs() < 1e-30, torch.zeros_like(value), value)


def bias_of_constants(module: nn.Module, channels: Tensor, values: Tensor) -> Tensor | None:
    """What constant input channels add to each output of a layer.

    Args:
        module: the layer before it is shrunk.
        channels: positions of the constant input channels, ``(K,)``.
        values: their constants, ``(K,)``.

    Returns:
        ``(outputs,)``, or None if it is not one number an output: a padded convolution sees the constant inside the
        image and zeros around it.
    """
    if isinstance(module, nn.Linear):
        return module.weight[:, channels] @ values
    assert isinstance(module, CONVOLUTIONS)
    if is_padded(module.padding):
        return None
    extents = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    image = module.weight.new_zeros(1, module.in_channels, *extents)
    image[0, channels] = values.view(-1, *[1] * len(extents)).expand(-1, *extents)
    convolve = functional.conv1d if isinstance(module, nn.Conv1d) else functional.conv2d
    return convolve(image, module.weight, dilation=module.dilation, groups=module.groups).flatten()
