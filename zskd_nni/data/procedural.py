"""Procedural images by name: starts of data impressions, arbitrary transfer sets, controls.

- ``uniform``: the noise of ZSKD's paper.
- ``black``: the lowest value everywhere. Such starts differ only by their targets, and a part of the image that no
  target needs stays empty.
- ``smooth``: noise of random coarseness, brightness and contrast.
- ``shapes``: random figures on an empty background (:mod:`zskd_nni.data.figures`). The background may be held during
  synthesis, as most of the background is black in a set of centred objects.
- ``mixed``: ``shapes`` or ``smooth``, by chance.
- ``leaves``: occluding figures that fill the frame (:mod:`zskd_nni.data.dead_leaves`).
- ``cutouts``: one figure on an empty background, filled with ``leaves``: an object with parts and textures of its own.

No image is read for any of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from zskd_nni.data.dead_leaves import dead_leaves
from zskd_nni.data.figures import BLOCK, Draw
from zskd_nni.models.input_spec import InputSpec

KINDS = ("uniform", "black", "smooth", "shapes", "mixed", "leaves", "cutouts")
_GAIN = (0.6, 1.6)  # brightness of the leaves of a cutout


def start_images(
    kind: str, count: int, spec: InputSpec, random: torch.Generator, hold: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Draw procedural images.

    Args:
        kind: one of :data:`KINDS`.
        count: how many.
        spec: shape and value range.
        random: everything is drawn from it.
        hold: probability that the background of ``shapes`` and ``cutouts`` is held, in [0, 1].

    Returns:
        ``(count, C, H, W)`` images in the value range, and ``(count, 1, H, W)`` which pixels may change, 1 or 0;
        None where all may.
    """
    if kind == "leaves":
        return dead_leaves(count, spec, random), None
    draw = Draw(spec, random)
    free: Tensor | None = None
    if kind == "uniform":
        unit = torch.rand((count, *spec.shape), generator=random)
    elif kind == "black":
        unit = torch.zeros(count, *spec.shape)
    elif kind == "smooth":
        unit = torch.cat([draw.smooth(size) for size in _blocks(count)])
    else:
        parts = [_cutouts(size, draw, spec) if kind == "cutouts" else draw.figures(size) for size in _blocks(count)]
        unit, free = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        held = draw.chance(count, hold)
        if kind == "mixed":
            plain = torch.cat([draw.smooth(size) for size in _blocks(count)])
            chosen = draw.chance(count, 0.5)
            unit, held = torch.where(chosen, unit, plain), held & chosen
        free = torch.where(held, free, torch.ones_like(free))
    return unit.mul_(spec.high - spec.low).add_(spec.low), free


def _cutouts(count: int, draw: Draw, spec: InputSpec) -> tuple[Tensor, Tensor]:
    """Dead leaves cut to a shape on black, ``(count, C, H, W)`` in [0, 1], and where they are, ``(count, 1, H, W)``."""
    leaves = dead_leaves(count, replace(spec, low=0.0, high=1.0), draw.random)
    inside = (draw.shape(count) * draw.between(count, 3, 30) + 0.5).clamp(0, 1)
    return inside * (leaves * draw.between(count, *_GAIN)).clamp(0, 1), (inside > 0.02).float()


def _blocks(count: int) -> list[int]:
    return [min(BLOCK, count - first) for first in range(0, count, BLOCK)]
