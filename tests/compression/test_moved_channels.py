"""Networks that merge the batch with other dimensions, normalise channels, or call PyTorch's rarer functions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni import NoiseSource, PruningConfig, distill, load_teacher, prune
from zskd_nni.compression.pruning import speedup
from zskd_nni.compression.pruning.dependency_config import plan_pruning
from zskd_nni.compression.pruning.masks import multiply_in
from zskd_nni.compression.pruning.speedup import CannotShrinkError, ShrinkResult, as_parameter_masks, shrink
from zskd_nni.models.teacher import Teacher
from zskd_nni.recipes.compression_config import CompressionRun
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.distillation import DistillationSettings

pruning = pytest.importorskip("nni.compression.pruning")

LAYERS = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]
IMAGES = torch.full((2, 3, 16, 16), 0.5)
QUIET = CompressionRun(quiet=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def half(network: nn.Module, images: Tensor = IMAGES) -> tuple[ShrinkResult, dict[str, str]]:
    """Half of the channels by the L1 norm, and why some layers keep theirs."""
    plan = plan_pruning(network.eval(), LAYERS, images)
    pruner = pruning.L1NormPruner(network, plan.config_list)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    result = shrink(network, masks, images)
    assert result.max_logit_difference < 1e-4
    return result, plan.left_out


def widths(result: ShrinkResult) -> dict[str, int]:
    return {row.name: row.outputs_after for row in result.layers}


class Between(nn.Module):
    """Three convolutions and a classifier; ``body`` computes what lies between the first and the second."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], **modules: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.c, self.fc = nn.Conv2d(24, 16, 3, padding=1), nn.Linear(16, 10)
        self.body = body
        for name, value in modules.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self, functional.relu(self.a(x)))
        return self.fc(functional.relu(self.c(functional.relu(self.b(x)))).mean((2, 3)))


# The batch merged with other dimensions.


def halves(x: Tensor, count: Any) -> Tensor:
    """``(N, C, H, W)`` as ``(2 N, C, H / 2, W)``."""
    n, c, h, w = x.shape
    return x.view(n, c, 2, h // 2, w).transpose(1, 2).reshape(count, c, h // 2, w)


def of_halves(network: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    x = torch.tanh(halves(x, n * 2))
    return x.view(n, 2, c, h // 2, w).transpose(1, 2).reshape(n, c, h, w)


def of_halves_counted(network: Any, x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    x = torch.tanh(halves(x, -1))
    return x.unflatten(0, (n, 2)).transpose(1, 2).flatten(2, 3).reshape(n, -1, h, w)


def tokens(network: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = network.second(functional.gelu(network.first(x.permute(0, 2, 3, 1).reshape(-1, c))))
    return y.view(n, h, w, -1).permute(0, 3, 1, 2)


def tokens_counted(network: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = network.second(functional.gelu(network.first(x.permute(0, 2, 3, 1).flatten(0, 2))))
    return y.reshape(n, h, w, c).permute(0, 3, 1, 2)


@pytest.mark.parametrize("body", [of_halves, of_halves_counted, tokens, tokens_counted])
def test_a_batch_that_is_merged_with_places(body: Callable[..., Tensor]) -> None:
    of_tokens = body in (tokens, tokens_counted)
    layers = {"first": nn.Linear(16, 32), "second": nn.Linear(32, 16)} if of_tokens else {}
    result, left_out = half(Between(body, **layers))
    assert left_out.keys() == {"fc"}
    wanted = {"a": 8, "b": 12, "c": 8, "fc": 10} | ({"first": 16, "second": 8} if of_tokens else {})
    assert widths(result) == wanted


class Video(nn.Module):
    """Frames ``(N, T, C, H, W)`` through one network, its features averaged over time."""

    def __init__(self, merge: Callable[[Tensor], Tensor], part: Callable[[Tensor, int, int], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1), nn.Linear(24, 10)
        self.merge, self.part = merge, part

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        x = functional.relu(self.b(functional.relu(self.a(self.merge(x))))).mean((2, 3))
        return self.fc(self.part(x, n, t).mean(1))


@pytest.mark.parametrize(
    ("merge", "part"),
    [
        (lambda x: x.view(x.shape[0] * x.shape[1], *x.shape[2:]), lambda x, n, t: x.view(n, t, -1)),
        (lambda x: x.flatten(0, 1), lambda x, n, t: x.unflatten(0, (n, t))),
        (lambda x: x.reshape(-1, *x.shape[2:]), lambda x, n, t: x.reshape(n, -1, x.shape[1])),
    ],
    ids=["view", "flatten", "reshape"],
)
def test_frames_beside_the_images(merge: Callable[..., Tensor], part: Callable[..., Tensor]) -> None:
    result, left_out = half(Video(merge, part), torch.full((2, 4, 3, 8, 8), 0.5))
    assert widths(result) == {"a": 8, "b": 12, "fc": 10} and left_out.keys() == {"fc"}


class Patches(nn.Module):
    """Four parts of each image through one network, as of a transformer's windows."""

    def __init__(self, count: int | None) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1), nn.Linear(24, 10)
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.reshape(n, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(-1 if self.count is None else n * self.count, c, h // 2, w // 2)
        x = functional.relu(self.b(functional.relu(self.a(x)))).mean((2, 3))
        return self.fc(x.view(n, -1, x.shape[1]).mean(1) if self.count is None else x.view(n, self.count, -1).mean(1))


@pytest.mark.parametrize("count", [4, None])
def test_parts_of_an_image_as_images(count: int | None) -> None:
    result, left_out = half(Patches(count))
    assert widths(result) == {"a": 8, "b": 12, "fc": 10} and left_out.keys() == {"fc"}


def channels_into_the_batch(network: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return torch.tanh(x.reshape(n * c, 1, h, w)).reshape(n, c, h, w)


def a_number_of_channels(network: Any, x: Tensor) -> Tensor:
    return torch.tanh(x.reshape(-1, 2, 16, 8, 16)).reshape(-1, 16, 16, 16)


@pytest.mark.parametrize("body", [channels_into_the_batch, a_number_of_channels])
def test_channels_that_leave_their_dimension_stay(body: Callable[..., Tensor]) -> None:
    result, left_out = half(Between(body))
    assert widths(result) == {"a": 16, "b": 12, "c": 8, "fc": 10}
    assert "view" in left_out["a"] or "reshape" in left_out["a"]


# Functions and layers that leave channels where they are.


@pytest.mark.parametrize(
    "body",
    [
        lambda n, x: functional.threshold(x, 0.1, 0.0),
        lambda n, x: functional.hardshrink(x, 0.2),
        lambda n, x: functional.softshrink(x, 0.1),
        lambda n, x: functional.hardtanh(x),
        lambda n, x: functional.rrelu(x),
        lambda n, x: functional.alpha_dropout(x, 0.1, n.training),
        lambda n, x: functional.prelu(torch.tanh(x), n.slope),
        lambda n, x: functional.lp_pool2d(x, 2, 2),
        lambda n, x: functional.normalize(x),
        lambda n, x: functional.normalize(x, dim=-1),
        lambda n, x: functional.instance_norm(x),
        lambda n, x: x**2,
        lambda n, x: torch.pow(x, 0.5),
        lambda n, x: x.clamp_min(0.0).clamp(-1, 2),
        lambda n, x: x.clamp(max=3.0),
        lambda n, x: torch.flip(x, [3]).roll(1, 2),
        lambda n, x: torch.maximum(x, torch.tanh(x)),
        lambda n, x: x.narrow(2, 0, 8).index_select(3, torch.arange(8)),
        lambda n, x: torch.tanh(x.flatten(2)).view_as(x),
        lambda n, x: torch.tanh(x.flatten(2)).reshape_as(x),
        lambda n, x: torch.tanh(x.flatten(2)).unflatten(2, (16, 16)),
    ],
)
def test_functions_that_leave_channels_where_they_are(body: Callable[..., Tensor]) -> None:
    result, left_out = half(Between(body, slope=nn.Parameter(torch.full((1,), 0.2))))
    assert widths(result) == {"a": 8, "b": 12, "c": 8, "fc": 10} and left_out.keys() == {"fc"}


@pytest.mark.parametrize(
    "layer",
    [
        nn.InstanceNorm2d(16),
        nn.LPPool2d(2, 2),
        nn.Threshold(0.1, 0.0),
        nn.AlphaDropout(0.1),
        nn.Hardshrink(),
        nn.Softsign(),
        nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (16, 16))),
        nn.Sequential(nn.Flatten(2), nn.LPPool1d(2, 2), nn.AvgPool1d(2), nn.Unflatten(2, (8, 8))),
    ],
)
def test_layers_that_leave_channels_where_they_are(layer: nn.Module) -> None:
    result, left_out = half(Between(lambda n, x: n.layer(x), layer=layer))
    assert {name: width for name, width in widths(result).items() if name in "abc"} == {"a": 8, "b": 12, "c": 8}
    assert left_out.keys() == {"fc"}


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (lambda n, x: x.clamp(0.5, 2), "padding of b"),
        (lambda n, x: functional.threshold(x, 0.1, 0.3), "padding of b"),
        (lambda n, x: functional.normalize(torch.exp(x)), "normalize"),
        (lambda n, x: torch.flip(x, [1]), "flip"),
        (lambda n, x: x.roll(1), "roll"),
        (lambda n, x: x.narrow(1, 0, 16), "narrow"),
        (lambda n, x: x.cumsum(1), "cumsum"),
        (lambda n, x: functional.prelu(x, n.slopes), "prelu"),
    ],
)
def test_functions_that_hold_channels(body: Callable[..., Tensor], word: str) -> None:
    result, left_out = half(Between(body, slopes=nn.Parameter(torch.rand(16))))
    assert widths(result) == {"a": 16, "b": 12, "c": 8, "fc": 10} and word in left_out["a"]


@pytest.mark.parametrize(
    "body",
    [
        lambda n, x: torch.where(x > 0, x, torch.zeros_like(x)),
        lambda n, x: torch.where(x.ge(0.0), x, x * 0.1),
        lambda n, x: x * (x > 0),
        lambda n, x: x.masked_fill(x < 0.1, 0.0),
        lambda n, x: x * (x > 0).float(),
    ],
)
def test_comparisons_are_no_empty_channels(body: Callable[..., Tensor]) -> None:
    """NNI draws positive values: that they are above 0 is the same for all images, and not a removed channel."""
    result, _ = half(Between(body))
    assert {name: width for name, width in widths(result).items() if name != "a"} == {"b": 12, "c": 8, "fc": 10}


# Normalisations over channels: what is in front of them stays, and the hidden layers behind them go.


class ChannelsLast(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = functional.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Block(nn.Module):
    """ConvNeXt's, with linear layers or with 1x1 convolutions."""

    def __init__(self, width: int, linear: bool) -> None:
        super().__init__()
        self.depthwise, self.linear = nn.Conv2d(width, width, 7, padding=3, groups=width), linear
        self.norm: nn.Module = nn.LayerNorm(width) if linear else ChannelsLast(width)
        layer: Any = nn.Linear if linear else lambda before, after: nn.Conv2d(before, after, 1)
        self.expand, self.project = layer(width, 4 * width), layer(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x)
        y = y.permute(0, 2, 3, 1) if self.linear else y
        y = self.project(functional.gelu(self.expand(self.norm(y))))
        return x + (y.permute(0, 3, 1, 2) if self.linear else y)


@pytest.mark.parametrize("linear", [True, False])
def test_the_hidden_layers_of_convnext_go(linear: bool) -> None:
    stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), ChannelsLast(16))
    network = nn.Sequential(
        stem, Block(16, linear), Block(16, linear), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )
    result, left_out = half(network)
    found = widths(result)
    assert found["1.expand"] == found["2.expand"] == 32 and found["1.project"] == found["0.0"] == 16
    assert "mean and variance are over all of them" in left_out["0.0"] and "1.expand" not in left_out


@pytest.mark.parametrize("norm", [lambda: nn.GroupNorm(4, 16), lambda: nn.GroupNorm(1, 16), lambda: ChannelsLast(16)])
def test_what_is_normalised_together_stays_and_says_so(norm: Callable[[], nn.Module]) -> None:
    result, left_out = half(Between(lambda n, x: n.norm(x), norm=norm()))
    assert widths(result) == {"a": 16, "b": 12, "c": 8, "fc": 10} and "mean and variance are over" in left_out["a"]


def test_an_instance_norm_with_weights_leaves_its_bias() -> None:
    """What it adds to an empty channel goes into the bias of a layer without padding."""
    network = Between(lambda n, x: n.norm(x), norm=nn.InstanceNorm2d(16, affine=True))
    assert "padding of b" in half(network)[1]["a"]
    unpadded = Between(lambda n, x: n.norm(x), norm=nn.InstanceNorm2d(16, affine=True))
    unpadded.b = nn.Conv2d(16, 24, 1)
    with torch.no_grad():
        unpadded.norm.bias.uniform_(-1, 1)  # type: ignore[union-attr, operator]
    result, left_out = half(unpadded)
    assert widths(result)["a"] == 8 and left_out.keys() == {"fc"} and "folded" in result.note


# Depthwise convolutions that make several channels of each.


class Multiplied(nn.Module):
    def __init__(self, times: int, norm: bool) -> None:
        super().__init__()
        self.a, self.p, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16 * times, 24, 1), nn.Linear(24, 10)
        self.depthwise = nn.Conv2d(16, 16 * times, 3, padding=1, groups=16, bias=not norm)
        self.norm: nn.Module = nn.BatchNorm2d(16 * times) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.depthwise(functional.relu(self.a(x)))))
        return self.fc(functional.relu(self.p(x)).mean((2, 3)))


@pytest.mark.parametrize(("times", "after"), [(2, 16), (3, 32), (4, 32)])
@pytest.mark.parametrize("norm", [True, False])
def test_a_channel_multiplier_loses_as_many_in_each_group(times: int, after: int, norm: bool) -> None:
    result, left_out = half(Multiplied(times, norm))
    assert widths(result)["depthwise"] == after and widths(result)["p"] == 12 and left_out.keys() == {"fc"}


def test_a_multiplier_on_the_image_itself() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 12, 3, groups=3),
        nn.ReLU(),
        nn.Conv2d(12, 8, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 14 * 14, 10),
    )
    result, _ = half(network)
    assert widths(result) == {"0": 6, "2": 4, "5": 10}


# Gradients that the caller has switched off, and what a refusal advises.


def test_work_under_no_grad() -> None:
    teacher = load_teacher("lenet5-digits")
    images, settings = NoiseSource(teacher.spec, 8), DistillationSettings(steps=2, batch=8)
    conv = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    with torch.no_grad():
        pruned = prune(teacher.student(), PruningConfig(conv, steps=2), teacher, images, settings, run=QUIET)
        student = teacher.student()
        distill(student, teacher, images, settings, quiet=True)
        assert not torch.is_grad_enabled()
    assert pruned.network.conv1.out_channels == 3  # type: ignore[union-attr]
    assert not torch.equal(student.fc3.weight, teacher.model.fc3.weight)  # type: ignore[union-attr, arg-type]


def test_inference_mode_is_refused_by_name() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    teacher = Teacher(network, (1, 8, 8))
    with torch.inference_mode():
        for work in (
            lambda: Teacher(network, (1, 8, 8)),
            lambda: plan_pruning(network, LAYERS, torch.zeros(2, 1, 8, 8)),
            lambda: distill(network, teacher, NoiseSource(teacher.spec, 8), DistillationSettings(steps=1, batch=8)),
        ):
            with pytest.raises(UserError, match="inference_mode"):
                work()


def test_advice_that_was_followed_is_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Between(lambda n, x: x).eval()
    plan = plan_pruning(network, LAYERS, IMAGES)
    pruner = pruning.L1NormPruner(network, plan.config_list)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    monkeypatch.setattr(speedup, "compare", lambda *_: (1.0, None))
    with pytest.raises(CannotShrinkError, match="agree already") as refused:
        shrink(network, masks, IMAGES, graph=plan.graph)
    assert "complete_config_list, which" not in str(refused.value)
    masks["fc"] = {"weight": torch.ones(10, 16), "bias": torch.ones(10)}
    masks["fc"]["weight"][0] = 0  # a class, which no completed config prunes
    with pytest.raises(CannotShrinkError, match="complete_config_list, which"):
        shrink(network, masks, IMAGES, graph=plan.graph)


def test_masks_that_zero_nothing_say_so() -> None:
    network = Between(lambda n, x: x).eval()
    assert "zero nothing" in shrink(network, {"a": {"weight": torch.ones(16, 3, 3, 3)}}, IMAGES).note
    assert "zero nothing" in shrink(network, {}, IMAGES).note


# Channels that are silent for the dummy input alone.


class Tokens(nn.Module):
    """Features as ``(1, N, C)``: the first dimension is not the batch, and there is a ReLU behind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.hidden, self.fc = nn.Linear(32, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.b(functional.relu(self.a(x)))).mean((2, 3)).reshape(-1, len(x), 32)
        return self.fc(functional.relu(self.hidden(x)).squeeze(0))


class Pairs(nn.Module):
    """Pairs of features ``(32 N, 2)`` through layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(768, 64), nn.Linear(64, 10)
        self.own = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.own(self.first(x.flatten(1)).reshape(-1, 2)).reshape(len(x), -1))


@pytest.mark.parametrize("make", [Tokens, Pairs, lambda: Patches(4), lambda: Between(of_halves)])
@pytest.mark.parametrize("seed", range(3))
def test_channels_that_are_silent_for_the_dummy_input_alone_stay(make: Callable[[], nn.Module], seed: int) -> None:
    torch.manual_seed(seed)
    network = make().eval()
    plan = plan_pruning(network, LAYERS, IMAGES)
    pruner = pruning.L1NormPruner(network, plan.config_list)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    result = shrink(network, masks, IMAGES)
    masked = copy.deepcopy(network)
    multiply_in(masked, as_parameter_masks(masked, masks))
    for scale in (1.0, -10.0, 100.0):
        images = scale * torch.randn(32, *IMAGES.shape[1:])
        with torch.no_grad():
            expected, found = masked(images), result.model(images)
        assert (expected - found).abs().max() <= 1e-4 * expected.abs().max()
    whole = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    for name, width in widths(result).items():
        if name not in masks:
            assert width == len(whole[name].weight)  # type: ignore[arg-type]
