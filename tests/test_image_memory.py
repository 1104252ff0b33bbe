"""The memory of images: a ring buffer, and images that stay."""

from __future__ import annotations

import pytest
import torch
from helpers import random
from torch import Tensor

from zskd_nni.methods.zskt.image_memory import ImageMemory, images_that_fit
from zskd_nni.runtime.errors import UserError


def numbered(*numbers: int) -> Tensor:
    """An image of each number, all its pixels alike."""
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def drawn(memory: ImageMemory, count: int = 400) -> list[int]:
    images = memory.draw(count, random(1))
    assert images.shape == (count, 1, 2, 2)
    assert images.dtype == torch.float32
    return sorted({int(image[0, 0, 0]) for image in images})


def test_the_oldest_leave_and_the_lasting_stay() -> None:
    memory = ImageMemory(4, numbered(100, 101))
    assert drawn(memory) == [100, 101]
    memory.put(numbered(1, 2, 3))
    assert drawn(memory) == [1, 2, 3, 100, 101]
    memory.put(numbered(4, 5))
    assert drawn(memory) == [2, 3, 4, 5, 100, 101]
    memory.put(numbered(6, 7, 8, 9, 10, 11))
    assert drawn(memory) == [8, 9, 10, 11, 100, 101]
    memory.put(numbered(12))  # the place of 8, which came first of those that are left
    assert drawn(memory) == [9, 10, 11, 12, 100, 101]


def test_each_image_is_as_likely_as_any_other() -> None:
    memory = ImageMemory(50, numbered(100, 101))
    memory.put(numbered(1, 2))
    values = memory.draw(8000, random(0))[:, 0, 0, 0].int()
    counts = torch.bincount(values)[[1, 2, 100, 101]]
    assert int(counts.sum()) == 8000
    assert bool(((counts - 2000).abs() < 200).all())  # five standard deviations


def test_large_images_are_fewer() -> None:
    assert images_that_fit(24_000, (3, 32, 32)) == 24_000
    assert images_that_fit(24_000, (3, 224, 224)) == 3566
    assert images_that_fit(100, (3, 224, 224)) == 100


def test_put_back_it_goes_on_alike() -> None:
    memory = ImageMemory(4, numbered(100))
    memory.put(numbered(1, 2, 3, 4, 5))
    other = ImageMemory(4, numbered(100))
    other.load_state_dict(memory.state_dict())
    for each in (memory, other):
        each.put(numbered(6))
    assert torch.equal(memory.images, other.images)
    assert torch.equal(memory.draw(9, random(2)), other.draw(9, random(2)))


@pytest.mark.parametrize("other", [ImageMemory(3, numbered()), ImageMemory(9, torch.zeros(0, 3, 2, 2))])
def test_a_state_of_another_memory(other: ImageMemory) -> None:
    memory = ImageMemory(4, numbered())
    memory.put(numbered(1, 2, 3, 4))
    with pytest.raises(UserError, match="it is another's"):
        other.load_state_dict(memory.state_dict())
