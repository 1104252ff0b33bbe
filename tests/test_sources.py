"""Transfer sources: every image once an epoch, in an order that depends on the step alone."""

from __future__ import annotations

import pytest
import torch
from helpers import SMALL, random

from zskd_nni.data.sources import NoiseSource, StoredSource, TransferSource
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.runtime.errors import UserError


def numbered(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float16).view(-1, 1, 1, 1).expand(count, 1, 2, 2).clone()


def epoch(source: StoredSource, number: int) -> list[int]:
    steps = len(source.images) // source.batch_size
    batches = [source.batch(number * steps + position, random(0)) for position in range(steps)]
    return torch.cat(batches)[:, 0, 0, 0].int().tolist()


def test_every_image_once_an_epoch_in_an_order_of_its_own() -> None:
    source = StoredSource(numbered(60), 12, seed=1, fingerprint="x")
    orders = [epoch(source, number) for number in range(4)]
    assert all(sorted(order) == list(range(60)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert list(range(60)) not in orders


def test_a_remainder_waits_for_the_next_epoch() -> None:
    source = StoredSource(numbered(25), 10, seed=1, fingerprint="x")
    seen = [epoch(source, number) for number in range(12)]
    assert all(len(order) == len(set(order)) == 20 for order in seen)
    assert set().union(*seen) == set(range(25))


def test_nothing_but_the_step_decides() -> None:
    first, second = (StoredSource(numbered(40), 8, seed=3, fingerprint="x") for _ in range(2))
    forwards = {step: first.batch(step, random(step)) for step in range(20)}
    for step in (19, 3, 0, 11, 4):
        assert torch.equal(second.batch(step, random(99)), forwards[step])
    assert first.state_dict() == {}
    second.load_state_dict({})
    with pytest.raises(UserError, match="keeps no state"):
        second.load_state_dict({"a": torch.zeros(1)})
    other = StoredSource(numbered(40), 8, seed=4, fingerprint="x")
    assert any(not torch.equal(other.batch(step, random(0)), forwards[step]) for step in range(5))


def test_stored_images_come_as_float32_and_stay_as_they_are() -> None:
    images = numbered(10)
    source = StoredSource(images, 4, 0, "x")
    assert source.batch(0, random(0)).dtype == torch.float32
    source.batch(0, random(0)).zero_()
    assert torch.equal(images, numbered(10))
    assert (source.size, source.batch_size) == (10, 4)


def test_small_and_empty_sets() -> None:
    source = StoredSource(numbered(3), 128, 0, "x")
    assert source.batch_size == 3
    assert sorted(epoch(source, 5)) == [0, 1, 2]
    with pytest.raises(UserError, match="empty"):
        StoredSource(numbered(0), 4, 0, "x")


def test_noise_fills_the_value_range_and_follows_the_generator() -> None:
    source = NoiseSource(InputSpec((2, 16, 16), low=-1, high=3), 32)
    batch = source.batch(0, random(0))
    assert batch.shape == (32, 2, 16, 16)
    assert -1 <= float(batch.min()) < -0.99
    assert 2.99 < float(batch.max()) <= 3
    assert float(batch.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(batch, source.batch(7, random(0)))
    assert not torch.equal(batch, source.batch(0, random(1)))


def test_both_are_transfer_sources() -> None:
    assert isinstance(StoredSource(numbered(3), 1, 0, "x"), TransferSource)
    assert isinstance(NoiseSource(SMALL, 4), TransferSource)
