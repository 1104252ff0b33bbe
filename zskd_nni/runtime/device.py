"""Sending what was drawn or read on the CPU to the device that computes."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor`` on ``device``, without waiting for what that is at.

    CUDA copies ordinary memory aside before the call returns, so that ``tensor`` may be let go of at once. Apple's MPS
    does not, and is waited for.
    """
    return tensor.to(device, non_blocking=torch.device(device).type != "mps")
