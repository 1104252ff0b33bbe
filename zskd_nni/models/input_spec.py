"""What a network expects at its input: shape, value range, normalisation."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zskd_nni.runtime.errors import UserError

_BATCH, _VALUES = 1000, 1000 * 3 * 32 * 32  # of images of CIFAR-10's size


def inference_batch(values: int) -> int:
    """How many images of ``values`` numbers each to process at once without gradients: 1,000, fewer of large ones."""
    return max(1, min(_BATCH, _VALUES // values))


@dataclass(frozen=True)
class InputSpec:
    """What a network expects at its input.

    Attributes:
        shape: ``(channels, height, width)``.
        low: smallest value of an image before normalisation.
        high: largest value of an image before normalisation.
        mean: of each channel, or one number for all; the network gets ``(image - mean) / std``.
        std: of each channel, or one number for all.

    Raises:
        ValueError: a size below 1, an empty value range, a standard deviation that is not positive.

    Example:
        >>> spec = InputSpec((3, 32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        >>> spec.normalise(torch.ones(2, 3, 32, 32)).unique().tolist()
        [2.0]
    """

    __pydantic_config__ = {"extra": "forbid"}

    shape: tuple[int, int, int]
    low: float = 0.0
    high: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        # The teacher's fingerprint must not depend on 1 or 1.0, a list or a tuple.
        for name, kind in (("shape", int), ("mean", float), ("std", float)):
            object.__setattr__(self, name, tuple(map(kind, getattr(self, name))))
        for name in ("low", "high"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if min(self.shape) < 1:
            raise ValueError(f"an input shape is (channels, height, width), each at least 1, not {list(self.shape)}")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"the value range must go from low to high, not from {self.low} to {self.high}")
        largest = max(abs(self.low), abs(self.high))
        step = 2.0 ** (max(math.floor(math.log2(largest)), -14) - 10)  # between neighbours in half precision
        if largest > torch.finfo(torch.half).max or step > (self.high - self.low) / 256:
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

    @classmethod
    def from_transforms(cls, transforms: Any, channels: int | None = None) -> InputSpec:
        """The input of a network whose images were prepared by torchvision's transforms.

        Args:
            transforms: a preset (``weights.transforms()``), or a ``Compose`` that ends in a fixed size and has at most
                one ``Normalize``.
            channels: of the images. By default one for each number in ``mean``.

        Raises:
            UserError: the transforms do not fix the size of the images.

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
            if (given := getattr(step, "crop_size", getattr(step, "size", None))) is not None:
                size = [given] if isinstance(given, int) else list(given)
                if len(size) == 1 and name != "Resize":  # Resize to one number keeps the aspect ratio
                    size *= 2
            elif name == "Pad":
                size = []
            elif name == "Grayscale":
                channels = channels or step.num_output_channels
            elif name == "ToDtype":
                high = 1.0 if step.scale else 255.0
            if hasattr(step, "mean") and hasattr(step, "std"):
                mean, std = tuple(step.mean), tuple(step.std)
        if len(size) != 2:
            raise UserError(
                f"{transforms!r} does not fix the height and width of the images, as a crop or a Resize to two numbers "
                "does; write InputSpec((channels, height, width), mean=..., std=...) instead."
            )
        return cls((channels or len(mean), size[0], size[1]), high=high, mean=mean, std=std)

    @property
    def is_normalised(self) -> bool:
        """Whether the network gets anything but the image itself."""
        return (self.mean, self.std) != ((0.0,), (1.0,))

    def normalise(self, images: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` in [low, high] as the network gets them."""
        if not self.is_normalised:
            return images
        mean, std = self.mean_and_std(images)
        return (images - mean) / std

    def denormalise(self, images: Tensor) -> Tensor:
        """The reverse of :meth:`normalise`."""
        if not self.is_normalised:
            return images
        mean, std = self.mean_and_std(images)
        return images * std + mean

    def mean_and_std(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``(1, C or 1, 1, 1)`` each, of the type and on the device of the images."""
        # Cached: a copy from the CPU would make a GPU wait each time. Tracers' tensors must not be kept.
        compute = _mean_and_std if type(images) is Tensor else _mean_and_std.__wrapped__
        return compute(self, images.dtype, images.device)

    def normalised_range(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of each channel as the network gets it, ``(C,)`` each."""
        ends = torch.tensor([self.low, self.high]).view(2, 1, 1, 1).expand(2, self.shape[0], 1, 1)
        low, high = self.normalise(ends).flatten(1).unbind()
        return low, high

    @property
    def inference_batch(self) -> int:
        """How many images to process at once without gradients: 1,000, fewer of large ones."""
        return inference_batch(math.prod(self.shape))

    def inference_batch_on(self, device: torch.device | str) -> int:
        """How many of them a device is fast with: what a CPU computes of a twentieth stays in its caches."""
        return max(1, self.inference_batch // (20 if torch.device(device).type == "cpu" else 1))

    def midpoint(self, count: int = 1) -> Tensor:
        """``(count, C, H, W)`` images whose every value is the middle of the value range: mid-grey."""
        return torch.full((count, *self.shape), (self.low + self.high) / 2)

    def example_input(self, count: int = 2) -> Tensor:
        """``(count, C, H, W)`` mid-grey images as the network gets them, on the CPU; to trace a network with.

        Example:
            >>> InputSpec((3, 32, 32), mean=(0.25,), std=(0.5,)).example_input().shape
            torch.Size([2, 3, 32, 32])
        """
        return self.normalise(self.midpoint(count))

    def uniform_noise(self, count: int, seed: int = 0) -> Tensor:
        """``(count, C, H, W)`` images of uniform noise in [low, high], on the CPU."""
        noise = torch.rand((count, *self.shape), generator=torch.Generator().manual_seed(seed))
        return self.low + (self.high - self.low) * noise


def _single_transforms(transforms: Any) -> Iterator[Any]:
    """The transforms in a (nested) ``Compose`` or ``nn.Sequential``, in order."""
    inner = getattr(transforms, "transforms", transforms)
    if isinstance(inner, list | tuple | torch.nn.Sequential):
        for step in inner:
            yield from _single_transforms(step)
    else:
        yield transforms


@functools.lru_cache(maxsize=64)
def _mean_and_std(spec: InputSpec, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # the next call may need gradients
        mean, std = (torch.tensor(values, dtype=dtype, device=device) for values in (spec.mean, spec.std))
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
