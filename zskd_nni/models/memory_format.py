"""Channels-last memory, where a network works with it: up to twice as fast on a CPU.

A network that flattens its features by ``x.view(len(x), -1)`` does not work with it, because such a view needs channels
first. It gets its images in that format instead. A network that changes its input in place (``x.sub_(0.5)``) gets
copies of the images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zskd_nni.models.hooks import evaluating


def use_channels_last(model: nn.Module, images: Tensor) -> nn.Module:
    """Convert a network's weights to channels last, in place, if it still runs then; returns it.

    Args:
        model: its training mode and running statistics stay as they are.
        images: ``(N, C, H, W)`` as the network gets them, on its device.
    """
    model.to(memory_format=torch.channels_last)
    probe = images.clone(memory_format=torch.channels_last)
    version = probe._version
    try:
        with evaluating(model), torch.no_grad():
            model(probe)
    except RuntimeError as error:
        if "view size is not compatible" in str(error):
            model.to(memory_format=torch.contiguous_format)
            _add_pre_hook(model, _channels_first)
    except Exception:  # any other error is reported where the network is used
        pass
    if probe._version != version:
        _add_pre_hook(model, copied_images)
    return model


def _add_pre_hook(model: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]) -> None:
    if hook not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(hook)


def copied_images(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook: the network gets copies of its input tensors, and may change them."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)


def _channels_first(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.contiguous() if isinstance(value, Tensor) else value for value in inputs)
