"""The device that computes: copying tensors to it, and whether it is fast in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor`` on ``device``, without waiting for the device's unfinished work.

    CUDA stages ordinary memory before the call returns, so that ``tensor`` may be freed at once. Apple's MPS does not
    and is waited for.
    """
    return tensor.to(device, non_blocking=torch.device(device).type != "mps")


def has_fast_bfloat16(device: torch.device | str) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices in hardware, so that autocast is faster than float32.

    Among processors these are the ones with AMX or AVX512-BF16; elsewhere oneDNN emulates bfloat16.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
