"""Dead leaves: procedural images that fill the frame.

Natural images are well described as objects that occlude each other, of all sizes, each with a colour and a texture of
its own (Matheron 1968; Lee, Mumford & Huang, IJCV 2001). What is drawn here: a textured ground, and on it 2 to 13
figures, each of which covers what lies below it. Sizes are drawn so that small figures outnumber large ones. Each
figure is filled with a colour between grey and saturated, a texture with a 1 / f^a spectrum and a linear shade, and has
an edge of random softness. No image is involved.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zskd_nni.data.figures import BLOCK, Draw
from zskd_nni.models.input_spec import InputSpec

_FIGURES = (2, 13)  # the fewest and the most on one image
_TEXTURE = 0.25  # largest deviation of a texture
_SHADE = 0.4  # largest difference that a shade makes from the middle to an edge
_BANK_BYTES = 16 * 2**20  # of the textures that the images of a call share
_BANK = (16, 512)  # the fewest and the most of them


def dead_leaves(count: int, spec: InputSpec, random: torch.Generator) -> Tensor:
    """Draw ``count`` images of occluding figures.

    Args:
        count: how many.
        spec: shape, with any number of channels, and value range.
        random: everything is drawn from it.

    Returns:
        ``(count, C, H, W)`` float32 in the value range.

    Example:
        >>> images = dead_leaves(4, InputSpec((3, 32, 32)), torch.Generator().manual_seed(0))
        >>> images.shape, bool(images.min() >= 0), bool(images.max() <= 1)
        (torch.Size([4, 3, 32, 32]), True, True)
    """
    draw = _Leaves(spec, random, count)
    blocks = [draw.images(min(BLOCK, count - first)) for first in range(0, count, BLOCK)]
    unit = torch.cat(blocks) if blocks else torch.zeros(0, *spec.shape)
    return unit.mul_(spec.high - spec.low).add_(spec.low)


def spectral_noise(
    count: int, shape: tuple[int, int, int], random: torch.Generator, exponents: tuple[float, float] = (0.6, 2.2)
) -> Tensor:
    """Noise whose amplitude falls with the spatial frequency f as 1 / f^a, one exponent ``a`` an image.

    Args:
        count: how many.
        shape: ``(C, H, W)``; the channels of an image share a random part of their noise.
        random: everything is drawn from it.
        exponents: the smallest and the largest ``a``; natural images lie near 1.

    Returns:
        ``(count, C, H, W)``, mean 0 and deviation 1 in each image.
    """
    channels, height, width = shape
    rows = torch.fft.fftfreq(height)[:, None] * height
    columns = torch.fft.rfftfreq(width)[None] * width
    frequency = (rows**2 + columns**2).sqrt()
    frequency[0, 0] = 1.0
    exponent = exponents[0] + (exponents[1] - exponents[0]) * torch.rand(count, 1, 1, 1, generator=random)
    amplitude = frequency**-exponent
    amplitude[..., 0, 0] = 0.0  # the mean
    shared = torch.rand(count, 1, 1, 1, generator=random)
    common = torch.randn(count, 1, height, width, generator=random)
    own = torch.randn(count, channels, height, width, generator=random)
    noise = torch.fft.irfft2(
        torch.fft.rfft2(common * shared.sqrt() + own * (1 - shared).sqrt()) * amplitude, s=(height, width)
    )
    return noise / (noise.std((1, 2, 3), keepdim=True, correction=0) + 1e-6)


class _Leaves(Draw):
    """Figures of any size at any place, and what they are filled with."""

    def __init__(self, spec: InputSpec, random: torch.Generator, count: int) -> None:
        super().__init__(spec, random)
        fewest, most = _BANK
        textures = _BANK_BYTES // (4 * math.prod(spec.shape))
        self.textures = spectral_noise(min(most, max(fewest, min(textures, count))), spec.shape, random)

    def images(self, count: int) -> Tensor:
        """``(count, C, H, W)`` in [0, 1]."""
        fewest, most = _FIGURES
        images = self.fill(count)
        # Those with the most figures come first, so that no figure is drawn in vain; the order is mixed at the end.
        figures = torch.randint(fewest, most + 1, (count,), generator=self.random).sort(descending=True).values
        for number in range(most):
            left = int((figures > number).sum())
            if not left:
                break
            field = self.leaf(left)
            if number % 3 == 0:  # some are joined, some are cut out of each other
                other, what = self.leaf(left), self.between(left, 0, 1)
                field = torch.where(what < 0.3, torch.maximum(field, other), field)
                field = torch.where(what > 0.85, torch.minimum(field, -other), field)
            cover = (field * self.between(left, 3, max(4, self.height)) + 0.5).clamp_(0, 1)
            images[:left].lerp_(self.fill(left), cover.expand(-1, self.channels, -1, -1))
        return images[torch.randperm(count, generator=self.random)]

    def fill(self, count: int) -> Tensor:
        """``(count, C, H, W)`` in [0, 1]: a colour, a texture and a shade."""
        colour = torch.lerp(
            self.between(count, 0, 1), self.between(count, 0, 1, self.channels), self.between(count, 0, 1)
        )
        chosen = torch.randint(len(self.textures), (count,), generator=self.random)
        moved = [int(torch.randint(side, (1,), generator=self.random)) for side in (self.height, self.width)]
        texture = self.textures[chosen].roll(moved, (2, 3))  # periodic, as all that an inverse FFT makes
        angle = self.between(count, -math.pi, math.pi)
        shade = (self.x * angle.cos() + self.y * angle.sin()) * self.between(count, 0, _SHADE)
        return texture.mul_(self.between(count, 0, _TEXTURE)).add_(colour).add_(shade).clamp_(0, 1)

    def leaf(self, count: int) -> Tensor:
        """``(count, 1, H, W)`` positive inside one figure of any size, about its distance to the edge."""
        size = 0.15 + 0.85 * self.between(count, 0, 1) ** 2
        angle = self.between(count, -math.pi, math.pi)
        x, y = self.x - self.between(count, -1, 1), self.y - self.between(count, -1, 1)
        u, v = (x * angle.cos() + y * angle.sin()) / size, (y * angle.cos() - x * angle.sin()) / size
        kind = self.one_of((0, 1, 2, 3, 4))
        if kind == 0:  # a box
            field = torch.minimum(self.between(count, 0.3, 1) - u.abs(), self.between(count, 0.3, 1) - v.abs())
        elif kind == 1:  # an ellipse
            radius = ((u / self.between(count, 0.3, 1)) ** 2 + (v / self.between(count, 0.3, 1)) ** 2).sqrt()
            field = (1 - radius) * 0.5
        elif kind == 2:
            field = self.polygon(count, u, v)
        elif kind == 3:  # a blob: a circle with a wavy edge
            around, edge = torch.atan2(v, u), torch.full_like(u, 0.6)
            for waves in (2, 3, 5):
                phase = waves * around + self.between(count, 0, 2 * math.pi)
                edge = edge + self.between(count, 0, 0.18) * phase.cos()
            field = edge - (u * u + v * v).sqrt()
        else:  # a bent band
            bend = (u * self.between(count, 1, 4) + self.between(count, 0, 2 * math.pi)).sin()
            field = self.between(count, 0.05, 0.3) - (v + self.between(count, 0, 0.4) * bend).abs()
            field = torch.minimum(field, 1.2 - u.abs())
        return field * size
