"""The image generator: its layers, and the range of its images."""

from __future__ import annotations

import pytest
import torch
from helpers import SMALL, random

from zskd_nni.methods.zskt.generator import ImageGenerator, new_generator
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.runtime.errors import UserError

SHIFTED = InputSpec((1, 8, 8), mean=(0.3,), std=(0.5,))


def test_the_generator_has_the_papers_layers() -> None:
    network = ImageGenerator(InputSpec((3, 32, 32)))
    kinds = [type(layer).__name__ for layer in network.layers]
    assert kinds == [
        *("Linear", "Unflatten", "BatchNorm2d", "Upsample", "Conv2d", "BatchNorm2d", "LeakyReLU"),
        *("Upsample", "Conv2d", "BatchNorm2d", "LeakyReLU", "Conv2d", "BatchNorm2d"),
    ]
    weights = {name: tuple(value.shape) for name, value in network.named_parameters()}
    # Linear 100 -> 8192, BN 128, conv 128 -> 128, BN 128, conv 128 -> 64, BN 64, conv 64 -> 3, BN 3 with weights
    assert list(weights.values()) == [
        *((8192, 100), (8192,), (128,), (128,), (128, 128, 3, 3), (128,), (128,), (128,)),
        *((64, 128, 3, 3), (64,), (64,), (64,), (3, 64, 3, 3), (3,), (3,), (3,)),
    ]
    assert network.layers[6].negative_slope == network.layers[10].negative_slope == 0.2
    assert network.layers[3].mode == "nearest"
    sizes = []
    z = torch.randn(2, 100)
    for layer in network.layers:
        z = layer(z)
        sizes.append(tuple(z.shape[1:]))
    assert [sizes[1], sizes[3], sizes[7], sizes[12]] == [(128, 8, 8), (128, 16, 16), (128, 32, 32), (3, 32, 32)]
    # the output is normalised by its last layer and has no bound
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.square().mean((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    assert float(z.detach().abs().max()) > 2


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 16), (2, 64, 32)])
def test_other_sizes_and_channels(shape: tuple[int, int, int]) -> None:
    assert ImageGenerator(InputSpec(shape), 7)(torch.randn(3, 7)).shape == (3, *shape)


def test_a_narrower_generator() -> None:
    network = new_generator(SMALL, 0, width=8, latent=5)
    shapes = [tuple(value.shape) for value in network.parameters() if value.ndim > 1]
    assert shapes == [(32, 5), (8, 8, 3, 3), (4, 8, 3, 3), (1, 4, 3, 3)]


def test_sides_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"multiples of 4, not 30 x 32"):
        ImageGenerator(InputSpec((1, 30, 32)))


def test_images_may_start_in_the_middle_of_the_value_range() -> None:
    spec = InputSpec((3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))
    with torch.no_grad():
        x = new_generator(spec, 0, output_range="input")(torch.randn(64, 100, generator=random(0)))
    pixels = x * torch.tensor(spec.std).view(3, 1, 1) + torch.tensor(spec.mean).view(3, 1, 1)
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.full((3,), 0.5), atol=1e-3, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.full((3,), 12**-0.5), atol=1e-3, rtol=0)


def test_a_bounded_generator_stays_in_the_value_range() -> None:
    make = new_generator(SHIFTED, 0, output_range="bounded", width=8, latent=5)
    with torch.no_grad():
        make.layers[-1].weight.fill_(50)
        pixels = make(torch.randn((64, 5), generator=random(0))) * 0.5 + 0.3
    assert float(pixels.min()) == pytest.approx(0, abs=1e-5)
    assert float(pixels.max()) == pytest.approx(1, abs=1e-5)
    assert 0.4 < float(pixels.mean()) < 0.6


def test_the_seed_names_the_weights_and_nothing_else_moves() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (new_generator(SMALL, seed, width=8).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])
