"""What an image is before its first step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from zskd_nni.inputs import InputSpec


def start_images(kind: str, count: int, spec: InputSpec, random: torch.Generator) -> Tensor:
    """``(count, C, H, W)`` images in the value range; ``kind`` as in the settings' ``start``."""
    unit = _uniform(count, spec, random) if kind == "uniform" else _smooth(count, spec, random)
    return unit.mul_(spec.high - spec.low).add_(spec.low)


def _uniform(count: int, spec: InputSpec, random: torch.Generator) -> Tensor:
    return torch.rand((count, *spec.shape), generator=random)


def _smooth(count: int, spec: InputSpec, random: torch.Generator) -> Tensor:
    """Noise drawn on a coarse grid of 2 to 16 cells a side and enlarged, with random brightness and contrast."""
    channels, height, width = spec.shape
    cells = torch.randint(2, 17, (count,), generator=random)
    contrast = torch.rand((count, 1, 1, 1), generator=random)
    brightness = torch.rand((count, 1, 1, 1), generator=random)
    images = torch.empty(count, channels, height, width)
    for size in range(2, 17):
        chosen = (cells == size).nonzero().flatten()
        coarse = torch.rand((len(chosen), channels, size, size), generator=random)
        if len(chosen):
            images[chosen] = functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return ((images - 0.5) * contrast * 2 + brightness).clamp_(0, 1)
