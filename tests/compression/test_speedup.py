"""Shrunken networks compute what the masked ones compute, or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.compression.pruning import speedup
from zskd_nni.compression.pruning.constant_folding import bias_of_constants
from zskd_nni.compression.pruning.dependency_config import complete_config_list
from zskd_nni.compression.pruning.speedup import ShrinkResult, shrink
from zskd_nni.models.local_response_norm import PrunedLocalResponseNorm
from zskd_nni.models.serialization import load_network, save_network
from zskd_nni.models.zoo import alexnet, lenet5, wrn
from zskd_nni.runtime.errors import UserError

pruning = pytest.importorskip("nni.compression.pruning")

CONVOLUTIONS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
ALL = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]


def torchvision_model(name: str, **options: Any) -> nn.Module:
    return getattr(torchvision.models, name)(weights=None, num_classes=10, **options)


def small_vgg() -> nn.Module:
    """vgg11_bn without its 120 million parameters of classifier."""
    model = torchvision_model("vgg11_bn")
    model.classifier = nn.Sequential(nn.Linear(512 * 49, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))
    return model


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    size: int
    largest_share: float  # of the parameters that may be left
    config: tuple[dict[str, Any], ...] = tuple(CONVOLUTIONS)
    channels: int = 3


def of_torchvision(name: str, largest_share: float, size: int = 64, **options: Any) -> Case:
    return Case(lambda: torchvision_model(name, **options), size, largest_share)


CASES = {
    "lenet5": Case(lenet5, 32, 0.59, channels=1),
    "alexnet": Case(alexnet, 32, 0.41),
    "wrn-16-1": Case(lambda: wrn(16, 1), 32, 0.26),
    "wrn-40-2": Case(lambda: wrn(40, 2), 32, 0.26),
    "resnet18": of_torchvision("resnet18", 0.26),
    "mobilenet_v2": of_torchvision("mobilenet_v2", 0.35),
    "densenet121": of_torchvision("densenet121", 0.30, size=32),
    "efficientnet_b0": of_torchvision("efficientnet_b0", 0.30),
    "regnet_y_400mf": of_torchvision("regnet_y_400mf", 0.30),
    "shufflenet_v2_x0_5": of_torchvision("shufflenet_v2_x0_5", 0.60),
    "lenet5 with linear": Case(lenet5, 32, 0.27, tuple(ALL), 1),
    "alexnet with linear": Case(alexnet, 32, 0.26, tuple(ALL)),
    "vgg11_bn with linear": Case(small_vgg, 32, 0.30, tuple(ALL)),
    "mobilenet_v3_small with linear": Case(lambda: torchvision_model("mobilenet_v3_small"), 64, 0.30, tuple(ALL)),
}
SLOW = {
    "resnet34": of_torchvision("resnet34", 0.26),
    "vgg11_bn": Case(small_vgg, 32, 0.35),
    "googlenet": of_torchvision("googlenet", 0.30, init_weights=False),
    "resnext50_32x4d": of_torchvision("resnext50_32x4d", 0.28),
    "squeezenet1_0": of_torchvision("squeezenet1_0", 0.30),
}


def randomised(model: nn.Module) -> nn.Module:
    """Random BatchNorm statistics and affine parameters, so that a channel left behind would show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, 0.0, 0.1)
    return model


def relative_difference(expected: Tensor, actual: Tensor) -> float:
    """Relative to the largest logit, which is stricter than ``shrink`` is."""
    return ((expected - actual).abs().max() / expected.abs().max()).item()


@dataclass
class Shrunken:
    case: Case
    original: nn.Module
    state: dict[str, Tensor]
    masks: dict[str, dict[str, Tensor]]
    probe: Tensor
    original_logits: Tensor
    wrapped_logits: Tensor  # of NNI's own masked network: what a distillation would have trained
    result: ShrinkResult


@pytest.fixture(scope="module", params=[*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def shrunken(request: pytest.FixtureRequest) -> Shrunken:
    case = {**CASES, **SLOW}[request.param]
    torch.manual_seed(3)
    model = randomised(case.build())
    probe = torch.randn(4, case.channels, case.size, case.size)
    dummy = torch.rand(1, case.channels, case.size, case.size)
    original_logits = logits(model, probe)
    pruner = pruning.L1NormPruner(model, complete_config_list(model, list(case.config), dummy))
    _, masks = pruner.compress()
    wrapped_logits = logits(model, probe)
    pruner.unwrap_model()
    model.train()
    state = deepcopy(model.state_dict())
    result = shrink(model, masks, dummy)
    return Shrunken(case, model, state, masks, probe, original_logits, wrapped_logits, result)


def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    training = model.training
    with torch.no_grad():
        result = model.eval()(inputs)
    model.train(training)
    return result


def test_the_shrunken_network_computes_what_nnis_masked_network_computes(shrunken: Shrunken) -> None:
    assert relative_difference(shrunken.wrapped_logits, logits(shrunken.result.model, shrunken.probe)) < 1e-4
    assert shrunken.result.max_logit_difference < 1e-4
    assert shrunken.result.argmax_agreement == 1.0
    # ... and the masks did something.
    assert relative_difference(shrunken.original_logits, shrunken.wrapped_logits) > 1e-2


def test_the_shrunken_network_is_really_smaller(shrunken: Shrunken) -> None:
    result = shrunken.result
    assert result.shrunken
    assert result.parameters_before == sum(p.numel() for p in shrunken.original.parameters())
    assert result.parameters_after == sum(p.numel() for p in result.model.parameters())
    assert result.parameters_after <= shrunken.case.largest_share * result.parameters_before


def test_training_goes_on_after_shrinking(shrunken: Shrunken) -> None:
    model = deepcopy(shrunken.result.model)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    functional.cross_entropy(model(shrunken.probe), torch.arange(4)).backward()
    optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_the_state_dict_and_a_copy_carry_the_shrunken_network(shrunken: Shrunken) -> None:
    expected = logits(shrunken.result.model, shrunken.probe)
    copy = deepcopy(shrunken.result.model)
    assert torch.equal(logits(copy, shrunken.probe), expected)
    with torch.no_grad():
        for tensor in copy.state_dict().values():
            tensor.zero_()
    copy.load_state_dict(shrunken.result.model.state_dict())
    assert torch.equal(logits(copy, shrunken.probe), expected)


def test_the_users_model_is_left_as_it_was(shrunken: Shrunken) -> None:
    after = shrunken.original.state_dict()
    assert list(after) == list(shrunken.state)
    assert all(torch.equal(after[name], shrunken.state[name]) for name in after)
    assert all(module.training for module in shrunken.original.modules())


def test_the_table_and_the_kept_channels_tell_what_was_cut(shrunken: Shrunken) -> None:
    result = shrunken.result
    modules = dict(result.model.named_modules())
    shrank = 0
    for row in result.layers:
        weight = modules[row.name].weight
        assert weight.shape[0] == row.outputs_after <= row.outputs_before
        if row.name not in result.kept:
            continue
        kept = result.kept[row.name]
        assert (len(kept.inputs), len(kept.outputs)) == (row.inputs_after, row.outputs_after)
        mask = shrunken.masks.get(row.name, {}).get("weight")
        if mask is not None:
            rows = mask.flatten(1).any(1) if mask.dim() > 1 else mask.bool()
            assert torch.equal(kept.outputs, rows.nonzero().flatten())
        shrank += row.outputs_after < row.outputs_before
    assert shrank >= 2


# ---- NNI's other pruners


def evaluator(model: nn.Module, probe: Tensor) -> Any:
    import nni
    from nni.compression import TorchEvaluator

    def training_step(batch: Tensor, model: nn.Module, *_: Any) -> Tensor:
        return functional.cross_entropy(model(batch), torch.arange(len(batch)))

    def train(model, optimizer, training_step, lr_scheduler=None, max_steps=None, max_epochs=None) -> None:
        model.train()
        for _ in range(max_steps):
            optimizer.zero_grad()
            training_step(probe, model).backward()
            optimizer.step()

    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=1e-3)
    return TorchEvaluator(train, optimizer, training_step)


PRUNERS = {
    "L2": lambda model, config, probe: pruning.L2NormPruner(model, config).compress(),
    "FPGM": lambda model, config, probe: pruning.FPGMPruner(model, config).compress(),
    "Taylor": lambda model, config, probe: pruning.TaylorPruner(model, config, evaluator(model, probe), 2).compress(),
    "Slim": lambda model, config, probe: pruning.SlimPruner(model, config, evaluator(model, probe), 2).compress(),
    "AGP over L1": lambda model, config, probe: pruning.AGPPruner(
        pruning.L1NormPruner(model, config, evaluator(model, probe)), 1, 3
    ).compress(4, None),
    "linear over Taylor": lambda model, config, probe: pruning.LinearPruner(
        pruning.TaylorPruner(model, config, evaluator(model, probe), 2), 2, 2
    ).compress(5, None),
}


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("op_type", ["Conv2d", "BatchNorm2d"])
def test_every_structured_pruner_takes_the_completed_config(name: str, op_type: str) -> None:
    torch.manual_seed(0)
    model = randomised(wrn(16, 1))
    probe = torch.randn(4, 3, 32, 32)
    config = complete_config_list(model, [{"op_types": [op_type], "sparse_ratio": 0.5}], probe)
    _, masks = PRUNERS[name](model, config, probe)
    unwrap(model)
    result = shrink(model, masks, probe)
    assert result.parameters_after < 0.3 * result.parameters_before


def unwrap(model: nn.Module) -> None:
    for module in list(model.modules()):
        if hasattr(module, "_nni_wrapper"):
            module._nni_wrapper.unwrap()


# ---- refusals


def masked_wrn() -> tuple[nn.Module, dict[str, dict[str, Tensor]], Tensor]:
    torch.manual_seed(0)
    model, dummy = randomised(wrn(10, 1)), torch.rand(2, 3, 32, 32)
    pruner = pruning.L1NormPruner(model, complete_config_list(model, CONVOLUTIONS, dummy))
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return model, masks, dummy


@pytest.mark.parametrize("tampered", ["group3.0.conv2", "bn", "conv1"])
def test_a_tampered_network_is_refused(monkeypatch: pytest.MonkeyPatch, tampered: str) -> None:
    model, masks, dummy = masked_wrn()
    remove = speedup._remove

    def tamper(*arguments: Any) -> Any:
        candidate, kept, notes = remove(*arguments)
        with torch.no_grad():
            candidate.get_submodule(tampered).weight[0] *= 1.05
        return candidate, kept, notes

    assert shrink(model, masks, dummy).shrunken
    monkeypatch.setattr(speedup, "_remove", tamper)
    state = deepcopy(model.state_dict())
    with pytest.raises(UserError, match="differs from the masked one by"):
        shrink(model, masks, dummy)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_small_logits_do_not_hide_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks, dummy = masked_wrn()
    with torch.no_grad():
        model.fc.weight *= 1e-6
        model.fc.bias.zero_()
    remove = speedup._remove

    def tamper(*arguments: Any) -> Any:
        candidate, *rest = remove(*arguments)
        with torch.no_grad():
            candidate.fc.weight *= 1.01
        return candidate, *rest

    assert shrink(model, masks, dummy).shrunken
    monkeypatch.setattr(speedup, "_remove", tamper)
    with pytest.raises(UserError, match="differs"):
        shrink(model, masks, dummy)


def test_masks_of_a_plain_config_are_refused_where_batch_normalisation_brings_channels_back() -> None:
    torch.manual_seed(0)
    model, dummy = randomised(torchvision_model("resnet18")), torch.rand(2, 3, 32, 32)
    pruner = pruning.L1NormPruner(model, CONVOLUTIONS)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    with pytest.raises(UserError, match="complete_config_list"):
        shrink(model, masks, dummy)


def test_a_wrapped_model_is_refused() -> None:
    model, dummy = lenet5(), torch.rand(1, 1, 32, 32)
    _, masks = pruning.L1NormPruner(model, complete_config_list(model, CONVOLUTIONS, dummy)).compress()
    with pytest.raises(UserError, match="unwrap_model"):
        shrink(model, masks, dummy)


def some_zero(*shape: int) -> Tensor:
    mask = torch.ones(shape)
    mask[0] = 0
    return mask


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"conv9": {"weight": torch.ones(1)}}, "the masks name 'conv9'"),
        ({"conv1": {"weight": torch.ones(7, 1, 5, 5)}}, r"conv1.weight has the shape \(7, 1, 5, 5\)"),
        ({"conv1": {"weight": torch.zeros(6, 1, 5, 5)}}, "no channel of conv1"),
        ({"conv1": {"_input_0": some_zero(1, 1, 1, 1)}}, "no channel of conv1"),
        ({"conv1": {"_input_0": some_zero(2, 1, 4, 4)}}, r"input mask of conv1 has the shape \(2, 1, 4, 4\)"),
        ({"": {"_input_0": some_zero(1, 1, 1, 1)}}, "_input_0 covers neither"),
        ({"fc3": {"weight": some_zero(10, 84), "bias": some_zero(10)}}, "."),
    ],
)
def test_unfit_masks_are_refused(masks: dict[str, dict[str, Tensor]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        shrink(lenet5(), masks, torch.rand(1, 1, 32, 32))


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.sum() > 0 else x

    with pytest.raises(UserError, match=r"cannot trace Branching: test_speedup.py, line \d+, in forward"):
        shrink(Branching(), {"fc": {"weight": some_zero(4, 4)}}, torch.rand(2, 4))
    with pytest.raises(UserError, match=r"does not accept the dummy input \(a tensor of shape \(2, 5\)\)"):
        shrink(nn.Linear(4, 4), {"": {"weight": some_zero(4, 4)}}, torch.rand(2, 5))


# ---- nothing to remove


def test_masks_of_ones_and_fine_grained_masks_remove_nothing_and_say_so() -> None:
    torch.manual_seed(0)
    model, dummy = lenet5(), torch.rand(1, 1, 32, 32)
    ones = {name: {"weight": torch.ones_like(model.get_submodule(name).weight)} for name in ("conv1", "fc1")}
    result = shrink(model, ones, dummy)
    assert (result.shrunken, result.sparsity, result.parameters_after) == (False, 0.0, result.parameters_before)
    assert "nothing to remove" in result.note

    pruner = pruning.LevelPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    wrapped_logits = logits(model, dummy)
    pruner.unwrap_model()
    result = shrink(model, masks, dummy)
    assert not result.shrunken
    assert result.sparsity == pytest.approx(0.5, abs=0.01)
    assert "49.8%" in result.note
    assert torch.allclose(logits(result.model, dummy), wrapped_logits, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.8, 0.9, 0.98])
def test_channels_that_single_weights_empty_by_chance_are_no_obstacle(ratio: float) -> None:
    """Rows and columns of zeros in some layers, not in those beside them, up to a class without a weight."""
    torch.manual_seed(0)
    model, dummy = lenet5(), torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        model.fc1.weight[:, 7] *= 1e-4  # a pixel of a channel, not a channel
        model.fc1.weight[3] *= 1e-4
        model.conv2.weight[5] *= 1e-4
        model.fc3.weight[2] *= 1e-4
    pruner = pruning.LevelPruner(model, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": ratio}])
    _, masks = pruner.compress()
    wrapped_logits = logits(model, dummy)
    pruner.unwrap_model()
    assert not masks["fc1"]["weight"][:, 7].any() and not masks["fc3"]["weight"][2].any()
    result = shrink(model, masks, dummy)
    assert result.sparsity == pytest.approx(ratio, abs=0.02)
    assert torch.allclose(logits(result.model, dummy), wrapped_logits, atol=1e-5)
    assert result.model.fc3.out_features == 10


def test_single_weights_beside_channels_do_not_stop_the_channels_from_going() -> None:
    torch.manual_seed(0)
    model, dummy = lenet5(), torch.rand(1, 1, 32, 32)
    masks = {name: {"weight": torch.ones_like(model.get_submodule(name).weight)} for name in ("conv2", "fc1")}
    masks["conv2"]["weight"][:8] = 0
    masks["fc1"]["weight"][torch.rand(120, 400) < 0.9] = 0
    masks["fc1"]["weight"][:, 399] = 0
    result = shrink(model, masks, dummy)
    assert result.model.conv2.out_channels == 8 and result.model.fc1.in_features == 200
    assert float((result.model.fc1.weight == 0).float().mean()) == pytest.approx(0.9, abs=0.01)


# ---- what NNI lacks


def test_response_normalisation_keeps_the_neighbourhoods_of_the_original_channels() -> None:
    torch.manual_seed(0)
    for size in (3, 4, 5):
        norm = nn.LocalResponseNorm(size, alpha=0.7, beta=0.75, k=1.3)
        kept = torch.tensor([0, 1, 4, 5, 6, 10])
        x = torch.zeros(2, 12, 3, 3)
        x[:, kept] = torch.randn(2, 6, 3, 3)
        expected = norm(x)[:, kept]
        assert torch.allclose(PrunedLocalResponseNorm.of(norm, kept)(x[:, kept]), expected, atol=1e-6)
        assert not torch.allclose(norm(x[:, kept]), expected, atol=1e-3)  # the plain one sees other neighbours


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 6, 1),
        nn.Conv2d(8, 6, 3, dilation=2, stride=2),
        nn.Conv2d(8, 8, (3, 1), groups=4),
        nn.Conv1d(8, 4, 3, padding="valid"),
        nn.Linear(8, 5),
    ],
)
def test_constants_become_the_bias_that_the_layer_itself_would_give(layer: nn.Module) -> None:
    channels, values = torch.tensor([1, 6]), torch.tensor([0.5, -2.0])
    shape = (1, 8) if isinstance(layer, nn.Linear) else (1, 8, 7) if isinstance(layer, nn.Conv1d) else (1, 8, 7, 7)
    constant = torch.zeros(shape)
    constant[:, channels] = values.view(1, 2, *[1] * (len(shape) - 2))
    with torch.no_grad():
        expected = layer(constant) - layer(torch.zeros(shape))
        actual = bias_of_constants(layer, channels, values)
    assert actual is not None
    assert torch.allclose(actual.view(1, -1, *[1] * (len(shape) - 2)).expand_as(expected), expected, atol=1e-6)


class AfterSigmoid(nn.Module):
    """A removed channel is 0.5 behind the sigmoid."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 4, 3, padding=padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sigmoid(self.first(x))).mean((2, 3))


def test_a_constant_is_folded_where_it_can_be_and_refused_where_not() -> None:
    torch.manual_seed(0)
    masks = {"first": {"weight": some_zero(8, 3, 3, 3), "bias": some_zero(8)}}
    result = shrink(AfterSigmoid(0), masks, torch.rand(2, 3, 8, 8))
    assert result.model.second.in_channels == 7
    assert result.model.second.bias is not None
    assert "folded" in result.note
    with pytest.raises(UserError, match="not zero at the padded second"):
        shrink(AfterSigmoid(1), masks, torch.rand(2, 3, 8, 8))


class Small(nn.Module):
    """A convolution that loses half its channels, and something that NNI stumbles over."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.third = nn.Conv2d(8 if kind == "slice" else 16, 16, 3, padding=1)
        self.scale = nn.PReLU()
        self.gate, self.unread, self.fc = nn.Conv2d(16, 16, 1), nn.Conv2d(3, 4, 1), nn.Linear(16, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = image
        if self.kind == "unread":
            functional.relu(self.unread(x))  # not torch.relu: NNI treats the two differently
        first = torch.relu(self.first(x))
        x = torch.relu(self.second(first))
        if self.kind == "slice":
            x = x[:, :8]
        if self.kind == "gate":
            x = x * torch.sigmoid(self.gate(x.mean((2, 3)).view(x.size(0), x.size(1), 1, 1)))
        if self.kind == "constant in an addition":
            x = x + torch.sigmoid(first)
        x = torch.relu(self.third(x)).mean((2, 3))
        if self.kind == "size":
            x = self.scale(x).view(image.size(0), -1)
        if self.kind == "shape":
            x = x.reshape(x.shape[0], -1)
        return self.fc(x)


@pytest.mark.parametrize("kind", ["unread", "slice", "gate", "size", "shape", "constant in an addition"])
def test_what_nni_stumbles_over(kind: str) -> None:
    torch.manual_seed(0)
    model, dummy = Small(kind), torch.rand(2, 3, 8, 8)
    pruner = pruning.L1NormPruner(model, complete_config_list(model, CONVOLUTIONS, dummy))
    _, masks = pruner.compress()
    expected = logits(model, dummy)
    pruner.unwrap_model()
    result = shrink(model, masks, dummy)
    assert relative_difference(expected, logits(result.model, dummy)) < 1e-4
    assert all(parameter.grad is None for parameter in result.model.parameters())
    stays = {"slice": ["second"], "constant in an addition": ["first", "second"]}.get(kind, [])
    for name in ("first", "second", "third"):
        assert result.model.get_submodule(name).out_channels == (16 if name in stays else 8)


def test_masks_on_outputs_are_masks_on_channels() -> None:
    torch.manual_seed(0)
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)))
    masks = {"0": {"weight": some_zero(8, 1, 1, 1), "bias": some_zero(8)}}
    masks["1"] = {"_output_0": some_zero(8).view(1, 8, 1, 1)}
    result = shrink(model, masks, torch.rand(1, 3, 8, 8))
    assert result.model[0].out_channels == result.model[1].num_features == result.model[2].in_channels == 7


def test_several_inputs_in_each_form() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.out = nn.Linear(4, 8), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.out(torch.relu(self.left(x) + self.right(y)))

    torch.manual_seed(0)
    model = TwoInputs()
    x, y = torch.rand(2, 4), torch.rand(2, 6)
    masks = {name: {"weight": some_zero(8, 1), "bias": some_zero(8)} for name in ("left", "right")}
    for dummy in ((x, y), [x, y], {"x": x, "y": y}, {"y": y, "x": x}):
        assert shrink(model, masks, dummy).model.out.in_features == 7
    with pytest.raises(UserError, match="forward takes x, y"):
        shrink(model, masks, {"y": y})


def test_precision_modes_and_frozen_parameters_survive() -> None:
    model, masks, dummy = masked_wrn()
    model = model.double().train()
    model.bn.eval()
    model.fc.weight.requires_grad_(False)
    result = shrink(model, masks, dummy.double())
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float64}
    assert result.model.training and result.model.conv1.training and not result.model.bn.training
    assert [name for name, parameter in result.model.named_parameters() if not parameter.requires_grad] == ["fc.weight"]
    assert result.model.bn.num_features == 32


def test_shrinking_is_quiet_repeatable_and_leaves_the_random_numbers_alone(
    capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    model, masks, dummy = masked_wrn()
    given = deepcopy(masks)
    recwarn.clear()
    capfd.readouterr()
    state = torch.get_rng_state()
    first, second = shrink(model, masks, dummy), shrink(model, masks, dummy)
    assert torch.equal(torch.get_rng_state(), state)
    assert "".join(capfd.readouterr()) == "" and not recwarn.list
    pairs = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(masks[n][t], given[n][t]) for n in masks for t in masks[n] if given[n][t] is not None)


def test_only_googlenets_training_heads_are_dropped() -> None:
    torch.manual_seed(0)
    model, dummy = torchvision_model("googlenet", init_weights=False), torch.rand(1, 3, 64, 64)
    masks = {"inception4a.branch1.conv": {"weight": some_zero(192, 1, 1, 1)}}
    masks["aux1.conv.conv"] = {"weight": some_zero(128, 1, 1, 1)}
    masks["inception4a.branch1.bn"] = {"weight": some_zero(192), "bias": some_zero(192)}
    result = shrink(model, masks, dummy)
    assert result.model.aux1 is None and "aux1, aux2" in result.note
    assert result.model.train()(torch.rand(2, 3, 64, 64)).shape == (2, 10)
    assert model.aux1 is not None and model.aux_logits


class WithHead(nn.Module):
    """A head that only runs in training, as GoogLeNet's and Inception's do."""

    def __init__(self) -> None:
        super().__init__()
        self.aux_logits = True
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
        self.aux = nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 10))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Any:
        x = functional.relu(self.conv1(x))
        aux = self.aux(x) if self.aux is not None and self.training else None
        logits = self.fc(functional.relu(self.conv2(x)).mean((2, 3)))
        return (logits, aux) if self.training and self.aux_logits else logits


def test_a_network_that_lost_its_training_head_loads_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, dummy = WithHead(), torch.rand(1, 1, 8, 8)
    pruner = pruning.L1NormPruner(model, complete_config_list(model, CONVOLUTIONS, dummy))
    _, masks = pruner.compress()
    pruner.unwrap_model()
    small = shrink(model, masks, dummy).model
    assert small.aux is None and small.conv1.out_channels == 4
    description = tmp_path / "small.json"
    save_network(small, f"{__name__}:WithHead", {}, tmp_path / "small.safetensors", description)
    again = load_network(description)
    assert again.aux is None and torch.equal(logits(again, dummy), logits(small, dummy))
    assert again.train()(torch.rand(2, 1, 8, 8)).shape == (2, 10)  # it promises no answer of the head

    content = json.loads(description.read_text())
    description.write_text(json.dumps({**content, "dropped": ["nothing"]}))
    with pytest.raises(UserError, match="'dropped' must list modules"):
        load_network(description)


def test_a_normalisation_over_several_dimensions_stays_as_it_is() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.LayerNorm([6, 6, 6]), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model, dummy = nn.Sequential(net, nn.Flatten(), nn.Linear(16, 5)), torch.rand(1, 1, 8, 8)
    pruner = pruning.L1NormPruner(model, complete_config_list(model, CONVOLUTIONS, dummy))
    _, masks = pruner.compress()
    pruner.unwrap_model()
    result = shrink(model, masks, dummy)
    assert result.model[0][0].out_channels == 6 and result.model[0][2].out_channels == 4
