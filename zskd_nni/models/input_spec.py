"""What a network expects at its input: shape, value range, normalisation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zskd_nni.runtime.errors import UserError


def images_at_once(numbers: int) -> int:
    """Of images of so many numbers where no gradients are needed: 1,000, fewer of large ones."""
    return max(1, min(1000, 1000 * 3 * 32 * 32 // numbers))


def _step_of_halves(value: float) -> float:
    """How far the numbers of half precision are apart at ``value``, which is not negative."""
    if value > torch.finfo(torch.half).max:
        return math.inf
    return math.ldexp(1.0, max(math.frexp(value)[1] - 1, -14) - 10)


def _on_device(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    first, second = (torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1) for values in (mean, std))
    return first, second


@dataclass(frozen=True)
class InputSpec:
    """What the network expects at its input.

    Attributes:
        shape: ``(channels, height, width)``.
        low, high: range of an image's values before normalisation.
        mean, std: per channel (or one value for all); the network sees ``(image - mean) / std``.

    Raises:
        ValueError: a size below 1, an empty range, a standard deviation that is not positive.
    """

    __pydantic_config__ = {"extra": "forbid"}

    shape: tuple[int, int, int]
    low: float = 0.0
    high: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        # What is told apart by a fingerprint must not depend on whether somebody wrote 1 or 1.0, a list or a tuple.
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "high", float(self.high))
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if min(self.shape) < 1:
            raise ValueError(f"an input shape is (channels, height, width), each at least 1, not {list(self.shape)}")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"the value range must go from low to high, not from {self.low} to {self.high}")
        coarsest = _step_of_halves(max(abs(self.low), abs(self.high)))
        if coarsest > (self.high - self.low) / 256:
            raise ValueError(
                f"the value range from {self.low:g} to {self.high:g} has fewer than 256 steps in half precision, in "
                "which transfer sets are stored; give it in other units, such as low 0 and high 1, with mean and std "
                "in them"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.shape[0]) or not all(map(math.isfinite, values)):
                raise ValueError(
                    f"{name} is a list of one number, or of one for each of the {self.shape[0]} channels, "
                    f"not {list(values)}"
                )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {list(self.std)}")

    def normalise(self, images: Tensor) -> Tensor:
        """``(N, C, H, W)`` images in [low, high] to what the network sees."""
        if self.mean == (0.0,) and self.std == (1.0,):
            return images
        mean, std = self.mean_and_std(images)
        return (images - mean) / std

    def denormalise(self, images: Tensor) -> Tensor:
        """The reverse of :meth:`normalise`."""
        if self.mean == (0.0,) and self.std == (1.0,):
            return images
        mean, std = self.mean_and_std(images)
        return images * std + mean

    def mean_and_std(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``(1, C or 1, 1, 1)`` each, of the type and on the device of these images."""
        if not images.is_cuda or type(images) is not Tensor:
            return _on_device(self.mean, self.std, images.dtype, images.device)
        # Kept there: a copy from the CPU would make it wait for the device each time.
        key = (self, images.dtype, images.device)
        if key not in _KEPT:
            with torch.inference_mode(False):
                _KEPT[key] = _on_device(self.mean, self.std, images.dtype, images.device)
        return _KEPT[key]

    def ends(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of each channel as the network sees it, ``(C,)`` each."""
        ends = torch.tensor([self.low, self.high]).view(2, 1, 1, 1).expand(2, self.shape[0], 1, 1)
        low, high = self.normalise(ends).flatten(1).unbind()
        return low, high

    @property
    def measuring_batch(self) -> int:
        """How many images are answered at once where no gradients are needed: 1,000, fewer of large ones."""
        return images_at_once(math.prod(self.shape))

    def midpoint(self, count: int = 1) -> Tensor:
        """``(count, C, H, W)`` images whose every value is the middle of the value range: mid-grey."""
        return torch.full((count, *self.shape), (self.low + self.high) / 2)

    def example_input(self, count: int = 2) -> Tensor:
        """``(count, C, H, W)`` mid-grey images as the network sees them, on the CPU; to trace a network with.

        Example:
            >>> InputSpec((3, 32, 32), mean=(0.25,), std=(0.5,)).example_input().shape
            torch.Size([2, 3, 32, 32])
        """
        return self.normalise(self.midpoint(count))

    @classmethod
    def from_transforms(cls, transforms: Any, channels: int | None = None) -> InputSpec:
        """The input of a network whose images were prepared by torchvision's transforms.

        Args:
            transforms: a preset (``weights.transforms()``), or a ``Compose`` that ends in a fixed size and has at most
                one ``Normalize``.
            channels: of the images. By default one for each number in ``mean``.

        Raises:
            UserError: the size or the normalisation cannot be read from the transforms.

        Example:
            >>> from torchvision.models import ResNet18_Weights
            >>> InputSpec.from_transforms(ResNet18_Weights.DEFAULT.transforms()).shape
            (3, 224, 224)
        """
        size: list[int] = []
        mean: tuple[float, ...] = (0.0,)
        std: tuple[float, ...] = (1.0,)
        high = 1.0
        for step in _single_transforms(transforms):
            name = type(step).__name__
            found = getattr(step, "crop_size", getattr(step, "size", None))
            if found is not None:
                size = [found] if isinstance(found, int) else list(found)
                if len(size) == 1 and name != "Resize":  # Resize to one number keeps the aspect ratio
                    size *= 2
            elif name in ("Pad", "FiveCrop", "TenCrop"):
                size = []
            if name == "Grayscale" and channels is None:
                channels = getattr(step, "num_output_channels", None)
            if name == "ToDtype":
                high = 1.0 if step.scale else 255.0
            if hasattr(step, "mean") and hasattr(step, "std"):
                mean, std = tuple(map(float, step.mean)), tuple(map(float, step.std))
        if len(size) != 2:
            raise UserError(
                f"{transforms!r} does not say the height and width of the images it gives (a crop, or a Resize to two "
                "numbers); write InputSpec((channels, height, width), mean=..., std=...) instead."
            )
        return cls((channels or len(mean), size[0], size[1]), high=high, mean=mean, std=std)


def _single_transforms(transforms: Any) -> Iterator[Any]:
    """The transforms in a (nested) ``Compose`` or ``nn.Sequential``, in order."""
    inner = getattr(transforms, "transforms", transforms)
    if isinstance(inner, list | tuple | torch.nn.Sequential):
        for step in inner:
            yield from _single_transforms(step)
    else:
        yield transforms


_KEPT: dict[tuple[InputSpec, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}
