"""How a network is called: channels last in memory, where it bears that, and with images of its own.

Channels last in memory, where a network bears it: on a CPU pooling and small convolutions are up to twice as fast.

A network that flattens its features by ``x.view(len(x), -1)`` does not: behind a convolution that has its channels last
such a view is none. It keeps its channels first, and gets its images so. And a network that changes its input in place
(``x.sub_(0.5)``) gets copies: the images are not its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zskd_nni.models.hooks import evaluating


def lay_out(model: nn.Module, probe: Tensor) -> nn.Module:
    """Put a network's weights channels last, in place, if it can still answer; returns it.

    Args:
        model: on the probe's device; its mode and statistics stay as they are.
        probe: ``(N, C, H, W)`` as it is called with.
    """
    model.to(memory_format=torch.channels_last)
    shown = probe.clone(memory_format=torch.channels_last)
    begun_with = shown._version
    try:
        with evaluating(model), torch.no_grad():
            model(shown)
    except RuntimeError as error:
        if "view size is not compatible" in str(error):
            model.to(memory_format=torch.contiguous_format)
            _hook(model, _channels_first)
    except Exception:  # whatever else is wrong is told where it is asked for
        pass
    if shown._version != begun_with:
        _hook(model, copied_images)
    return model


def _hook(model: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]) -> None:
    if hook not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(hook)


def copied_images(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook: the network gets copies of its tensors, and may change them."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)


def _channels_first(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.contiguous() if isinstance(value, Tensor) else value for value in inputs)
