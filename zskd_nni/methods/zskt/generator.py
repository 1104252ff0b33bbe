"""The generator of ZSKT's released code: a network that turns random latents into images.

The paper (Micaelli & Storkey 2019, 1905.09768v3, section 3.1) only counts its layers; the layers themselves are the
code's (polo5/ZeroShotKnowledgeTransfer). Sizes other than 32x32, classes as input and the bounded range are ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from zskd_nni.models.input_spec import InputSpec
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.rng import derive_seed

LAYOUT = torch.channels_last  # on the CPU convolutions are half as fast again with the channels last in memory
RANGES = ("unit", "input", "bounded")


class ImageGenerator(nn.Module):
    """A linear layer, two enlargements, three convolutions, BatchNorm at the end.

    Args:
        spec: shape of the images; height and width are multiples of 4.
        latent: size of z.
        width: channels.
        classes: number K of classes whose one-hot code follows z; 0 for a generator without classes.
        bounded: the images stay in the value range.

    Shape:
        input ``(N, latent + classes)``, output ``(N, C, H, W)`` in the teacher's normalised space.

    Raises:
        UserError: the image's sides are not multiples of 4.
    """

    def __init__(
        self, spec: InputSpec, latent: int = 100, width: int = 128, classes: int = 0, bounded: bool = False
    ) -> None:
        super().__init__()
        channels, rows, columns = spec.shape
        if rows % 4 or columns % 4:
            raise UserError(
                f"The generator makes images whose sides are multiples of 4, not {rows} x {columns}; pad the "
                "network's input, or use another method."
            )
        small = (rows // 4, columns // 4)
        self.layers = nn.Sequential(
            nn.Linear(latent + classes, width * small[0] * small[1]),
            nn.Unflatten(1, (width, *small)),  # (N, 128, H/4, W/4)
            nn.BatchNorm2d(width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1),  # (N, 128, H/2, W/2)
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width // 2, 3, padding=1),  # (N, 64, H, W)
            nn.BatchNorm2d(width // 2),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width // 2, channels, 3, padding=1),  # (N, C, H, W)
            nn.BatchNorm2d(channels),  # with weights of its own; no tanh
        )
        self.bounded = bounded
        low, high = spec.normalised_range()
        # Of each channel's value range, (C, 1, 1).
        self.middle = nn.Buffer(((low + high) / 2).view(-1, 1, 1), persistent=False)
        self.half_range = nn.Buffer(((high - low) / 2).view(-1, 1, 1), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` of latents followed by one-hot classes, ``(N, latent + classes)``."""
        images = self.layers(z)
        return self.middle + self.half_range * images.tanh() if self.bounded else images


def new_generator(
    spec: InputSpec, seed: int, *, latent: int = 100, width: int = 128, classes: int = 0, output_range: str = "unit"
) -> ImageGenerator:
    """A new generator in training mode; its weights are drawn from a random stream of their own.

    Args:
        spec: of the images.
        seed: names the random stream.
        latent: size of z.
        width: channels.
        classes: number K of classes; 0 for none.
        output_range: at first the images have mean 0 and deviation 1 in normalised space (``unit``) or fill the value
            range (``input``); or they never leave it (``bounded``).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "generator"))
        network = ImageGenerator(spec, latent, width, classes, output_range == "bounded").train()
    network = network.to(memory_format=LAYOUT)
    if output_range == "input":
        last = network.layers[-1]
        assert isinstance(last, nn.BatchNorm2d)
        low, high = spec.normalised_range()
        with torch.no_grad():
            last.bias.copy_((low + high) / 2)
            last.weight.copy_((high - low) / math.sqrt(12))  # the deviation of uniform noise over the range
    return network
