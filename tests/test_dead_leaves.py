"""Dead leaves: procedural images that fill the frame."""

from __future__ import annotations

import pytest
import torch

from zskd_nni.data.dead_leaves import dead_leaves, spectral_noise
from zskd_nni.data.procedural import start_images
from zskd_nni.models.input_spec import InputSpec


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (5, 9, 20), (3, 1, 1), (3, 224, 224)])
def test_shapes_and_the_value_range(shape: tuple[int, int, int]) -> None:
    spec = InputSpec(shape, low=-1.0, high=2.0)
    images = dead_leaves(3, spec, random())
    assert images.shape == (3, *shape)
    assert images.dtype == torch.float32
    assert float(images.min()) >= -1.0 and float(images.max()) <= 2.0
    assert torch.isfinite(images).all()


def test_the_same_seed_gives_the_same_images() -> None:
    spec = InputSpec((3, 16, 16))
    torch.manual_seed(1)
    first = dead_leaves(260, spec, random(4))
    torch.manual_seed(2)
    assert torch.equal(first, dead_leaves(260, spec, random(4)))
    assert not torch.equal(first, dead_leaves(260, spec, random(5)))
    assert len({image.numpy().tobytes() for image in first}) == 260
    assert dead_leaves(0, spec, random()).shape == (0, 3, 16, 16)


def test_figures_fill_the_frame_and_occlude() -> None:
    """Unlike figures on black, no image has a large empty part; its edges are steps between two leaves."""
    images = dead_leaves(500, InputSpec((3, 32, 32)), random())
    assert float((images == 0).all(1).float().mean()) < 0.03
    corner, centre = images[..., :8, :8].std(), images[..., 12:20, 12:20].std()
    assert float(corner) == pytest.approx(float(centre), rel=0.25), "figures lie everywhere alike"
    steps = (images[..., 1:] - images[..., :-1]).abs().mean(1).flatten(1)
    assert float((steps.amax(1) > 0.3).float().mean()) > 0.6
    assert float(steps.median()) < 0.08, "most neighbours lie on one leaf"


def test_images_have_colour() -> None:
    images = dead_leaves(300, InputSpec((3, 32, 32)), random())
    saturation = images.amax(1) - images.amin(1)
    assert 0.15 < float(saturation.mean()) < 0.5
    assert float(images.mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_spectrum_falls_as_asked(exponent: float) -> None:
    """The slope of the amplitude over frequency in logarithms, fitted by least squares."""
    noise = spectral_noise(200, (1, 64, 64), random(), (exponent, exponent))
    amplitude = torch.fft.rfft2(noise[:, 0]).abs().square().mean(0).sqrt()
    rows, columns = torch.fft.fftfreq(64)[:, None] * 64, torch.fft.rfftfreq(64)[None] * 64
    frequency = (rows**2 + columns**2).sqrt()
    inside = (frequency >= 2) & (frequency <= 28)
    x, y = frequency[inside].log(), amplitude[inside].log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert float(slope) == pytest.approx(-exponent, abs=0.05)
    assert noise.mean((1, 2, 3)).abs().max() < 1e-4
    assert noise.std((1, 2, 3)).sub(1).abs().max() < 1e-3


def test_cutouts_are_leaves_inside_and_empty_outside() -> None:
    spec = InputSpec((1, 32, 32), low=-1.0, high=1.0)
    images, inside = start_images("cutouts", 300, spec, random(), hold=1.0)
    assert inside is not None
    empty = inside.expand_as(images) == 0
    assert float(images[empty].max()) < -0.9, "the background is the lowest value, but for its soft edge"
    assert 0.1 < float(inside.mean()) < 0.9
    filled = [image[inside[number].bool()] for number, image in enumerate(images) if inside[number].sum() > 200]
    assert float(torch.stack([part.std() for part in filled]).median()) > 0.15, "parts and textures, not one tone"
