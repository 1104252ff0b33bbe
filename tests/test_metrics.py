"""Figures of merit against loops written out, one image at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import random, small_network
from torch import Tensor, nn

from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.losses import attention_loss, attention_map, belief_divergence
from zskd_nni.training.metrics import (
    accuracy,
    agreement,
    expected_calibration_error,
    mean_transition_error,
    transition_curves,
)


def gaussian_images(count: int, seed: int = 0, channels: int = 1) -> Tensor:
    return torch.randn((count, channels, 8, 8), generator=random(seed))


# Calibration.


def calibration_loop(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    probabilities = np.exp(logits.double().numpy() - logits.double().numpy().max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    total = 0.0
    for b in range(bins):
        inside = [
            (row.max(), row.argmax() == label)
            for row, label in zip(probabilities, labels.tolist(), strict=True)
            if b / bins < row.max() <= (b + 1) / bins
        ]
        if inside:
            confidence = sum(c for c, _ in inside) / len(inside)
            right = sum(bool(r) for _, r in inside) / len(inside)
            total += len(inside) / len(labels) * abs(confidence - right)
    return total


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 8.0])
@pytest.mark.parametrize("bins", [15, 10, 1])
def test_calibration_error_against_a_loop(classes: int, sharpness: float, bins: int) -> None:
    logits = sharpness * torch.randn(700, classes, generator=random(classes))
    labels = torch.where(
        torch.rand(700, generator=random(1)) < 0.6,
        logits.argmax(1),
        torch.randint(classes, (700,), generator=random(2)),
    )
    expected = calibration_loop(logits, labels, bins)
    assert expected_calibration_error(logits, labels, bins) == pytest.approx(expected, abs=1e-9)
    assert expected > 0.005


def test_calibration_error_of_known_cases() -> None:
    sure = torch.tensor([[100.0, 0.0]]).repeat(10, 1)
    assert expected_calibration_error(sure, torch.zeros(10, dtype=torch.long)) == pytest.approx(0)
    assert expected_calibration_error(sure, torch.ones(10, dtype=torch.long)) == pytest.approx(1)
    # 80 % sure and right in 8 of 10
    honest = torch.tensor([[math.log(4.0), 0.0]]).repeat(10, 1)
    labels = torch.tensor([0] * 8 + [1] * 2)
    assert expected_calibration_error(honest, labels) == pytest.approx(0, abs=1e-7)
    # Over- and underconfidence in different bins do not cancel: |0.8 - 0| / 2 + |1 - 1| / 2
    both = torch.cat([honest[:5], sure[:5]])
    assert expected_calibration_error(both, torch.tensor([1] * 5 + [0] * 5)) == pytest.approx(0.4, abs=1e-6)
    # A confidence on an edge belongs below it: |0.5 - 1| / 2 + |0.8 - 0| / 2 in two bins
    edge = torch.tensor([[0.0, 0.0], [math.log(4.0), 0.0]])
    assert expected_calibration_error(edge, torch.tensor([0, 1]), bins=2) == pytest.approx(0.65, abs=1e-6)
    with pytest.raises(ValueError, match="at least one image"):
        expected_calibration_error(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))


def test_agreement_and_accuracy() -> None:
    logits = torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0]])
    assert accuracy(logits, torch.tensor([0, 1, 0, 0])) == 75
    assert agreement(logits, logits[[0, 1, 3, 3]]) == 0.75


# Transition curves.


def slow_curves(a: nn.Module, b: nn.Module, image: Tensor, target: int, steps: int, size: float) -> list[list[float]]:
    """Algorithm 2 of ZSKT for one image ``(C, H, W)`` and one class."""
    a, b = a.eval(), b.eval()
    x, p_a, p_b = image[None].clone(), [], []
    for _ in range(steps):
        x = x.detach().requires_grad_(True)
        logits = a(x)[0]
        p_a.append(float(torch.softmax(logits, 0)[target].detach()))
        p_b.append(float(torch.softmax(b(x)[0], 0)[target].detach()))
        loss = -torch.log_softmax(logits, 0)[target]
        loss.backward()
        assert x.grad is not None
        x = x - size * x.grad
    return [p_a, p_b]


def soft_network(seed: int, classes: int = 5) -> nn.Module:
    """Less steep than the others, so that a hundred steps do not amplify rounding."""
    network = small_network(seed, classes)
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(0.5)
    return network.requires_grad_(False).eval()


@pytest.mark.parametrize(("steps", "size"), [(100, 1.0), (7, 0.3)])
def test_curves_against_a_loop(steps: int, size: float) -> None:
    student, teacher = soft_network(1), soft_network(2)
    images, targets = gaussian_images(6), torch.tensor([0, 1, 2, 3, 4, 0])
    first, second = transition_curves(student, teacher, images, targets, steps, size)
    assert first.shape == second.shape == (6, steps)
    for row in range(6):
        expected = slow_curves(student, teacher, images[row], int(targets[row]), steps, size)
        np.testing.assert_allclose(first[row].numpy(), expected[0], atol=2e-4)
        np.testing.assert_allclose(second[row].numpy(), expected[1], atol=2e-4)
    # The clean image comes first, and the followed network comes to see the target.
    torch.testing.assert_close(first[:, 0], student(images).softmax(1)[torch.arange(6), targets])
    assert bool((first[:, -1] > first[:, 0]).all())
    assert float((first - second).abs().mean()) > 0.01


def test_a_batch_steps_as_each_image_alone() -> None:
    student, teacher = soft_network(1), soft_network(2)
    images, targets = gaussian_images(40), torch.arange(40) % 5
    whole = transition_curves(student, teacher, images, targets, 20)
    for row in (0, 17, 39):
        alone = transition_curves(student, teacher, images[row : row + 1], targets[row : row + 1], 20)
        torch.testing.assert_close(whole[0][row : row + 1], alone[0], atol=1e-5, rtol=1e-4)


def slow_error(
    a: nn.Module, b: nn.Module, images: Tensor, steps: int, size: float, labels: Tensor | None, classes: int, limit: int
) -> tuple[float, int]:
    total, used = 0.0, 0
    for number, image in enumerate(images):
        i = int(a.eval()(image[None]).argmax())
        if i != int(b.eval()(image[None]).argmax()) or used == limit:
            continue
        used += 1
        if labels is None:
            goals = [j for j in range(classes) if j != i]
        else:  # the released code
            goals = [(int(labels[number]) + more) % classes for more in range(1, classes)]
        for j in goals:
            p_a, p_b = slow_curves(a, b, image, j, steps, size)
            total += sum(abs(u - v) for u, v in zip(p_a, p_b, strict=True)) / steps / (classes - 1)
    return total / used, used


@pytest.mark.parametrize("with_labels", [False, True], ids=["predicted class", "the code's slip"])
@pytest.mark.parametrize("limit", [1000, 3])
def test_mean_transition_error_against_a_loop(with_labels: bool, limit: int) -> None:
    student, teacher = soft_network(1), soft_network(2)
    images = gaussian_images(24)
    labels = torch.arange(24) % 5 if with_labels else None
    expected, used = slow_error(student, teacher, images, 12, 1.0, labels, 5, limit)
    result = mean_transition_error(student, teacher, images, steps=12, labels=labels, limit=limit, batch=10)
    assert 0 < used < 24
    assert result.images == used
    assert result.error == pytest.approx(expected, abs=2e-4)
    assert result.followed.shape == result.other.shape == (12,)
    assert (result.steps, result.step_size) == (12, 1.0)


def test_the_slip_and_the_direction_matter() -> None:
    student, teacher, images = soft_network(1), soft_network(2), gaussian_images(60)
    plain = mean_transition_error(student, teacher, images, steps=20).error
    slip = mean_transition_error(student, teacher, images, steps=20, labels=torch.arange(60) % 5).error
    other = mean_transition_error(teacher, student, images, steps=20).error
    assert abs(plain - slip) > 1e-3
    assert abs(plain - other) > 1e-3
    right = student(images).argmax(1)
    assert mean_transition_error(student, teacher, images, steps=20, labels=right).error == pytest.approx(
        plain, abs=1e-6
    )


def test_a_network_and_itself() -> None:
    result = mean_transition_error(soft_network(1), soft_network(1), gaussian_images(10))
    assert (result.error, result.images, result.steps) == (0, 10, 100)
    torch.testing.assert_close(result.followed, result.other)


def test_modes_and_gradients_are_left_as_they_were() -> None:
    student, teacher = small_network(1, dropout=0.5).train(), small_network(2)
    student.norm.eval()
    before = student.norm.running_mean.clone()
    with torch.no_grad():  # as an evaluation may be wrapped
        first = mean_transition_error(student, teacher, gaussian_images(10), steps=3).error
    assert first == mean_transition_error(student, teacher, gaussian_images(10), steps=3).error
    assert student.training
    assert not student.norm.training
    assert torch.equal(student.norm.running_mean, before)
    assert all(weight.grad is None for weight in student.parameters())


def test_a_hundred_classes() -> None:
    student, teacher, images = soft_network(1, 100), soft_network(1, 100), gaussian_images(3)
    with torch.no_grad():
        teacher.head.weight.add_(0.05 * torch.randn(teacher.head.weight.shape, generator=random(0)))
    result = mean_transition_error(student, teacher, images, steps=4, batch=64)
    expected, used = slow_error(student, teacher, images, 4, 1.0, None, 100, 1000)
    assert result.images == used > 0
    assert result.error == pytest.approx(expected, abs=1e-5)


class ShiftsItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.5)


def test_networks_that_change_their_input_in_place() -> None:
    student, teacher = soft_network(1), soft_network(2)
    plain = mean_transition_error(nn.Sequential(Shift(), student), teacher, images := gaussian_images(10), steps=5)
    before = images.clone()
    changing = mean_transition_error(nn.Sequential(ShiftsItsInput(), student), teacher, images, steps=5)
    assert changing.error == plain.error > 0
    assert torch.equal(images, before)


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5


def test_networks_that_agree_nowhere() -> None:
    network = soft_network(1)
    shifted = nn.Sequential(network, Roll())
    with pytest.raises(UserError, match="agree on no image"):
        mean_transition_error(network, shifted, gaussian_images(5))


class Roll(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, 1)


# ZSKT's losses.


def test_belief_divergence_against_a_loop() -> None:
    s, t = torch.randn(6, 7, generator=random(0)), 2 * torch.randn(6, 7, generator=random(1))
    for temperature in (1.0, 4.0):
        p, q = (torch.softmax(z.double() / temperature, 1).numpy() for z in (t, s))
        total = sum(p[n, k] * math.log(p[n, k] / q[n, k]) for n in range(6) for k in range(7))
        assert float(belief_divergence(s, t, temperature)) == pytest.approx(total / 42, rel=1e-5)
        assert float(belief_divergence(s, t, temperature, "images")) == pytest.approx(total / 6, rel=1e-5)
    assert float(belief_divergence(s, s)) == pytest.approx(0, abs=1e-7)


def test_attention_against_a_loop() -> None:
    s, t = torch.randn(3, 4, 2, 5, generator=random(0)), torch.randn(3, 6, 2, 5, generator=random(1))

    def plain_map(a: np.ndarray) -> np.ndarray:
        values = np.array([sum(a[c, y, x] ** 2 for c in range(len(a))) / len(a) for y in range(2) for x in range(5)])
        return values / np.sqrt((values**2).sum())

    differences = [plain_map(a.double().numpy()) - plain_map(b.double().numpy()) for a, b in zip(t, s, strict=True)]
    np.testing.assert_allclose(attention_map(s)[1].numpy(), plain_map(s[1].double().numpy()), rtol=1e-5)
    squared = sum((d**2).sum() for d in differences) / (3 * 10)
    norms = sum(np.sqrt((d**2).sum()) for d in differences) / 3
    assert float(attention_loss(s, t)) == pytest.approx(squared, rel=1e-4)
    assert float(attention_loss(s, t, "norm")) == pytest.approx(norms, rel=1e-4)


def test_the_gradient_of_attention_lies_in_memory_as_the_features_do() -> None:
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = torch.randn(3, 4, 6, 5, generator=random(0)).to(memory_format=layout).requires_grad_()
        features, seen = leaf * 2, []
        features.register_hook(seen.append)
        attention_map(features)[:, 7].sum().backward()
        assert seen[0].is_contiguous(memory_format=layout)
        gradients.append(leaf.grad)
    assert float(gradients[0].abs().max()) > 0
    torch.testing.assert_close(*gradients)


def test_a_teacher_is_asked_without_normalising_once_more() -> None:
    spec = InputSpec((1, 8, 8), mean=(0.4,), std=(0.3,))
    teacher, images = Teacher(soft_network(2), spec), gaussian_images(10)
    expected = mean_transition_error(soft_network(1), soft_network(2), images, steps=5)
    result = mean_transition_error(soft_network(1), teacher, images, steps=5)
    assert result.error == pytest.approx(expected.error, abs=1e-5)
