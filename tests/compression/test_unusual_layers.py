"""Layers with two names, without a call, called by keyword, gated by a number, with weights that are computed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.compression.fx_trace import trace
from zskd_nni.compression.pruning.channel_flow import channel_flow
from zskd_nni.compression.pruning.masks import held_at_zero
from zskd_nni.compression.pruning.nni_pruner import pruning_plan
from zskd_nni.compression.pruning.prune import PrunedNetwork, check_pruning, prune
from zskd_nni.compression.quantization.nni_quantizer import quantizer_config_list
from zskd_nni.compression.quantization.qdq_onnx import export_quantized_onnx
from zskd_nni.compression.quantization.quantize import QuantizedNetwork, quantize, simulated
from zskd_nni.compression.quantization.stage import (
    check_quantization,
    compress_in_one_training,
)
from zskd_nni.data.sources import NoiseSource
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.onnx_export import check_exportable, onnx_bytes, run_onnx
from zskd_nni.models.serialization import load_network, save_network
from zskd_nni.models.shared_modules import called_paths, shared_layers
from zskd_nni.models.teacher import Teacher
from zskd_nni.recipes.compression_config import CompressionRun, PruningConfig, QuantizationConfig
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.distillation import DistillationSettings, distill

SPEC = InputSpec((1, 10, 10), mean=(0.4,), std=(0.3,))
SOURCE = NoiseSource(SPEC, 8)
QUIET = CompressionRun(quiet=True)
SETTINGS = DistillationSettings(steps=3, batch=8, warmup=0)
IMAGES = torch.rand(100, *SPEC.shape, generator=torch.Generator().manual_seed(1))
INT8 = {"target_names": ["_input_", "weight"], "quant_dtype": "int8", "quant_scheme": "affine"}
ALL_INT8 = [{"op_types": ["Conv2d", "Linear"], **INT8}]
HALF = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def features(self, x: Tensor) -> Tensor:
        return functional.relu(self.second(functional.relu(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Listed(Plain):
    """Knows its layers by a list too, which forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.first, self.second])


class CalledByTheList(Listed):
    def features(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = functional.relu(layer(x))
        return x


class Spectral(Plain):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.spectral_norm(self.second)


class Auxiliary(Plain):
    """Has a head that only runs in training."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.features(x)
        y = self.head(x.mean((2, 3)))
        return (y, self.auxiliary(x).mean((2, 3))) if self.training else y


class Token(Plain):
    """Has a parameter of its own, as a transformer its class token."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)) + self.token)


class Keyword(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=self.features(x).mean((2, 3)))


class ReadsAWeight(Plain):
    def features(self, x: Tensor) -> Tensor:
        return functional.relu(self.second(functional.relu(self.first(x)).to(self.second.weight.dtype)))


class Gated(Plain):
    """A residual whose branch is multiplied by one learnt number."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def features(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(x))
        return x + self.alpha * functional.relu(self.second(x))


class SqueezeAndExcitation(Plain):
    """Its channels are weighed by numbers that are indexed into the image's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

    def features(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(x))
        weights = torch.sigmoid(self.up(functional.relu(self.down(x.mean((2, 3))))))
        return functional.relu(self.second(x * weights[:, :, None, None]))


class Block(Plain):
    """As torchvision's: one ReLU, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.relu = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU()
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)

    def features(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.first(x)))
        return self.relu(self.norm2(self.second(x)) - 0.1)


class Grouped(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)

    def features(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(x))
        return functional.relu(self.second(x + functional.relu(self.grouped(x))))


class WithoutBias(Block):
    def __init__(self) -> None:
        super().__init__()
        self.first.bias = self.second.bias = None


def pruned(network: nn.Module, **section: Any) -> PrunedNetwork:
    teacher = Teacher(network, SPEC)
    chosen = PruningConfig(**{"config_list": HALF, "steps": 2, **section})
    plan = pruning_plan(teacher.model, chosen, teacher)
    check_pruning(teacher.model, chosen, plan, teacher)
    student = copy.deepcopy(teacher.model).requires_grad_(True)
    return prune(student, chosen, teacher, SOURCE, SETTINGS, plan=plan, run=QUIET)


def quantized(network: nn.Module, **section: Any) -> QuantizedNetwork:
    teacher = Teacher(network, SPEC)
    chosen = QuantizationConfig(**{"config_list": ALL_INT8, "steps": 3, **section})
    student = copy.deepcopy(teacher.model).requires_grad_(True)
    check_quantization(student, chosen, teacher)
    result = quantize(student, chosen, teacher, SOURCE, SETTINGS, run=QUIET)
    assert result is not None
    return result


def exported_as_simulated(quantization: QuantizedNetwork, tmp_path: Path) -> None:
    export = export_quantized_onnx(quantization, SPEC, tmp_path / "q.onnx", IMAGES)
    assert export.agreement == 1 and export.max_logit_difference < 0.02


def test_names_of_a_layer() -> None:
    dummy = SPEC.normalise(IMAGES[:2])
    assert shared_layers(Plain()) == {}
    assert shared_layers(Listed()) == {"first": ["layers.0"], "second": ["layers.1"]}
    assert called_paths(Listed(), dummy) == {"first", "second", "head"}
    assert called_paths(CalledByTheList(), dummy) == {"layers.0", "layers.1", "head"}
    assert "auxiliary" not in called_paths(Auxiliary().train(), dummy)
    shared = nn.Sequential(Plain(), nn.Identity())
    shared[1] = shared[0]
    assert shared_layers(shared) == {}, "the layers of a container that stands in two places have one place in it"


def test_a_layer_with_a_second_name_shrinks_under_both(tmp_path: Path) -> None:
    result = pruned(Listed())
    network = result.network
    assert result.record["shrunk"] and network.first.out_channels == 4
    assert network.layers[0] is network.first and network.layers[1] is network.second
    files = tmp_path / "s.safetensors", tmp_path / "s.json"
    save_network(network, f"{Path(__file__)}:Listed", {}, *files)
    again = load_network(files[1])
    assert again.layers[0] is again.first
    with torch.no_grad():
        assert torch.equal(again(IMAGES), network.eval()(IMAGES))


def test_a_layer_with_a_second_name_is_quantized(tmp_path: Path) -> None:
    exported_as_simulated(quantized(Listed(), quantizer="PtqQuantizer"), tmp_path)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (CalledByTheList, ["'first' and 'layers.0' are one layer", "one name"]),
        (Spectral, ["'second'", "spectral_norm"]),
    ],
)
def test_layers_that_nni_would_miss(network: type[nn.Module], words: list[str]) -> None:
    for stage in (pruned, quantized):
        with pytest.raises(UserError) as refused:
            stage(network())
        assert all(word in str(refused.value) for word in words)
        assert str(refused.value).startswith("compression.")


def test_a_layer_that_never_runs_is_left_out(tmp_path: Path) -> None:
    quantization = quantized(Auxiliary(), quantizer="PtqQuantizer")
    assert sorted(quantization.calibration) == ["first", "head", "second"]
    exported_as_simulated(quantization, tmp_path)
    with pytest.raises(UserError, match="'auxiliary', which forward never calls"):
        quantized(Auxiliary(), config_list=[{"op_names": ["first", "auxiliary"], **INT8}])


@pytest.mark.parametrize("quantizer", ["LsqQuantizer", "LsqPlusQuantizer"])
def test_scales_are_learnt_beside_a_parameter_of_the_network_itself(quantizer: str, tmp_path: Path) -> None:
    network = Token()
    quantization = quantized(network, quantizer=quantizer, learning_rate=0.01)
    assert not torch.equal(quantization.network.token, network.token), "it is trained"
    exported_as_simulated(quantization, tmp_path)


@pytest.mark.parametrize("network", [Keyword, ReadsAWeight])
def test_layers_that_are_called_otherwise_are_exported(network: type[nn.Module], tmp_path: Path) -> None:
    config = ALL_INT8 if network is ReadsAWeight else [{**ALL_INT8[0], "target_names": ["weight"]}]
    exported_as_simulated(quantized(network(), quantizer="PtqQuantizer", config_list=config), tmp_path)


def test_why_a_network_cannot_be_exported() -> None:
    class Chooses(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.sum()) > 0 else -x)

    for attempt in (onnx_bytes, check_exportable):
        with pytest.raises(UserError, match="cannot be exported to ONNX") as refused:
            attempt(Chooses().eval(), SPEC)
        assert "\x1b" not in str(refused.value) and "torch.export" not in str(refused.value)
    check_exportable(Plain(), SPEC)


def test_a_number_in_front_of_a_branch_does_not_hold_its_channels() -> None:
    flow = channel_flow(trace(Gated(), SPEC.normalise(IMAGES[:2])))
    assert not set(flow.frozen) & {int(label) for name in ("first", "second") for label in flow.sources[name]}
    result = pruned(Gated())
    assert result.record["shrunk"] and result.network.second.out_channels == 4


def test_a_layer_that_weighs_channels_shrinks_with_them() -> None:
    everything = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["head"], "sparse_ratio": 0.5}]
    network = pruned(SqueezeAndExcitation(), config_list=everything).network
    assert network.first.out_channels == network.up.out_features == network.down.in_features == 4
    assert network.down.out_features == 2


@pytest.mark.parametrize(
    "fold", [["first", "norm1", "relu"], ["first", "norm2"], ["first", "relu"], ["second", "norm2", "relu"]]
)
def test_folds_that_would_change_the_network_are_refused(fold: list[str]) -> None:
    with pytest.raises(UserError, match=f"{', '.join(fold)} cannot act as one"):
        quantized(Block(), quantizer="PtqQuantizer", fuse_names=[fold])


def test_a_fold_of_a_module_that_is_not_there() -> None:
    with pytest.raises(UserError, match="has no module 'nowhere'"):
        quantized(Block(), fuse_names=[["first", "nowhere"]])


def test_right_folds_by_name(tmp_path: Path) -> None:
    quantization = quantized(
        Block(), quantizer="PtqQuantizer", fuse_batch_norm=False, fuse_names=[["first", "norm1"], ["second", "norm2"]]
    )
    with torch.no_grad():
        expected, actual = (net.eval()(SPEC.normalise(IMAGES)) for net in (Block(), simulated(quantization)))
    assert float((expected - actual).abs().max() / expected.abs().max()) < 0.05
    exported_as_simulated(quantization, tmp_path)


@pytest.mark.parametrize("speedup", [True, False])
def test_silenced_inputs_stay_silent_beside_channels_that_went(speedup: bool) -> None:
    inputs = {"target_names": ["weight"], "target_settings": {"weight": {"granularity": "in_channel"}}}
    inputs["target_settings"]["weight"]["sparse_ratio"] = 0.5
    config = [{"op_names": ["second"], "sparse_ratio": 0.5}, {"op_names": ["grouped"], **inputs}]
    result = pruned(Grouped(), config_list=config, speedup=speedup)
    assert result.record["shrunk"] is speedup
    network = result.network
    zeros = network.grouped.weight == 0
    assert float(zeros.float().mean()) == 0.5
    distill(
        network, Teacher(Grouped(), SPEC), SOURCE, SETTINGS, after_step=held_at_zero(network, result.masks), quiet=True
    )
    assert torch.equal(network.grouped.weight == 0, zeros)


def test_single_weights_without_biases_and_folds_in_one_training() -> None:
    teacher = Teacher(WithoutBias(), SPEC)
    pruning = PruningConfig(pruner="LevelPruner", config_list=HALF, steps=2)
    section = QuantizationConfig(
        quantizer="QATQuantizer", config_list=ALL_INT8, steps=2, fused=True, fuse_batch_norm=True
    )
    student = copy.deepcopy(teacher.model).requires_grad_(True)
    assert quantizer_config_list(student, section, teacher)[0]["fuse_names"], "folds that are found without the pruner"
    made, quantization = compress_in_one_training(student, pruning, section, teacher, SOURCE, SETTINGS, run=QUIET)
    assert quantization.folds == []
    assert float((made.network.second.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert run_onnx(onnx_bytes(quantization.network, SPEC), IMAGES).isfinite().all()
