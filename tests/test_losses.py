"""Losses and figures of merit against independent NumPy code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import random, soft_targets
from scipy.special import log_softmax, rel_entr, softmax
from torch import nn

from zskd_nni.synthesis.batch_norm_statistics import Moments, StatisticsTracker, batch_norms, statistics_distances
from zskd_nni.training.losses import (
    channel_moments,
    distillation_loss,
    soft_target_divergence,
    statistics_distance,
    total_variation,
)
from zskd_nni.training.metrics import accuracy, agreement


def logits(seed: int, rows: int = 7, classes: int = 6, scale: float = 12.0) -> torch.Tensor:
    return torch.randn(rows, classes, generator=random(seed)) * scale


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_distillation_loss(temperature: float) -> None:
    student, teacher = logits(1), logits(2)
    p = softmax(teacher.double().numpy() / temperature, axis=1)
    q = softmax(student.double().numpy() / temperature, axis=1)
    expected = temperature**2 * rel_entr(p, q).sum(1).mean()
    assert float(distillation_loss(student, teacher, temperature)) == pytest.approx(expected, rel=1e-5)


def test_distillation_loss_vanishes_at_the_teacher_and_nowhere_else() -> None:
    teacher = logits(3)
    assert float(distillation_loss(teacher + 5, teacher, 4.0)) == pytest.approx(0, abs=1e-5)  # shifts do not count
    assert float(distillation_loss(teacher.flip(1), teacher, 4.0)) > 0.1


def test_distillation_gradient_pulls_towards_the_teacher() -> None:
    """d loss / d student = T * (softmax(student / T) - softmax(teacher / T)) / N."""
    student, teacher, temperature = logits(4).requires_grad_(True), logits(5), 20.0
    distillation_loss(student, teacher, temperature).backward()
    q = softmax(student.detach().double().numpy() / temperature, axis=1)
    p = softmax(teacher.double().numpy() / temperature, axis=1)
    np.testing.assert_allclose(student.grad.numpy(), temperature * (q - p) / len(p), atol=1e-6)


def test_gradient_size_does_not_depend_on_temperature_at_high_ones() -> None:
    sizes = []
    for temperature in (50.0, 200.0):
        student = logits(6, scale=1.0).requires_grad_(True)
        distillation_loss(student, logits(7, scale=1.0), temperature).backward()
        sizes.append(float(student.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_soft_target_divergence(temperature: float) -> None:
    answers, targets = logits(8), soft_targets(7, 6)
    q = softmax(answers.double().numpy() / temperature, axis=1)
    expected = rel_entr(targets.double().numpy(), q).sum(1)
    result = soft_target_divergence(answers, targets, temperature)
    assert result.shape == (7,)
    np.testing.assert_allclose(result.numpy(), expected, rtol=2e-5, atol=1e-6)


def test_soft_target_divergence_is_cross_entropy_less_entropy_with_its_gradient() -> None:
    answers, targets = logits(9).requires_grad_(True), soft_targets(7, 6, seed=1)
    divergence = soft_target_divergence(answers, targets, 20.0)
    numbers = targets.double().numpy()
    cross_entropy = -(numbers * log_softmax(answers.detach().double().numpy() / 20, axis=1)).sum(1)
    entropy = -(numbers * np.log(numbers)).sum(1)
    np.testing.assert_allclose(divergence.detach().numpy(), cross_entropy - entropy, atol=1e-5)
    divergence.sum().backward()
    q = softmax(answers.detach().double().numpy() / 20, axis=1)
    np.testing.assert_allclose(answers.grad.numpy(), (q - numbers) / 20, atol=1e-7)


def test_soft_target_divergence_of_one_hot_targets() -> None:
    targets = torch.eye(6)
    result = soft_target_divergence(torch.zeros(6, 6), targets, 20.0)
    np.testing.assert_allclose(result.numpy(), math.log(6), rtol=1e-6)


def test_total_variation_by_a_loop() -> None:
    """Huber's loss of every difference, over its knee."""
    knee = 0.05
    images = torch.rand(3, 2, 4, 5, generator=random(0))
    images[1] *= 0.06  # most differences below the knee
    expected = []
    for image in images.double().tolist():
        total = 0.0
        for channel in image:
            for y in range(4):
                for x in range(5):
                    neighbours = [(y + 1, x)] * (y < 3) + [(y, x + 1)] * (x < 4)
                    for row, column in neighbours:
                        d = abs(channel[row][column] - channel[y][x])
                        total += d * d / (2 * knee) if d <= knee else d - knee / 2
        expected.append(total)
    np.testing.assert_allclose(total_variation(images).numpy(), expected, rtol=1e-5)
    assert total_variation(torch.full((1, 1, 4, 4), 0.7)).item() == 0


def test_divergence_with_a_temperature_for_each_row() -> None:
    answers, targets = logits(10), soft_targets(7, 6, seed=2)
    temperatures = torch.linspace(1, 20, 7).unsqueeze(1)
    whole = soft_target_divergence(answers, targets, temperatures)
    single = [soft_target_divergence(answers[i : i + 1], targets[i : i + 1], float(temperatures[i])) for i in range(7)]
    torch.testing.assert_close(whole, torch.cat(single))


def test_accuracy_and_agreement() -> None:
    first = torch.tensor([[2.0, 1, 0], [0, 2, 1], [0, 1, 2], [3, 0, 0]])
    second = torch.tensor([[5.0, 1, 0], [0, 2, 9], [0, 1, 2], [0, 3, 0]])
    assert accuracy(first, torch.tensor([0, 1, 0, 0])) == 75
    assert agreement(first, second) == 0.5


def test_distance_of_statistics() -> None:
    """DeepInversion, equation 4, written out channel by channel."""
    features = torch.randn((7, 3, 4, 5), generator=random(0)) * 2 + 1
    mean, variance = torch.tensor([0.5, 1.0, -1.0]), torch.tensor([1.0, 4.0, 2.0])
    of_means = of_variances = 0.0
    for channel in range(3):
        values = features[:, channel].double().flatten().tolist()
        middle = sum(values) / len(values)
        spread = sum((value - middle) ** 2 for value in values) / len(values)
        of_means += (middle - float(mean[channel])) ** 2
        of_variances += (spread - float(variance[channel])) ** 2
    wanted = of_means**0.5 + of_variances**0.5
    assert float(statistics_distance(*channel_moments(features), mean, variance)) == pytest.approx(wanted, rel=1e-5)
    flat = features.permute(0, 2, 3, 1).reshape(-1, 3)  # as behind a linear layer
    assert float(statistics_distance(*channel_moments(flat), mean, variance)) == pytest.approx(wanted, rel=1e-5)


def test_moments_of_two_groups_are_those_of_all() -> None:
    features = torch.randn((9, 3, 4, 5), generator=random(0)) * 2 + torch.arange(3).view(3, 1, 1)
    joined = Moments.of(features[:2]).merged(Moments.of(features[2:]))
    assert joined.count == 9
    torch.testing.assert_close(joined.mean, features.mean((0, 2, 3)))
    torch.testing.assert_close(joined.variance, features.var((0, 2, 3), unbiased=False))


def test_retired_images_stay_in_the_statistics() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.LazyBatchNorm1d()).eval()
    images = torch.randn((6, 1, 6, 6), generator=random(1))
    network(images)
    with torch.no_grad():
        with statistics_distances(network) as whole:
            network(images)
        tracker, rest = StatisticsTracker(network), torch.arange(6)
        for gone in ([4], [0, 2]):
            with tracker.distances() as found:
                network(images[rest])
            torch.testing.assert_close(found, whole)
            tracker.retire(torch.tensor([rest.tolist().index(row) for row in gone]))
            rest = torch.tensor([row for row in rest.tolist() if row not in gone])
        with tracker.distances() as found:
            network(images[rest])
    torch.testing.assert_close(found, whole)
    assert (tracker.retired, rest.tolist()) == (3, [1, 3, 5])


def test_statistics_of_every_batch_norm_that_keeps_some() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.BatchNorm2d(2, track_running_stats=False),
        nn.Flatten(),
        nn.LazyBatchNorm1d(),
    ).eval()
    images = torch.randn((5, 1, 6, 6), generator=random(1))
    network(images)
    assert [type(layer).__name__ for layer in batch_norms(network)] == ["BatchNorm2d", "BatchNorm1d"]
    with torch.no_grad(), statistics_distances(network) as found:
        network(images)
        inner = network[0](images)
    wanted = statistics_distance(*channel_moments(inner), network[1].running_mean, network[1].running_var)
    assert len(found) == 2
    torch.testing.assert_close(found[0], wanted)
    network(images)
    assert len(found) == 2  # nothing is watched outside the block
