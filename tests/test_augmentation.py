"""Augmentation: exact where it can be, each image by its own draw, the range kept."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import random
from torch import Tensor

from zskd_nni.data.augmentation import Augmentation, _move, augment
from zskd_nni.training.supervised import SupervisedSettings


def images(count: int = 6, channels: int = 2, height: int = 9, width: int = 12) -> Tensor:
    return torch.rand((count, channels, height, width), generator=random(0))


ALL = {
    "rotation": 20,
    "translation": 0.1,
    "scale": (0.8, 1.2),
    "shear": 10,
    "flip": 0.5,
    "contrast": 0.3,
    "noise": 0.1,
    "erase": 0.3,
}
MIXED = {"cutmix": 0.4, "mixup": 0.4}


def test_inactive_is_the_identity() -> None:
    batch, draws = images(), random(1)
    before = draws.get_state()
    assert augment(batch, Augmentation(), draws) is batch
    assert torch.equal(draws.get_state(), before), "nothing is drawn"
    assert not Augmentation().active


@pytest.mark.parametrize("key", [*ALL, *MIXED])
def test_every_key_does_something_and_only_with_its_generator(key: str) -> None:
    settings = Augmentation(**{key: {**ALL, **MIXED}[key]})
    assert settings.active
    batch = images()
    first, again = augment(batch, settings, random(1)), augment(batch, settings, random(1))
    other = augment(batch, settings, random(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, batch)
    assert not torch.equal(first, other)
    assert torch.equal(batch, images()), "the given images stay"


def test_global_random_state_plays_no_part() -> None:
    torch.manual_seed(0)
    first = augment(images(), Augmentation(**ALL), random(1))
    torch.manual_seed(1)
    assert torch.equal(first, augment(images(), Augmentation(**ALL), random(1)))


@pytest.mark.parametrize("key", ALL)
def test_each_image_by_its_own_draw(key: str) -> None:
    same = images(1).repeat(24, 1, 1, 1)
    result = augment(same, Augmentation(**{key: ALL[key]}), random(3))
    distinct = {tuple(image.flatten().tolist()) for image in result}
    assert len(distinct) in {"flip": [2], "erase": range(12, 25)}.get(key, [24])  # a small square may hit no pixel


def chosen(values: dict[int, Tensor]):
    """A draw that gives what the test wants; calls come in the order angle, shear, zoom, mirror, shift."""
    calls = [0]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        calls[0] += 1
        return values.get(calls[0], torch.full((6, *shape), (low + high) / 2))

    return uniform


@pytest.mark.parametrize(("right", "down"), [(0, 0), (3, 0), (0, -2), (-4, 1), (12, 0)])
def test_whole_pixels_are_a_shift(right: int, down: int) -> None:
    """``translation`` is a fraction of the side; a sample from x + t moves the picture by -t."""
    batch = images()
    height, width = batch.shape[2:]
    shift = torch.tensor([-right / width, -down / height]).repeat(6, 1)
    result = _move(batch, Augmentation(translation=1.0), chosen({5: shift}))
    expected = torch.zeros_like(batch)
    rows = slice(max(0, down), min(height, height + down))
    columns = slice(max(0, right), min(width, width + right))
    from_rows = slice(max(0, -down), min(height, height - down))
    from_columns = slice(max(0, -right), min(width, width - right))
    expected[:, :, rows, columns] = batch[:, :, from_rows, from_columns]
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)


def test_border_repeats_the_edge() -> None:
    shift = torch.tensor([-4 / 12, 0.0]).repeat(6, 1)
    result = _move(images(), Augmentation(translation=1.0, border="border"), chosen({5: shift}))
    torch.testing.assert_close(result[..., 4:], images()[..., :-4], rtol=0, atol=2e-6)
    torch.testing.assert_close(result[..., :4], images()[..., :1].expand(-1, -1, -1, 4), rtol=0, atol=2e-6)


def test_translation_stays_within_its_fraction() -> None:
    point = torch.zeros(400, 1, 33, 33)
    point[:, :, 16, 16] = 1
    moved = augment(point, Augmentation(translation=0.2), random(0))
    axis = torch.arange(33.0) - 16
    mass = moved.sum((1, 2, 3))
    offsets = torch.stack([(moved.sum((1, 2)) * axis).sum(1) / mass, (moved.sum((1, 3)) * axis).sum(1) / mass])
    assert float(offsets.abs().max()) <= 0.2 * 33 + 0.01
    assert float(offsets.abs().max()) > 0.18 * 33
    assert torch.all(offsets.mean(1).abs() < 5 * 0.2 * 33 / math.sqrt(3 * 400))


def test_flip() -> None:
    batch = images()
    torch.testing.assert_close(augment(batch, Augmentation(flip=1.0), random(0)), batch.flip(3), rtol=0, atol=2e-6)
    many = images(1).repeat(600, 1, 1, 1)
    mirrored = (augment(many, Augmentation(flip=0.25), random(0)) - many).abs().amax((1, 2, 3)) > 1e-3
    assert abs(float(mirrored.float().mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 600)


@pytest.mark.parametrize("quarter", [1, 2, 3])
def test_quarter_turns(quarter: int) -> None:
    batch = images(6, 1, 9, 9)
    angle = torch.full((6,), 90.0 * quarter)
    result = _move(batch, Augmentation(rotation=180), chosen({1: angle}))
    turned = [torch.rot90(batch, k, (2, 3)) for k in (quarter, -quarter)]
    assert any(torch.allclose(result, expected, atol=1e-5) for expected in turned)


def test_scale_enlarges_about_the_middle() -> None:
    square = torch.zeros(6, 1, 32, 32)
    square[:, :, 12:20, 12:20] = 1  # 64 pixels
    zoom = torch.full((6,), math.log(2.0))
    area = _move(square, Augmentation(scale=(0.5, 2.0)), chosen({3: zoom})).sum((1, 2, 3))
    assert torch.all((area - 256).abs() < 20)
    area = _move(square, Augmentation(scale=(0.5, 2.0)), chosen({3: -zoom})).sum((1, 2, 3))
    assert torch.all((area - 16).abs() < 5)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 3.0), (2.0, 2.5)])
@pytest.mark.parametrize("border", ["zeros", "border"])
def test_range_and_shape_are_kept(low: float, high: float, border: str) -> None:
    batch = low + (high - low) * images(64)
    result = augment(batch, Augmentation(**ALL, border=border), random(0), low, high)
    assert result.shape == batch.shape
    assert float(result.min()) >= low - 1e-6 * abs(high - low)
    assert float(result.max()) <= high + 1e-6 * abs(high - low)


def test_the_value_range_only_scales() -> None:
    batch = images()
    plain = augment(batch, Augmentation(**ALL), random(0))
    scaled = augment(batch * 4 - 1, Augmentation(**ALL), random(0), -1.0, 3.0)
    torch.testing.assert_close((scaled + 1) / 4, plain, rtol=0, atol=1e-5)


def test_beyond_the_edge_stands_the_low_value() -> None:
    full = torch.full((6, 1, 8, 8), 5.0)
    result = augment(full, Augmentation(rotation=45), random(0), -2.0, 5.0)
    assert float(result[:, :, 0, 0].min()) < 0
    assert float(result.min()) >= -2


def test_contrast_noise_and_erase_by_their_size() -> None:
    grey = torch.full((500, 1, 16, 16), 0.5)
    factors = augment(grey, Augmentation(contrast=0.4), random(0))[:, 0, 0, 0] / 0.5
    assert float(factors.min()) >= 0.6
    assert float(factors.max()) <= 1.4
    assert float(factors.max() - factors.min()) > 0.75
    noise = augment(grey, Augmentation(noise=0.05), random(0)) - 0.5
    assert float(noise.std()) == pytest.approx(0.05, rel=0.02)
    black = torch.full((500, 1, 16, 16), -1.0)
    erased = augment(black, Augmentation(erase=0.5), random(0), -1.0, 1.0) != -1
    assert float(erased.float().mean((1, 2, 3)).max()) <= 0.5**2 + 0.13
    assert float(erased.flatten(1).any(1).float().mean()) > 0.8
    rows, columns = erased[:, 0].any(2).sum(1), erased[:, 0].any(1).sum(1)
    assert torch.all(erased.sum((1, 2, 3)) == rows * columns), "what is erased is a rectangle"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotation": -1}, "rotation must lie in"),
        ({"rotation": float("nan")}, "rotation must lie in"),
        ({"translation": 1.5}, "translation must lie in"),
        ({"flip": 2}, "flip must lie in"),
        ({"noise": 2}, "noise must lie in"),
        ({"erase": -0.1}, "erase must lie in"),
        ({"scale": (0.0, 1.0)}, "scale is the smallest"),
        ({"scale": (1.2, 0.8)}, "scale is the smallest"),
        ({"border": "edge"}, "not 'edge'"),
        ({"cutmix": -0.1}, "cutmix must lie in"),
        ({"cutmix": 0.6, "mixup": 0.6}, "at most 1 together"),
    ],
)
def test_settings_outside_their_range(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**arguments)


def test_turning_an_oblong_image_turns_it() -> None:
    """A line along the width, turned by 45 degrees, rises by a pixel a pixel, whatever the sides are."""
    line = torch.zeros(6, 1, 16, 64)
    line[:, :, 7:9] = 1
    turned = _move(line, Augmentation(rotation=90), chosen({1: torch.full((6,), 45.0)}))[0, 0]
    columns = torch.arange(28, 36)
    heights = (turned[:, columns] * torch.arange(16.0)[:, None]).sum(0) / turned[:, columns].sum(0)
    assert abs(abs(float((heights[-1] - heights[0]) / (columns[-1] - columns[0]))) - 1) < 0.05


def test_what_is_erased_of_an_oblong_image_is_square() -> None:
    white = torch.ones(300, 1, 16, 64)
    hit = (augment(white, Augmentation(erase=0.8), random(0)) != 1)[:, 0]
    tall, wide = hit.any(2).sum(1), hit.any(1).sum(1)
    whole = (hit.any(2)[:, [0, -1]].sum(1) == 0) & (hit.any(1)[:, [0, -1]].sum(1) == 0) & (tall > 0)  # not at an edge
    assert int(whole.sum()) > 50
    assert int((tall - wide)[whole].abs().max()) <= 1


def test_images_that_leave_the_range_from_the_first_are_not_cut() -> None:
    """A generator's images are unbounded; a change of contrast must not bring them into the range."""
    batch = images()
    batch[0] = batch[0] * 6 - 3
    result = augment(batch, Augmentation(contrast=0.01), random(0))
    assert float((result[0] - batch[0]).abs().max()) < 0.05
    assert float(result[1:].min()) >= 0 and float(result[1:].max()) <= 1


def plain(count: int, height: int, width: int) -> Tensor:
    """Images of one value each, all different."""
    return torch.arange(count).float().div(count).view(-1, 1, 1, 1).expand(-1, 2, height, width).contiguous()


def test_cutmix_takes_a_rectangle_of_one_other_image() -> None:
    batch = plain(200, 12, 16)
    result = augment(batch, Augmentation(cutmix=1.0), random(0))
    foreign = (result != batch)[:, 0]
    rows, columns = foreign.any(2).sum(1), foreign.any(1).sum(1)
    assert torch.equal(foreign.sum((1, 2)), rows * columns), "a rectangle"
    assert int(rows.max()) <= 9 and int(columns.max()) <= 12, "at most three quarters of each side"
    assert float(foreign.flatten(1).any(1).float().mean()) > 0.95
    assert all(len(image[0].unique()) <= 2 and torch.equal(image[0], image[1]) for image in result)
    assert set(result.unique().tolist()) <= set(batch.unique().tolist())


def test_mixup_averages_whole_images() -> None:
    batch = plain(200, 5, 5)
    result = augment(batch, Augmentation(mixup=1.0), random(0))
    assert all(len(image.unique()) == 1 for image in result)
    assert float((result != batch).flatten(1).all(1).float().mean()) > 0.95
    assert float(result.mean()) == pytest.approx(float(batch.mean()), abs=0.05)


def test_the_shares_of_mixed_images() -> None:
    batch = plain(2000, 6, 6)
    result = augment(batch, Augmentation(cutmix=0.2, mixup=0.5), random(0))
    changed = (result != batch)[:, 0].flatten(1)
    whole, partly = changed.all(1).float().mean(), (changed.any(1) & ~changed.all(1)).float().mean()
    assert float(whole) == pytest.approx(0.5, abs=0.04)
    assert float(partly) == pytest.approx(0.2, abs=0.04)


def test_labelled_images_are_not_mixed() -> None:
    mixed = Augmentation(flip=0.5, cutmix=0.3, mixup=0.3)
    assert mixed.mixes and mixed.unmixed == Augmentation(flip=0.5)
    with pytest.raises(ValueError, match="mixed images have no label"):
        SupervisedSettings(augmentation=mixed)
