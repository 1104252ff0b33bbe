"""The baselines that read labels, against loops written out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers import SMALL, small_network, small_teacher
from torch import nn
from torch.nn import functional

from zskd_nni.data.augmentation import Augmentation
from zskd_nni.data.datasets import LabelledImages
from zskd_nni.research.baselines.kd_at import KdAtSettings, stepped, train_kd_at
from zskd_nni.research.baselines.labelled import LabelledBatches, few_of_each, train_on_labels
from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.validation import build_settings
from zskd_nni.training.distillation import DistillationSettings

SCHEDULE = DistillationSettings(steps=10, batch=8, learning_rate=1e-2, warmup=2)


def labelled(count: int = 40, classes: int = 5) -> LabelledImages:
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    return LabelledImages(images, torch.arange(count) % classes, "numbers")


def test_a_few_of_each_class() -> None:
    data = labelled()
    few, more = few_of_each(data, 2, 5, seed=1), few_of_each(data, 4, 5, seed=1)
    assert torch.bincount(few.labels).tolist() == [2] * 5
    for k in range(5):
        mine, theirs = few.images[few.labels == k], more.images[more.labels == k]
        assert torch.equal(mine, theirs[:2])  # of a smaller number the first of a larger one's
    assert not torch.equal(few.images, few_of_each(data, 2, 5, seed=2).images)
    with pytest.raises(UserError, match="numbers has 8 images of class 0, not 9"):
        few_of_each(data, 9, 5, seed=1)


def test_every_image_once_an_epoch() -> None:
    data = labelled(24)
    batches = LabelledBatches(data, SMALL, 8, seed=3)
    seen = torch.cat([batches.batch(step)[0] for step in range(3)])
    assert sorted(seen.flatten(1).sum(1).tolist()) == pytest.approx(
        sorted(data.pixels(slice(None), SMALL).flatten(1).sum(1).tolist())
    )
    assert not torch.equal(batches.batch(0)[0], batches.batch(3)[0])
    assert LabelledBatches(data, SMALL, 100, seed=3).batch(7)[0].shape == (24, 1, 8, 8)


def adam(student: nn.Module, schedule: DistillationSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(student.parameters(), schedule.learning_rate, weight_decay=schedule.weight_decay)


def cosine(step: int) -> float:
    warmup, steps = SCHEDULE.warmup, SCHEDULE.steps
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks learnt the same.

    A bias in front of BatchNorm has no gradient but rounding, of which Adam makes whole steps; BatchNorm's mean moves
    along with it.
    """
    theirs = other.state_dict()
    names = [name for name in theirs if name not in ("conv.bias", "norm.running_mean")]
    return all(torch.allclose(one.state_dict()[name].float(), theirs[name].float(), atol=1e-4) for name in names)


def test_real_labels_are_cross_entropy_on_the_students_schedule() -> None:
    data, student, expected = labelled(), small_network(1), small_network(1).train()
    train_on_labels(student, data, SMALL, SCHEDULE, seed=4, quiet=True)
    optimizer, batches = adam(expected, SCHEDULE), LabelledBatches(data, SMALL, 8, seed=4)
    for step in range(SCHEDULE.steps):
        optimizer.param_groups[0]["lr"] = SCHEDULE.learning_rate * cosine(step)
        images, labels = batches.batch(step)
        log_probabilities = expected(images).log_softmax(1)
        optimizer.zero_grad()
        (-log_probabilities[torch.arange(len(labels)), labels].mean()).backward()
        optimizer.step()
    assert not student.training
    assert same_weights(student, expected)
    assert not same_weights(student, small_network(1))


@pytest.mark.parametrize("optimizer", ["sgd", "student"])
def test_kd_at_is_the_released_codes(optimizer: str) -> None:
    data, teacher = labelled(), small_teacher(0)
    student, expected = small_network(1), small_network(1).train()
    settings = KdAtSettings(optimizer=optimizer, attention=(("conv", "conv"), ("act", "act")), learning_rate=0.02)
    train_kd_at(student, teacher, data, settings, SCHEDULE, seed=4, quiet=True)
    if optimizer == "sgd":
        updates: torch.optim.Optimizer = torch.optim.SGD(expected.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)
    else:
        updates = adam(expected, SCHEDULE)
    batches = LabelledBatches(data, SMALL, 8, seed=4)

    def features(network: nn.Module, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        convolved = network.conv(images)  # type: ignore[operator]
        active = network.act(network.norm(convolved))  # type: ignore[operator]
        hidden = torch.tanh(network.hidden(active.flatten(1)))  # type: ignore[operator]
        return [convolved, active], network.head(hidden)  # type: ignore[operator]

    def attention(features: torch.Tensor) -> torch.Tensor:
        squares = features.pow(2).mean(1).view(len(features), -1)
        return squares / squares.pow(2).sum(1, keepdim=True).sqrt()

    for step in range(SCHEDULE.steps):
        rate = (0.02, stepped(step, 10)) if optimizer == "sgd" else (SCHEDULE.learning_rate, cosine(step))
        updates.param_groups[0]["lr"] = rate[0] * rate[1]
        images, labels = batches.batch(step)
        with torch.no_grad():
            attended, answers = features(teacher.model, images)
        followed, logits = features(expected, images)
        p = (answers / 4).softmax(1)
        divergence = (p * (p.log() - (logits / 4).log_softmax(1))).sum() / p.numel()
        loss = 0.1 * functional.cross_entropy(logits, labels) + 2 * 0.9 * 16 * divergence
        for ours, theirs in zip(followed, attended, strict=True):
            loss = loss + 1000 * 3 / 2 * (attention(ours) - attention(theirs)).pow(2).mean()
        updates.zero_grad()
        loss.backward()
        updates.step()
    assert not student.training
    assert same_weights(student, expected)


def test_the_rate_falls_to_a_fifth_three_times() -> None:
    assert [stepped(done, 100) for done in (0, 29, 30, 59, 60, 79, 80, 99)] == pytest.approx(
        [1, 1, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008]
    )


@pytest.mark.parametrize("kind", ["kd-at", "labels"])
def test_stopped_and_resumed_bit_by_bit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = labelled()
    schedule = DistillationSettings(steps=20, batch=8, learning_rate=1e-2, augmentation=Augmentation(rotation=10))

    def train(name: str) -> nn.Module:
        student = small_network(1)
        if kind == "labels":
            train_on_labels(student, data, SMALL, schedule, checkpoint=tmp_path / name, quiet=True)
        else:
            train_kd_at(
                student, small_teacher(), data, KdAtSettings(), schedule, checkpoint=tmp_path / name, quiet=True
            )
        return student

    whole = train("whole.pt")
    calls, check = 0, signals.check

    def stop_once() -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise signals.Interrupted(15)
        check()

    monkeypatch.setattr(signals, "check", stop_once)
    with pytest.raises(signals.Interrupted):
        train("stopped.pt")
    resumed = train("stopped.pt")
    for one, other in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": 1.5}, "alpha must lie in"),
        ({"temperature": 0}, "temperature must be positive"),
        ({"attention_weight": -1}, "attention_weight must not be negative"),
        ({"optimizer": "adam"}, "optimizer is one of sgd, student"),
        ({"alhpa": 1}, "did you mean 'alpha'"),
    ],
)
def test_settings_outside_their_range(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_settings(KdAtSettings, values)


def test_layers_that_do_not_match() -> None:
    settings = KdAtSettings(attention=(("conv", "hidden"),))
    with pytest.raises(UserError, match="The student's layer 'hidden' has no attention map"):
        train_kd_at(small_network(1), small_teacher(), labelled(), settings, SCHEDULE, quiet=True)
