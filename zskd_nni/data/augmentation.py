"""Random augmentation on the device, each image of a batch by its own draw.

torchvision's random transforms apply one draw to a whole batch. Here every image has its own, in one ``grid_sample``.
The numbers are drawn on the CPU, so that every device sees the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from zskd_nni.runtime.device import to_device
from zskd_nni.runtime.validation import Fraction, check_bounds, one_of, within

_Uniform = Callable[..., Tensor]  # (low, high, *shape) -> one draw for each image, on the CPU


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes of an image. The default changes nothing.

    Attributes:
        rotation: degrees, drawn from ``[-rotation, rotation]``.
        translation: fraction of the side, drawn from ``[-translation, translation]`` along each axis.
        scale: smallest and largest zoom factor, drawn uniformly in its logarithm.
        shear: degrees, drawn from ``[-shear, shear]``.
        flip: probability of a left-right mirror image, in [0, 1].
        contrast: the image is multiplied by a factor from ``[1 - contrast, 1 + contrast]``, about its low value.
        noise: standard deviation of Gaussian pixel noise, as a fraction of the value range.
        erase: largest side of a square set to a random grey, as a fraction of the image's side.
        border: padding beyond the edge: ``zeros`` (the low value) or ``border`` (the edge pixels).
        cutmix: probability that a rectangle of the image, a quarter to three quarters of each side, is taken from
            another image of the batch (Yun et al., ICCV 2019, 1905.04899).
        mixup: probability that the image is averaged with another one of the batch, by a weight drawn uniformly
            (Zhang et al., ICLR 2018, 1710.09412). ``cutmix`` and ``mixup`` are at most 1 together. A mixed image has
            no label of its own: only a teacher can label it.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> Augmentation(rotation=15.0, translation=0.1).flip
        0.0
    """

    __pydantic_config__ = {"extra": "forbid"}

    rotation: Annotated[float, within(0, 180)] = 0.0
    translation: Fraction = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: Annotated[float, within(0, 60)] = 0.0
    flip: Fraction = 0.0
    contrast: Fraction = 0.0
    noise: Fraction = 0.0
    erase: Fraction = 0.0
    border: Annotated[str, one_of("zeros", "border")] = "zeros"
    cutmix: Fraction = 0.0
    mixup: Fraction = 0.0

    def __post_init__(self) -> None:
        check_bounds(self)
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ValueError(f"scale is the smallest and the largest factor, both positive, not {list(self.scale)}")
        if self.cutmix + self.mixup > 1:
            raise ValueError(f"cutmix and mixup must be at most 1 together, not {self.cutmix + self.mixup}")

    @property
    def moves(self) -> bool:
        """Whether any image is resampled."""
        return bool(self.rotation or self.translation or self.shear or self.flip or self.scale != (1.0, 1.0))

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return bool(self.cutmix or self.mixup)

    @property
    def unmixed(self) -> Augmentation:
        """The same for labelled images, which are not mixed with each other."""
        return replace(self, cutmix=0.0, mixup=0.0)

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return bool(self.moves or self.contrast or self.noise or self.erase or self.mixes)


def augment(
    images: Tensor, settings: Augmentation, generator: torch.Generator, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Augment images, each by its own draw.

    Args:
        images: ``(N, C, H, W)`` in ``[low, high]``. An image that exceeds the range, as a generator's may, keeps
            its own.
        settings: ranges of the changes.
        generator: everything is drawn from it.
        low: the value range's lower end.
        high: its upper end.

    Returns:
        Images of the same shape and range.

    Example:
        >>> images = torch.zeros(2, 1, 4, 4)
        >>> augment(images, Augmentation(rotation=10, noise=0.1), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 4, 4])
    """
    if not settings.active:
        return images
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand((count, *shape), generator=generator)

    result = images
    if settings.moves:
        result = _move(images - low, settings, uniform) + low
    if settings.contrast:
        factor = uniform(1 - settings.contrast, 1 + settings.contrast, 1, 1, 1)
        result = low + (result - low) * to_device(factor, images.device)
    if settings.noise:
        noise = torch.randn(images.shape, generator=generator)
        result = result + to_device(noise, images.device) * (settings.noise * (high - low))
    if settings.erase:
        result = _erase(result, settings.erase, uniform, low, high)
    if settings.contrast or settings.noise:
        extremes = (1, 2, 3)
        smallest, largest = images.amin(extremes, True), images.amax(extremes, True)
        result = result.clamp(smallest.clamp_max(low), largest.clamp_min(high))
    return _mix(result, settings, uniform, generator) if settings.mixes else result


def _move(images: Tensor, settings: Augmentation, uniform: _Uniform) -> Tensor:
    angle = uniform(-settings.rotation, settings.rotation) * (math.pi / 180)
    shear = uniform(-settings.shear, settings.shear) * (math.pi / 180)
    zoom = uniform(math.log(settings.scale[0]), math.log(settings.scale[1])).exp()
    mirror = 1 - 2 * (uniform(0, 1) < settings.flip).float()
    shift = 2 * uniform(-settings.translation, settings.translation, 2)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    aspect = images.shape[2] / images.shape[3]  # the grid's units are half a height and half a width
    theta = torch.stack(
        [
            torch.stack([mirror * cos, (cos * shear.tan() - sin) * aspect, shift[:, 0]], 1),
            torch.stack([mirror * sin / aspect, sin * shear.tan() + cos, shift[:, 1]], 1),
        ],
        1,
    )  # (N, 2, 3)
    grid = functional.affine_grid(to_device(theta, images.device), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode=settings.border, align_corners=False)


def _erase(images: Tensor, largest: float, uniform: _Uniform, low: float, high: float) -> Tensor:
    height, width = images.shape[2:]
    side = uniform(0, largest, 1)  # (N, 1)
    top, left = uniform(0, 1, 1), uniform(0, 1, 1)
    rows = (torch.arange(height) + 0.5) / height
    columns = (torch.arange(width) + 0.5) / width
    shorter = min(height, width)
    tall, wide = height / shorter, width / shorter
    inside = ((rows - top).abs() * tall < side / 2)[:, None, :, None]
    inside = inside & ((columns - left).abs() * wide < side / 2)[:, None, None, :]
    return torch.where(to_device(inside, images.device), to_device(uniform(low, high, 1, 1, 1), images.device), images)


def _mix(images: Tensor, settings: Augmentation, uniform: _Uniform, generator: torch.Generator) -> Tensor:
    """Each image alone, with a rectangle of another one, or averaged with it."""
    height, width = images.shape[2:]
    others = images[to_device(torch.randperm(len(images), generator=generator), images.device)]
    chance = uniform(0, 1, 1, 1, 1)
    tall, wide = uniform(0.25, 0.75, 1), uniform(0.25, 0.75, 1)  # (N, 1), of the image's sides
    middle, centre = uniform(0, 1, 1), uniform(0, 1, 1)
    rows = ((torch.arange(height) + 0.5) / height - middle).abs() < tall / 2
    columns = ((torch.arange(width) + 0.5) / width - centre).abs() < wide / 2
    rectangle = (rows[:, None, :, None] & columns[:, None, None, :]).float()
    averaged = uniform(0, 1, 1, 1, 1)
    cut, mixed = chance < settings.cutmix, chance < settings.cutmix + settings.mixup
    share = torch.where(cut, rectangle, torch.where(mixed, averaged, torch.zeros(()))).expand(-1, 1, height, width)
    return torch.lerp(images, others, to_device(share.to(images.dtype), images.device))
