"""Random fields over the image plane, and figures on an empty background."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from zskd_nni.models.input_spec import InputSpec

BLOCK = 250  # figures share their number of corners and cells within a block


class Draw:
    """Random fields over the image plane; every draw comes from one generator."""

    def __init__(self, spec: InputSpec, random: torch.Generator) -> None:
        self.channels, self.height, self.width = spec.shape
        self.random = random
        ys, xs = torch.linspace(-1, 1, self.height), torch.linspace(-1, 1, self.width)
        self.y, self.x = (grid[None, None] for grid in torch.meshgrid(ys, xs, indexing="ij"))

    def between(self, count: int, low: float, high: float, channels: int = 1) -> Tensor:
        """``(count, channels, 1, 1)`` uniform numbers."""
        return low + (high - low) * torch.rand((count, channels, 1, 1), generator=self.random)

    def chance(self, count: int, probability: float) -> Tensor:
        """``(count, 1, 1, 1)`` booleans."""
        return torch.rand((count, 1, 1, 1), generator=self.random) < probability

    def one_of(self, values: tuple[int, ...]) -> int:
        """One of ``values`` by chance."""
        return values[int(torch.randint(len(values), (1,), generator=self.random))]

    def waves(self, count: int, cells: int, channels: int = 1) -> Tensor:
        """``(count, channels, H, W)`` Gaussian noise on a grid of ``cells`` a side, enlarged."""
        coarse = torch.randn((count, channels, cells, cells), generator=self.random)
        return functional.interpolate(coarse, (self.height, self.width), mode="bicubic", align_corners=False)

    def smooth(self, count: int) -> Tensor:
        """``(count, C, H, W)`` in [0, 1]: noise of random coarseness, brightness and contrast."""
        waves = self.waves(count, self.one_of((2, 4, 8, 16)), self.channels)
        return (self.between(count, 0, 1, self.channels) + self.between(count, 0.05, 0.5) * waves).clamp_(0, 1)

    def texture(self, count: int) -> Tensor:
        """``(count, C, H, W)`` noise of random roughness, mean 0 and deviation 1 in each image."""
        total = torch.zeros(count, self.channels, self.height, self.width)
        for cells in (2, 3, 5, 9, 16, 32):
            total += self.between(count, 0, 1) ** 2 * self.waves(count, cells, self.channels)
        total -= total.mean((1, 2, 3), keepdim=True)
        return total / (total.std((1, 2, 3), keepdim=True) + 1e-6)

    def axes(self, count: int) -> tuple[Tensor, Tensor]:
        """Coordinates about a random centre, half of them turned."""
        angle = self.between(count, -math.pi, math.pi) * self.chance(count, 0.5)
        x, y = self.x - self.between(count, -0.3, 0.3), self.y - self.between(count, -0.3, 0.3)
        return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()

    def figure(self, count: int) -> Tensor:
        """``(count, 1, H, W)`` a field that is positive inside one random figure, about its distance to the edge."""
        kind = self.one_of((0, 1, 2, 3, 4))
        if kind == 0:  # a box
            u, v = self.axes(count)
            return torch.minimum(self.between(count, 0.08, 0.95) - u.abs(), self.between(count, 0.08, 0.95) - v.abs())
        if kind == 1:  # an ellipse
            u, v = self.axes(count)
            radius = ((u / self.between(count, 0.1, 0.95)) ** 2 + (v / self.between(count, 0.1, 0.95)) ** 2).sqrt()
            return (1 - radius) * 0.4
        if kind == 2:
            return self.polygon(count, self.x, self.y, (0.2, 0.9))
        waves = self.waves(count, self.one_of((2, 3, 4, 5, 7))) + self.between(count, -0.5, 0.5)
        if kind == 3:  # a blob
            return waves * 0.3
        return self.between(count, 0.02, 0.12) - waves.abs() * 0.3  # a band

    def polygon(self, count: int, x: Tensor, y: Tensor, radius: tuple[float, float] = (0.3, 0.9)) -> Tensor:
        """``(count, 1, H, W)`` positive inside a polygon of three to six sides, in the coordinates ``x`` and ``y``."""
        corners, turn = self.one_of((3, 4, 5, 6)), self.between(count, 0, 2 * math.pi)
        field = torch.full((count, 1, self.height, self.width), math.inf)
        for corner in range(corners):
            angle = turn + 2 * math.pi * (corner + self.between(count, -0.3, 0.3)) / corners
            edge = self.between(count, *radius) - (x * angle.cos() + y * angle.sin())
            field = torch.minimum(field, edge)
        return field

    def shape(self, count: int) -> Tensor:
        """``(count, 1, H, W)`` one to three figures joined or cut out of each other, half mirror-symmetric."""

        def either() -> Tensor:
            return torch.where(self.chance(count, 0.5), self.figure(count), self.figure(count))

        field = either()
        for _ in range(2):
            other, what = either(), self.between(count, 0, 1)
            field = torch.where(what < 0.35, torch.maximum(field, other), field)
            field = torch.where((what >= 0.35) & (what < 0.5), torch.minimum(field, -other), field)
        left = field[..., : (self.width + 1) // 2]
        mirrored = torch.cat([left, left.flip(3)[..., self.width % 2 :]], 3)
        return torch.where(self.chance(count, 0.5), mirrored, field)

    def figures(self, count: int) -> tuple[Tensor, Tensor]:
        """Filled shapes on black, ``(count, C, H, W)`` in [0, 1], and where they are, ``(count, 1, H, W)``."""
        inside = (self.shape(count) * self.between(count, 3, 30) + 0.5).clamp(0, 1)
        fill = self.between(count, 0.1, 1, self.channels) + self.between(count, 0, 0.35) * self.texture(count)
        second = (self.shape(count) * self.between(count, 3, 30) + 0.5).clamp(0, 1) * self.chance(count, 0.5)
        other = self.between(count, 0, 1, self.channels) + self.between(count, 0, 0.2) * self.texture(count)
        images = inside * (fill.clamp(0, 1) * (1 - second) + other.clamp(0, 1) * second)
        return images, (inside > 0.02).float()
