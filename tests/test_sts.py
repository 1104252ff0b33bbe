"""STS against SciPy, NumPy and loops written out: the feature model, the pushed targets, the activation term."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL, make_store, random, shard_hashes, small_network, small_teacher, soft_targets
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.methods import zskd
from zskd_nni.methods.registry import TransferRequest, find_method
from zskd_nni.methods.sts import PRESETS, StsSettings, StsTargets, activation_loss, draw_features, unit_rows
from zskd_nni.models.hooks import FeaturePoint
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.rng import generator
from zskd_nni.synthesis import FeatureTerm, ShardInputs, SynthesisSettings, synthesize, synthesize_shard

COUNT = 40_000


def correlation(weights: Tensor) -> np.ndarray:
    """Equation 1, one pair at a time."""
    rows = weights.double().flatten(1).numpy()
    result = np.empty((len(rows), len(rows)))
    for i, first in enumerate(rows):
        for j, second in enumerate(rows):
            result[i, j] = sum(first * second) / (sum(first**2) ** 0.5 * sum(second**2) ** 0.5)
    return result


def check_moments(drawn: Tensor, mean: float, covariance: np.ndarray) -> None:
    """Mean and covariance within five standard errors, every marginal normal."""
    h = drawn.double().numpy()
    variance = covariance.diagonal()
    assert np.all(np.abs(h.mean(0) - mean) < 5 * np.sqrt(variance / len(h)))
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / len(h))  # of a normal's covariance (Wishart)
    assert np.all(np.abs(np.cov(h.T) - covariance) < 5 * error)
    for unit in range(0, h.shape[1], 5):
        assert stats.kstest(h[:, unit], stats.norm(mean, variance[unit] ** 0.5).cdf).pvalue > 1e-4


@pytest.mark.parametrize(
    ("settings", "deviation"),
    [
        (StsSettings(sigma=1.5), 1.5),
        (StsSettings(sigma=1.5, sigma_is="variance", mean=0.7), 1.5**0.5),
        (StsSettings(sigma=0.3, mean=-1), 0.3),
    ],
)
def test_draws_have_the_mean_and_covariance_of_the_model(settings: StsSettings, deviation: float) -> None:
    weights = torch.randn(12, 7, generator=random(0))  # more units than inputs: R has not full rank
    expected = deviation**2 * correlation(weights)
    drawn = draw_features(unit_rows(weights), COUNT, settings, random(1))
    check_moments(drawn, settings.mean, expected)
    with pytest.raises(AssertionError):
        check_moments(drawn * 1.05, settings.mean, expected)


def test_a_unit_without_weights_does_not_vary() -> None:
    weights = torch.randn(4, 3, generator=random(0))
    weights[2] = 0
    drawn = draw_features(unit_rows(weights), 100, StsSettings(mean=0.5), random(1))
    assert torch.equal(drawn[:, 2], torch.full((100,), 0.5))
    assert float(drawn[:, 1].std()) > 1


def test_the_papers_layer_is_the_input_of_the_classifier_and_its_rows_come_in() -> None:
    teacher = small_teacher()
    plan = StsTargets(teacher, StsSettings())
    assert (plan.point, plan.shape, plan.weights_path) == (FeaturePoint("head", "input"), (24,), "hidden")
    torch.testing.assert_close(
        plan.rows @ plan.rows.T, torch.from_numpy(correlation(teacher.model.hidden.weight)).float()
    )
    assert plan.identity["layer"] == "head"


def test_outgoing_columns_on_request() -> None:
    teacher = small_teacher()
    plan = StsTargets(teacher, StsSettings(weights="outgoing"))
    assert plan.weights_path == "head"
    torch.testing.assert_close(
        plan.rows @ plan.rows.T, torch.from_numpy(correlation(teacher.model.head.weight.T)).float()
    )


def test_targets_are_the_rest_of_the_teacher_on_the_draws() -> None:
    teacher = small_teacher()
    plan = StsTargets(teacher, StsSettings(sigma=2.0, temperature=3.0))
    h = draw_features(plan.rows, 50, plan.settings, generator(9, "features"))
    head = teacher.model.head
    for row, target in zip(h, plan.targets(0, 50, 50, 9), strict=True):
        z = [float((w * row).sum() + b) / 3 for w, b in zip(head.weight, head.bias, strict=True)]
        e = np.exp(np.array(z) - max(z))
        np.testing.assert_allclose(target.numpy(), e / e.sum(), atol=1e-5)


def test_any_layer_by_path_goes_through_everything_behind_it() -> None:
    teacher = small_teacher()
    plan = StsTargets(teacher, StsSettings(layer="hidden", temperature=1.0))
    h = plan.features(30, generator(4, "features"))
    expected = teacher.model.head(torch.tanh(h)).softmax(1)
    torch.testing.assert_close(plan.targets(0, 30, 30, 4), expected)

    plan = StsTargets(teacher, StsSettings(layer="conv", temperature=1.0))
    assert plan.shape == (6, 3, 3)
    m = teacher.model
    h = plan.features(30, generator(4, "features"))
    expected = m.head(torch.tanh(m.hidden(m.act(m.norm(h)).flatten(1)))).softmax(1)
    torch.testing.assert_close(plan.targets(0, 30, 30, 4), expected)


def test_positions_of_a_convolution_independent_or_shared() -> None:
    teacher = small_teacher()
    expected = 1.5**2 * correlation(teacher.model.conv.weight)
    plan = StsTargets(teacher, StsSettings(layer="conv"))
    h = plan.features(6000, random(0))
    check_moments(h.permute(0, 2, 3, 1).reshape(-1, 6)[:COUNT], 0, expected)
    a, b = h[:, 0, 0, 0].numpy(), h[:, 0, 2, 1].numpy()
    assert abs(stats.pearsonr(a, b)[0]) < 5 / 6000**0.5
    shared = StsTargets(teacher, StsSettings(layer="conv", spatial="shared")).features(100, random(0))
    assert torch.equal(shared, shared[:, :, :1, :1].expand_as(shared))


def test_a_flattened_convolution_knows_its_outgoing_columns() -> None:
    teacher = small_teacher()
    plan = StsTargets(teacher, StsSettings(layer="conv", weights="outgoing"))
    assert plan.weights_path == "hidden"
    columns = teacher.model.hidden.weight.view(24, 6, 9).permute(1, 0, 2).flatten(1)
    torch.testing.assert_close(plan.rows, columns / columns.norm(dim=1, keepdim=True))


def test_clamping() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 5))
    rectified, smooth = Teacher(network, SMALL), small_teacher()
    free = StsTargets(rectified, StsSettings()).features(500, random(0))
    assert float(free.min()) < -1
    for clamp in ("relu", "auto"):
        plan = StsTargets(rectified, StsSettings(clamp=clamp))
        assert plan.clamped
        assert torch.equal(plan.features(500, random(0)), free.clamp_min(0))
    assert not StsTargets(smooth, StsSettings(clamp="auto")).clamped
    assert StsTargets(smooth, StsSettings(clamp="relu")).clamped


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        return self.head(torch.relu(x + self.second(x)))


def test_what_cannot_be_modelled_is_said() -> None:
    teacher = Teacher(Shortcut(), SMALL)
    with pytest.raises(UserError, match=r"the output of 'second'.*shortcut"):
        StsTargets(teacher, StsSettings(layer="second"))
    assert StsTargets(teacher, StsSettings(layer="first")).shape == (16,)
    with pytest.raises(UserError, match=r"The teacher has no module 'fc2'"):
        StsTargets(small_teacher(), StsSettings(layer="fc2"))
    flat = Teacher(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)), SMALL)
    with pytest.raises(UserError, match=r"make the 144 units .*'0', has other units.*weights: outgoing"):
        StsTargets(flat, StsSettings())
    assert StsTargets(flat, StsSettings(weights="outgoing")).weights_path == "3"
    linear = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), SMALL)
    with pytest.raises(UserError, match=r"make the 64 units .*there is none"):
        StsTargets(linear, StsSettings())


@pytest.mark.parametrize("arguments", [{"sigma": 1e300}, {"mean": 1e300}])
def test_features_too_large_for_the_teacher_are_not_called_a_shortcut(arguments: dict[str, float]) -> None:
    with pytest.raises(UserError, match="not finite: the mean or sigma of the features is too large"):
        StsTargets(small_teacher(), StsSettings(**arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"sigma": float("nan")}, "sigma must be positive"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"activation_weight": -0.1}, "activation_weight must not be negative"),
        ({"mean": float("inf")}, "mean must be a number"),
        ({"weights": "rows"}, "weights is one of incoming, outgoing, not 'rows'"),
        ({"sigma_is": "std"}, "sigma_is is one of"),
        ({"clamp": "yes"}, "clamp is one of"),
        ({"spatial": "same"}, "spatial is one of"),
    ],
)
def test_settings_outside_their_range(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StsSettings(**arguments)


def test_a_network_of_a_hundred_classes() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 100))
    plan = StsTargets(Teacher(network, SMALL), StsSettings(temperature=0.2))
    targets = plan.targets(0, 3000, 3000, seed=0)
    assert targets.shape == (3000, 100)
    assert torch.isfinite(targets).all()
    np.testing.assert_allclose(targets.sum(1).numpy(), 1, rtol=1e-5)
    assert len(targets.argmax(1).unique()) > 90
    assert torch.equal(targets, plan.targets(0, 3000, 3000, seed=0))
    assert not torch.equal(targets, plan.targets(0, 3000, 3000, seed=1))


# The activation term in the engine.


def inputs(count: int, temperature: float = 20.0) -> ShardInputs:
    return ShardInputs(
        soft_targets(count, 5),
        torch.rand((count, *SMALL.shape), generator=random(0)),
        torch.full((count, 1), temperature),
        torch.zeros(count),
        torch.full((count,), 8.0),
    )


def by_hand(teacher: Teacher, asked: ShardInputs, one: int, weight: float, steps: int = 8) -> Tensor:
    """Equation 5 for one image with torch's Adam, at the temperature that is asked for."""
    temperature = float(asked.temperatures[one])
    x = asked.starts[one : one + 1].clone().requires_grad_(True)
    optimizer = torch.optim.Adam([x], 0.05)
    model = teacher.model
    for _ in range(steps):
        hidden = torch.tanh(model.hidden(model.act(model.norm(model.conv(x))).flatten(1)))
        cross = -(asked.targets[one] * functional.log_softmax(model.head(hidden) / temperature, 1)).sum()
        loss = cross - weight * hidden.abs().sum() / 24
        (x.grad,) = torch.autograd.grad(loss, x)
        optimizer.step()
        with torch.no_grad():
            x.clamp_(0, 1)
    return x.detach()


@pytest.mark.parametrize("temperature", [20.0, 1.0])
def test_the_activation_term_against_a_loop(temperature: float) -> None:
    """Its weight is beside the divergence, whatever the temperature."""
    teacher, asked = small_teacher(), inputs(3, temperature)
    settings = SynthesisSettings(max_steps=8)
    term = FeatureTerm(FeaturePoint("head", "input"), 0.4, activation_loss)
    made = synthesize_shard(teacher, asked, settings, None, term)
    plain = synthesize_shard(teacher, asked, settings)
    for one in range(3):
        torch.testing.assert_close(made.images[one : one + 1], by_hand(teacher, asked, one, 0.4), rtol=0, atol=2e-4)
        torch.testing.assert_close(plain.images[one : one + 1], by_hand(teacher, asked, one, 0.0), rtol=0, atol=2e-4)
    assert float((made.images - plain.images).abs().max()) > 0.01


def test_activation_loss_is_minus_the_mean_absolute_feature() -> None:
    features = torch.randn(3, 4, 2, 2, generator=random(0))
    for row, value in zip(features, activation_loss(features), strict=True):
        assert float(value) == pytest.approx(-np.abs(row.numpy()).mean(), rel=1e-6)


def test_a_strong_term_makes_strong_activations() -> None:
    teacher, asked = small_teacher(), inputs(20)
    strengths = []
    for weight in (0.0, 5.0):
        term = FeatureTerm(FeaturePoint("hidden"), weight, activation_loss)
        made = synthesize_shard(teacher, asked, SynthesisSettings(max_steps=8), None, term)
        m = teacher.model
        strengths.append(float(m.hidden(m.act(m.norm(m.conv(made.images))).flatten(1)).abs().mean()))
    assert strengths[1] > strengths[0] * 1.1


# The method.


def test_a_store_of_sts_resumes_and_is_another_than_one_without_the_term(tmp_path: Path) -> None:
    teacher = small_teacher()
    settings = SynthesisSettings(max_steps=5, shard=20, slots=10)

    def make(folder: str, **changes: float) -> None:
        plan = StsTargets(teacher, StsSettings(**changes))
        synthesize(teacher, plan, settings, size=60, seed=1, folder=tmp_path / folder, quiet=True)

    make("a")
    make("b")
    assert shard_hashes(tmp_path / "a") == shard_hashes(tmp_path / "b")
    (tmp_path / "b" / "shard-00001.safetensors").unlink()
    make("b")
    assert shard_hashes(tmp_path / "a") == shard_hashes(tmp_path / "b")
    with pytest.raises(UserError, match=r"targets\.activation_weight is 0\.05 there, 0\.0 here"):
        make("a", activation_weight=0.0)
    make("c", activation_weight=0.0)
    assert shard_hashes(tmp_path / "a") != shard_hashes(tmp_path / "c")


def test_stores_without_a_term_are_what_they_were(tmp_path: Path) -> None:
    """No key of a term in a store's identity: stores made before there were terms are taken up."""
    store = make_store(tmp_path / "s", size=20)
    assert "term" not in str(store.manifest["identity"])
    assert set(store.manifest["identity"]) == {"teacher", "input", "targets", "synthesis", "size", "seed"}


def test_presets() -> None:
    method = find_method("sts")
    paper, best = method.options("paper", {}), method.options("best", {})
    assert (paper.targets.layer, paper.targets.sigma, paper.targets.activation_weight) == (None, 1.5, 0.05)
    assert (paper.targets.temperature, paper.synthesis.temperature) == (1, 1)
    assert best.synthesis == find_method("zskd").options("best", {}).synthesis
    published = find_method("zskd").options("paper", {}).synthesis
    chosen = {"temperature": 1.0, "learning_rate": 0.05, "max_steps": 100, "start": "black"}
    assert paper.synthesis == replace(published, **chosen)
    changed = method.options("paper", {"targets": {"sigma": 2}, "synthesis": {"max_steps": 3}})
    assert (changed.targets.sigma, changed.targets.activation_weight, changed.synthesis.max_steps) == (2, 0.05, 3)
    assert zskd.PRESETS["paper"]["synthesis"]["max_steps"] == 30, "a change must not stick to the preset"
    assert PRESETS["paper"]["targets"]["sigma"] == 1.5
    with pytest.raises(ValueError, match="preset: sts has paper, best, not 'bst'"):
        method.options("bst", {})
    with pytest.raises(ValueError, match=r"'targets.sigm'; did you mean 'sigma'"):
        method.options("paper", {"targets": {"sigm": 2}})


def test_the_method_makes_a_source(tmp_path: Path) -> None:
    method = find_method("sts")
    options = method.options("best", {"synthesis": {"max_steps": 4}})
    teacher = Teacher(small_network(), InputSpec((1, 8, 8), mean=(0.3,), std=(0.5,)))
    source = method.source(teacher, TransferRequest(30, 8, 0, tmp_path / "i", options, quiet=True))
    images = source.batch(0, random(0))
    assert source.size == 30
    assert images.shape == (8, 1, 8, 8)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1


class Dense(nn.Module):
    """The second convolution takes the first one's channels and the image's: its columns are not the units' alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.repeat(1, 8, 1, 1)
        return self.head(self.conv2(torch.cat([self.conv1(x), x], 1)).mean((2, 3)))


def test_columns_of_a_convolution_that_takes_other_channels_too_are_refused() -> None:
    teacher = Teacher(Dense(), SMALL)
    with pytest.raises(UserError, match="No linear layer or convolution was found to take the 8 units"):
        StsTargets(teacher, StsSettings(layer="conv1", weights="outgoing"))
