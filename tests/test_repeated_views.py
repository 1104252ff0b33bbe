"""Views that are shown several times: which ones, that they are the same, and that a resumed training ends alike."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, random, small_network, small_teacher
from torch import Tensor

from zskd_nni.data.augmentation import Augmentation
from zskd_nni.data.sources import StoredSource
from zskd_nni.methods.zskt.source import ZsktSettings, ZsktSource
from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.distillation import DistillationSettings, distill
from zskd_nni.training.views import RepeatedViews, Views

SETTINGS = DistillationSettings(
    temperature=4, steps=250, batch=8, warmup=2, features="auto", repeats=2, augmentation=Augmentation(translation=0.2)
)


def source() -> StoredSource:
    return StoredSource(torch.rand((64, *SMALL.shape), generator=random(3)), 8, 5, "set")


def test_every_view_of_a_block_is_shown_as_often_as_asked_and_made_once() -> None:
    made: list[int] = []

    def make(number: int, draws: torch.Generator) -> Views:
        made.append(number)
        images = torch.rand((2, 1, 3, 3), generator=draws)
        channels_last = torch.rand((2, 4, 3, 3), generator=draws).contiguous(memory_format=torch.channels_last)
        return Views(images, torch.rand((2, 5), generator=draws), (channels_last, images[:, :, 0]), 4)

    views = RepeatedViews(make, repeats=3, seed=1, block=5)
    shown: dict[int, list[Views]] = {}
    order = [views.number(step) for step in range(30)]
    for step, number in enumerate(order):
        shown.setdefault(number, []).append(views.batch(step))
    assert made == list(range(10))
    assert Counter(order) == dict.fromkeys(range(10), 3) and set(order[:15]) == set(range(5))
    assert order[:5] != order[5:10] or order[5:10] != order[10:15], "later showings come in another order"

    def parts(views: Views) -> list[Tensor]:
        return [views.images, views.logits, *views.hidden]

    for first, *later in shown.values():
        for again in later:
            assert again.whole == first.whole == 4
            pairs = zip(parts(first), parts(again), strict=True)
            assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in pairs)
    assert len(list(Path(views._folder.name).iterdir())) == 5, "the block before is gone from disk"


def test_the_teacher_answers_each_view_once(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, calls = small_teacher(), [0]
    teacher.model.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    calls[0] = 0
    history = distill(small_network(1), teacher, source(), SETTINGS, quiet=True)
    assert calls[0] - 100 - 50 in range(6), "two showings of 100 batches, one of 50, and what the checks before ask"
    assert history.losses[-1] < history.losses[0]


def test_a_training_is_resumed_to_the_bit_without_the_views_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = small_network(1), small_network(1)
    distill(whole, small_teacher(), source(), SETTINGS, quiet=True)
    options: dict[str, Any] = {"checkpoint": tmp_path / "checkpoint.pt", "quiet": True}

    steps = [0]

    def check() -> None:
        steps[0] += 1
        if steps[0] == 140:
            raise signals.Interrupted(2)

    with monkeypatch.context() as patched, pytest.raises(signals.Interrupted):
        patched.setattr(signals, "check", check)
        distill(stopped, small_teacher(), source(), SETTINGS, **options)
    resumed = small_network(9)
    distill(resumed, small_teacher(), source(), SETTINGS, **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_images_that_change_with_the_student_are_shown_once() -> None:
    teacher = small_teacher()
    game = ZsktSource(teacher, ZsktSettings(rounds=6, batch=8, latent=4, width=8, student_steps=2), 8, 0)
    with pytest.raises(UserError, match=r"distillation\.repeats: the images of this transfer method change"):
        distill(small_network(1), teacher, game, SETTINGS, quiet=True)
