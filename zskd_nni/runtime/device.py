"""Copying tensors from the CPU, where they are drawn and read, to the device that computes."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor`` on ``device``, without waiting for the device's unfinished work.

    CUDA stages ordinary memory before the call returns, so that ``tensor`` may be freed at once. Apple's MPS does not
    and is waited for.
    """
    return tensor.to(device, non_blocking=torch.device(device).type != "mps")
