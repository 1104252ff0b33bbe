"""Constants that removed channels leave behind, moved into the biases of the layers that read them.

A removed channel is not always zero where it is removed: a BatchNorm that no mask silences, or a sigmoid, turns the
zeros into a constant. A layer that reads a constant without padding only gains a bias from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.compression.pruning.channel_flow import CONVOLUTIONS
from zskd_nni.models.hooks import hooked

_FLAT = 1e-5  # relative spread below which a channel counts as constant: rounding only


class InputRanges:
    """The smallest and the largest value of each input channel of some layers, over whatever the model is run on.

    Use as a context manager around forward passes.

    Args:
        model: the network.
        names: module paths of convolutions and linear layers.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.model = model
        self.names = names
        self.low: dict[str, Tensor] = {}
        self.high: dict[str, Tensor] = {}

    def __enter__(self) -> InputRanges:
        self._hooks = hooked(self.model, self.names, before=self._note)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _note(self, name: str, x: Tensor) -> None:
        axis = -1 if isinstance(self.model.get_submodule(name), nn.Linear) else 1
        channels = x.detach().movedim(axis, 0).flatten(1)  # (channels, values)
        low, high = channels.amin(1), channels.amax(1)
        self.low[name] = torch.minimum(low, self.low[name]) if name in self.low else low
        self.high[name] = torch.maximum(high, self.high[name]) if name in self.high else high

    def constants(self, name: str, channels: Tensor) -> Tensor | None:
        """The value of each of some input channels, None where one of them varies.

        Args:
            name: module path.
            channels: positions, ``(K,)``.
        """
        low, high = self.low[name][channels], self.high[name][channels]
        value = (low + high) / 2
        if bool(((high - low) > _FLAT * value.abs().clamp_min(1.0)).any()):
            return None
        return torch.where(value.abs() < 1e-30, torch.zeros_like(value), value)


def bias_of_constants(module: nn.Module, channels: Tensor, values: Tensor) -> Tensor | None:
    """What constant input channels add to each output of a layer.

    Args:
        module: the layer before it is shrunken.
        channels: positions of the constant input channels, ``(K,)``.
        values: their constants, ``(K,)``.

    Returns:
        ``(outputs,)``, or None where it would not be one number an output: a padded convolution sees the constant
        inside the image and zeros around it.
    """
    if isinstance(module, nn.Linear):
        return module.weight[:, channels] @ values
    assert isinstance(module, CONVOLUTIONS)
    padded = module.padding != "valid" if isinstance(module.padding, str) else any(module.padding)
    if padded:
        return None
    extents = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    image = module.weight.new_zeros(1, module.in_channels, *extents)
    image[0, channels] = values.view(-1, *[1] * len(extents)).expand(-1, *extents)
    convolve = functional.conv1d if isinstance(module, nn.Conv1d) else functional.conv2d
    return convolve(image, module.weight, dilation=module.dilation, groups=module.groups).flatten()
