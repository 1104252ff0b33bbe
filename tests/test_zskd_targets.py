"""ZSKD's targets against SciPy: similarity, concentrations, and the statistics of the draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import SMALL, random, small_teacher
from scipy import stats
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from zskd_nni.methods.registry import find_method, method_names
from zskd_nni.methods.zskd import (
    PRESETS,
    ZskdSettings,
    ZskdTargets,
    class_similarity,
    concentrations,
    row_min_max,
    sample_targets,
)
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError


def weights(classes: int = 10, features: int = 84, seed: int = 0) -> Tensor:
    return torch.randn(classes, features, generator=random(seed))


def test_similarity_is_the_cosine() -> None:
    w = weights()
    expected = 1 - cdist(w.double().numpy(), w.double().numpy(), "cosine")
    np.testing.assert_allclose(class_similarity(w).numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(class_similarity(w * torch.rand(10, 1)).numpy(), expected, atol=1e-6)


def test_similarity_stays_within_its_range() -> None:
    w = weights(4, 3).repeat(2, 1) * 1e-3
    similarity = class_similarity(w)
    assert similarity.max() <= 1
    assert similarity.min() >= -1
    torch.testing.assert_close(similarity, similarity.T)


def test_similarity_leaves_the_bias_out() -> None:
    network = small_teacher().model
    with torch.no_grad():
        network.head.bias.copy_(torch.tensor([100.0, -100, 5, 0, 3]))
    targets = ZskdTargets(Teacher(network, SMALL), ZskdSettings())
    assert torch.equal(targets.similarity, class_similarity(network.head.weight))


def test_similarity_of_a_convolution_as_classifier() -> None:
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    teacher = Teacher(network, SMALL)
    expected = 1 - cdist(*[network[2].weight.detach().flatten(1).numpy()] * 2, "cosine")
    np.testing.assert_allclose(ZskdTargets(teacher, ZskdSettings()).similarity.numpy(), expected, atol=1e-6)


def test_all_zero_classifier_row_is_named() -> None:
    network = small_teacher().model
    with torch.no_grad():
        network.head.weight[3] = 0
    with pytest.raises(UserError, match=r"Class 3 .*all-zero"):
        ZskdTargets(Teacher(network, SMALL), ZskdSettings())


def test_row_min_max() -> None:
    matrix = torch.randn(6, 6, generator=random(1))
    numbers = matrix.double().numpy()
    low, high = numbers.min(1, keepdims=True), numbers.max(1, keepdims=True)
    np.testing.assert_allclose(row_min_max(matrix).numpy(), (numbers - low) / (high - low), atol=1e-6)
    scaled = row_min_max(class_similarity(weights()))
    assert torch.equal(scaled.diagonal(), torch.ones(10))
    assert torch.equal(scaled.min(1).values, torch.zeros(10))


def test_row_min_max_of_a_constant_row() -> None:
    assert torch.equal(row_min_max(torch.full((3, 3), 0.4)), torch.eye(3))


def test_concentrations() -> None:
    similarity = class_similarity(weights())
    base = row_min_max(similarity).double().numpy()
    for beta in (1.0, 0.1, 3.0):
        np.testing.assert_allclose(concentrations(similarity, beta).numpy(), beta * base + 1e-4, rtol=1e-5, atol=1e-8)
    # What the released code shows with its own weights: 1.0001 on the diagonal, 1e-4 for the class least alike.
    ones = concentrations(similarity, 1.0)
    np.testing.assert_allclose(ones.diagonal().numpy(), 1.0001, rtol=1e-6)
    np.testing.assert_allclose(ones.min(1).values.numpy(), 1e-4, rtol=1e-3)
    np.testing.assert_allclose(concentrations(similarity, 1.0, ZskdSettings(floor=0.5)).min(1).values.numpy(), 0.5)


def test_the_authors_slip_cancels_beta() -> None:
    similarity = class_similarity(weights())
    slip = ZskdSettings(cancel_beta=True)
    first, second = concentrations(similarity, 1.0, slip), concentrations(similarity, 0.1, slip)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(first, concentrations(similarity, 1.0))
    plain = concentrations(similarity, 0.1)
    assert float((plain - concentrations(similarity, 1.0)).abs().max()) > 0.5


# The draws.

COUNT = 20_000
CONCENTRATIONS = {
    "mild": [1.0001, 0.3, 0.12, 1e-2, 0.7],
    "peaky": [0.1001, 0.03, 0.012, 1e-3, 0.07],
    "broad": [3.0, 8.0, 1.0, 5.0, 2.5],
    "even": [0.2] * 5,
}


@pytest.mark.parametrize("name", CONCENTRATIONS)
def test_mean_variance_and_covariance_of_the_draws(name: str) -> None:
    alpha = np.array(CONCENTRATIONS[name])
    drawn = sample_targets(np.tile(alpha, (COUNT, 1)), seed=5)
    assert np.isfinite(drawn).all()
    assert drawn.min() >= 0
    np.testing.assert_allclose(drawn.sum(1), 1, rtol=1e-12)
    theory = stats.dirichlet(alpha)
    variance, total = theory.var(), alpha.sum()
    assert np.all(np.abs(drawn.mean(0) - theory.mean()) < 5 * np.sqrt(variance / COUNT))
    for k, a in enumerate(alpha):
        marginal = stats.beta(a, total - a)
        fourth = (float(marginal.stats("k")) + 3) * variance[k] ** 2
        standard_error = np.sqrt((fourth - variance[k] ** 2) / COUNT)
        assert abs(drawn[:, k].var() - variance[k]) < 5 * standard_error, k
    covariance = -alpha[0] * alpha[4] / (total**2 * (total + 1))
    products = (drawn[:, 0] - theory.mean()[0]) * (drawn[:, 4] - theory.mean()[4])
    assert abs(products.mean() - covariance) < 5 * products.std() / np.sqrt(COUNT)


@pytest.mark.parametrize("name", ["mild", "broad", "even"])
def test_marginals_are_beta(name: str) -> None:
    alpha = np.array(CONCENTRATIONS[name])
    drawn = sample_targets(np.tile(alpha, (COUNT, 1)), seed=9)
    for k, a in enumerate(alpha):
        if a < 0.1:  # a share of the mass lies below the smallest float
            continue
        result = stats.kstest(drawn[:, k], stats.beta(a, alpha.sum() - a).cdf)
        assert result.pvalue > 1e-4, (k, result)


def test_a_wrong_concentration_would_be_noticed() -> None:
    alpha = np.array(CONCENTRATIONS["mild"])
    drawn = sample_targets(np.tile(alpha * 1.1, (COUNT, 1)), seed=9)
    assert stats.kstest(drawn[:, 0], stats.beta(alpha[0], alpha.sum() - alpha[0]).cdf).pvalue < 1e-4


def test_tiny_concentrations_are_one_hot_by_their_shares() -> None:
    """numpy's own sampler gives rows of 0/0 here."""
    alpha = np.array([1e-4, 1e-4, 2e-4, 4e-4])
    drawn = sample_targets(np.tile(alpha, (COUNT, 1)), seed=1)
    assert np.isfinite(drawn).all()
    np.testing.assert_allclose(drawn.sum(1), 1, rtol=1e-12)
    # E[max] is 1 - O(total), and the winner is k with probability alpha_k / total.
    assert (drawn.max(1) > 0.999).mean() > 0.99
    share, total = np.bincount(drawn.argmax(1), minlength=4) / COUNT, alpha.sum()
    expected = alpha / total
    assert np.all(np.abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / COUNT))
    assert np.all(np.abs(drawn.mean(0) - expected) < 5 * np.sqrt(expected * (1 - expected) / COUNT))


@pytest.mark.parametrize("scale", [1e-4, 1e-8])
def test_hundred_tiny_concentrations(scale: float) -> None:
    drawn = sample_targets(np.full((2000, 100), scale), seed=2)
    assert np.isfinite(drawn).all()
    np.testing.assert_allclose(drawn.sum(1), 1, rtol=1e-12)
    assert len(np.unique(drawn.argmax(1))) > 90


def test_draws_depend_on_the_seed_alone() -> None:
    alpha = np.tile(CONCENTRATIONS["mild"], (50, 1))
    assert np.array_equal(sample_targets(alpha, 3), sample_targets(alpha, 3))
    assert not np.array_equal(sample_targets(alpha, 3), sample_targets(alpha, 4))


# The plan.


@pytest.mark.parametrize("order", ["interleaved", "rows"])
@pytest.mark.parametrize("shard", [400, 70, 33])
def test_classes_equally_often_and_betas_half_and_half(order: str, shard: int) -> None:
    plan = ZskdTargets(small_teacher(classes=10), ZskdSettings(order=order))
    total = 400
    parts = [plan.rows(first, min(shard, total - first), total) for first in range(0, total, shard)]
    classes = torch.cat([part[0] for part in parts])
    betas = torch.cat([part[1] for part in parts])
    assert torch.equal(torch.bincount(classes * 2 + betas), torch.full((20,), 20))


def test_rows_come_in_one_go() -> None:
    plan = ZskdTargets(small_teacher(classes=10), ZskdSettings(order="rows"))
    classes, betas = plan.rows(0, 400, 400)
    assert classes.tolist() == [row % 10 for row in range(20) for _ in range(20)]
    assert betas.tolist() == [0] * 200 + [1] * 200
    later_classes, later_betas = plan.rows(190, 30, 400)
    assert torch.equal(later_classes, classes[190:220])
    assert torch.equal(later_betas, betas[190:220])


def test_interleaved_deals_out_in_turn() -> None:
    plan = ZskdTargets(small_teacher(classes=5), ZskdSettings(betas=(1.0, 0.1, 0.5)))
    classes, betas = plan.rows(0, 30, 30)
    assert classes.tolist() == list(range(5)) * 6
    assert betas.tolist() == ([0] * 5 + [1] * 5 + [2] * 5) * 2


def test_targets_are_drawn_from_the_row_of_their_class_and_beta() -> None:
    plan = ZskdTargets(small_teacher(), ZskdSettings())
    total = 50_000
    targets = plan.targets(0, total, total, seed=8)
    assert targets.dtype == torch.float32
    np.testing.assert_allclose(targets.sum(1).numpy(), 1, rtol=1e-5)
    classes, betas = plan.rows(0, total, total)
    for k in range(5):
        for b, beta in enumerate((1.0, 0.1)):
            rows = targets[(classes == k) & (betas == b)].double().numpy()
            alpha = concentrations(plan.similarity, beta)[k].double().numpy()
            theory = stats.dirichlet(alpha)
            assert np.all(np.abs(rows.mean(0) - theory.mean()) < 5 * np.sqrt(theory.var() / len(rows)) + 1e-6), (
                k,
                beta,
            )
    # beta 0.1 is peakier than beta 1
    peak = targets.max(1).values
    assert peak[betas == 1].mean() > peak[betas == 0].mean() + 0.1


def test_a_network_of_a_hundred_classes() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 100))
    plan = ZskdTargets(Teacher(network, SMALL), ZskdSettings())
    targets = plan.targets(0, 1000, 1000, seed=0)
    assert plan.similarity.shape == (100, 100)
    assert targets.shape == (1000, 100)
    assert torch.isfinite(targets).all()
    np.testing.assert_allclose(targets.sum(1).numpy(), 1, rtol=1e-5)
    classes, betas = plan.rows(0, 1000, 1000)
    assert torch.equal(torch.bincount(classes), torch.full((100,), 10))
    assert torch.equal(torch.bincount(betas), torch.tensor([500, 500]))


def test_two_classes() -> None:
    plan = ZskdTargets(small_teacher(classes=2), ZskdSettings())
    np.testing.assert_allclose(concentrations(plan.similarity, 1.0).numpy(), np.eye(2) + 1e-4, rtol=1e-5)
    assert torch.isfinite(plan.targets(0, 100, 100, 0)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"betas": ()}, "beta must be positive"),
        ({"betas": (1.0, 0.0)}, "beta must be positive"),
        ({"betas": (float("nan"),)}, "beta must be positive"),
        ({"betas": (float("inf"),)}, "beta must be positive"),
        ({"floor": 0.0}, "floor must be positive"),
        ({"order": "row"}, "interleaved or rows, not 'row'"),
    ],
)
def test_settings_outside_their_range(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZskdSettings(**arguments)


# The registry and the presets.


def test_methods_are_found_by_entry_point() -> None:
    assert "zskd" in method_names()
    assert find_method("zskd").name == "zskd"
    with pytest.raises(UserError, match="Did you mean 'zskd'"):
        find_method("zskdd")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_sound_and_may_be_changed(preset: str) -> None:
    method = find_method("zskd")
    options = method.options(preset, {})
    assert options.targets.betas == (1.0, 0.1)
    changed = method.options(preset, {"synthesis": {"max_steps": 7}, "targets": {"floor": 0.5}})
    assert changed.synthesis.max_steps == 7
    assert changed.synthesis.start == options.synthesis.start
    assert changed.targets.floor == 0.5
    assert method.options(preset, {}) == options, "a change must not stick to the preset"


def test_paper_preset_is_the_papers() -> None:
    options = find_method("zskd").options("paper", {})
    assert options.synthesis.temperature == 20
    assert options.synthesis.total_variation == (0, 0)
    assert options.synthesis.start == "uniform"
    assert options.synthesis.tolerance is None
    assert not options.targets.cancel_beta


def test_author_code_preset_is_the_released_code() -> None:
    options = find_method("zskd").options("author-code", {})
    s = options.synthesis
    assert (s.learning_rate, s.max_steps, s.slots, s.range, s.warm_start) == (1e-3, 1500, 100, "rescale", True)
    assert s.temperature == 20
    assert options.targets.cancel_beta
    assert options.targets.order == "rows"
    assert options.targets.floor == 1e-4


def test_unknown_presets_and_keys() -> None:
    method = find_method("zskd")
    with pytest.raises(ValueError, match="paper, author-code, best, best-colour, not 'bset'"):
        method.options("bset", {})
    with pytest.raises(ValueError, match=r"'synthesis.max_step'; did you mean 'max_steps'"):
        method.options("best", {"synthesis": {"max_step": 3}})


def test_similarity_does_not_depend_on_the_input() -> None:
    network = small_teacher().model
    first = ZskdTargets(Teacher(network, SMALL), ZskdSettings())
    second = ZskdTargets(Teacher(network, InputSpec((1, 8, 8), mean=(0.5,))), ZskdSettings())
    assert torch.equal(first.similarity, second.similarity)
