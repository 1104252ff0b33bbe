"""Quantization as a stage of a recipe: folds from the graph, one training for everything, files, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.compression.pruning.masks import Masks, multiply_in
from zskd_nni.compression.quantization.bn_folding import batch_norm_folds
from zskd_nni.compression.quantization.nni_quantizer import quantizer_config_list
from zskd_nni.compression.quantization.qdq_onnx import export_quantized_onnx, integer_model
from zskd_nni.compression.quantization.quantize import quantize, simulated
from zskd_nni.compression.quantization.serialization import calibration_file, load_quantization, save_calibration
from zskd_nni.compression.quantization.stage import check_quantization, compress_in_one_training
from zskd_nni.data.sources import StoredSource
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.serialization import save_network
from zskd_nni.models.teacher import Teacher
from zskd_nni.models.zoo import wrn
from zskd_nni.recipes.compression_config import CompressionRun, PruningConfig, QuantizationConfig
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.tensors import save_tensors
from zskd_nni.training.distillation import DistillationSettings
from zskd_nni.training.metrics import agreement

SPEC = InputSpec((1, 16, 16))
SETTINGS = DistillationSettings(temperature=4, steps=10, batch=32, warmup=2, learning_rate=1e-3)
INT8 = [
    {
        "op_types": ["Conv2d", "Linear"],
        "target_names": ["_input_", "weight"],
        "quant_dtype": "int8",
        "quant_scheme": "affine",
        "target_settings": {
            "weight": {"granularity": "out_channel", "quant_dtype": "int8", "quant_scheme": "symmetric"}
        },
    }
]
HALF = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


class Residual(nn.Module):
    """Two foldable convolutions, one whose output two layers read, and a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.relu1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.norm3, self.alone = nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(4), nn.Linear(128, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.norm1(self.conv1(x)))
        x = self.relu(x + self.norm2(self.conv2(x)))  # this ReLU is called twice
        y = self.alone(x)
        return self.head(self.pool(self.relu(y + self.norm3(y))).flatten(1))


def patterns(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = functional.interpolate(torch.rand((6, 1, 4, 4), generator=generator), size=16)
    generator.manual_seed(seed)
    labels = torch.randint(0, 6, (count,), generator=generator)
    return (shapes[labels] + 0.1 * torch.randn((count, 1, 16, 16), generator=generator)).clamp(0, 1), labels


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    network = Residual().train()
    images, labels = patterns(600, 1)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for step in range(60):
        at = slice(step * 32 % 576, step * 32 % 576 + 32)
        optimizer.zero_grad()
        functional.cross_entropy(network(SPEC.normalise(images[at])), labels[at]).backward()
        optimizer.step()
    found = Teacher(network.eval(), SPEC)
    test, expected = patterns(300, 2)
    assert (found.predict(test).argmax(1) == expected).float().mean() > 0.9
    return found


@pytest.fixture(scope="module")
def source() -> StoredSource:
    return StoredSource(patterns(200, 3)[0], 32, 0, "patterns")


TEST = patterns(300, 4)[0]


def section(**changes: Any) -> QuantizationConfig:
    return QuantizationConfig(**{"config_list": INT8, "steps": 15, **changes})


def quantized(teacher: Teacher, source: StoredSource, tmp_path: Path, train: bool = True, **changes: Any) -> Any:
    run = CompressionRun(checkpoint=tmp_path / "checkpoint.pt", quiet=True)
    return quantize(teacher.student(), section(**changes), teacher, source, SETTINGS, train=train, run=run)


@torch.no_grad()
def agrees(network: nn.Module, teacher: Teacher) -> float:
    return agreement(network(SPEC.normalise(TEST)), teacher.predict(TEST))


def test_folds_are_read_from_the_graph(teacher):
    dummy = SPEC.example_input()
    with_output = [{**INT8[0], "target_names": ["_input_", "weight", "_output_"]}]
    assert batch_norm_folds(teacher.model, INT8, dummy) == [("conv1", "norm1"), ("conv2", "norm2")]
    assert batch_norm_folds(teacher.model, with_output, dummy) == [("conv1", "norm1", "relu1"), ("conv2", "norm2")]
    only = [{**INT8[0], "op_names": ["conv2"], "op_types": ["Conv2d"]}]
    assert batch_norm_folds(teacher.model, only, dummy) == [("conv2", "norm2")]
    assert batch_norm_folds(teacher.model, [{**INT8[0], "fuse_names": [("conv1", "norm1")]}], dummy) == [
        ("conv2", "norm2")
    ]
    inside = batch_norm_folds(wrn(10, 1), INT8, torch.rand(2, 3, 32, 32))
    assert inside and all(len(names) == 2 for names in inside)


@pytest.mark.parametrize(
    ("quantizer", "fold"),
    [("PtqQuantizer", True), ("QATQuantizer", True), ("LSQQuantizer", False), ("LSQPlusQuantizer", False)],
)
def test_integers_in_onnxruntime_answer_as_the_simulation(teacher, source, tmp_path, quantizer, fold):
    configs = INT8
    if quantizer == "LSQQuantizer":
        configs = [{**INT8[0], "quant_scheme": "symmetric"}]
    result = quantized(teacher, source, tmp_path, quantizer=quantizer, fuse_batch_norm=fold, config_list=configs)
    assert bool(result.folds) == fold
    assert agrees(simulated(result), teacher) > 0.95
    export = export_quantized_onnx(result, SPEC, tmp_path / "student-int8.onnx", TEST)
    assert export.agreement >= 0.995 and export.bytes < export.float_bytes


def test_a_training_quantizer_that_may_not_train_is_calibrated(teacher, source, tmp_path):
    result = quantized(teacher, source, tmp_path, train=False, quantizer="QATQuantizer")
    assert result.quantizer == "PtqQuantizer"
    assert all(
        torch.equal(value, teacher.model.state_dict()[name]) for name, value in result.network.state_dict().items()
    )
    dorefa = [{"op_names": ["conv2"], "target_names": ["weight"], "quant_dtype": "int8", "quant_scheme": "affine"}]
    with pytest.raises(UserError, match="DoReFaQuantizer cannot be calibrated without training"):
        quantized(teacher, source, tmp_path, train=False, quantizer="DoReFaQuantizer", config_list=dorefa)


def test_the_finished_student_is_left_as_it_is(teacher, source, tmp_path):
    network = copy.deepcopy(teacher.model).requires_grad_(True)
    before = copy.deepcopy(network.state_dict())
    run = CompressionRun(checkpoint=tmp_path / "checkpoint.pt", quiet=True)
    result = quantize(network, section(quantizer="QATQuantizer", steps=5), teacher, source, SETTINGS, run=run)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not torch.equal(result.network.conv1.weight, before["conv1.weight"])


def test_a_quantization_is_saved_and_loads_again(teacher, source, tmp_path):
    (tmp_path / "mine.py").write_text("from test_quantization_stage import Residual\n")
    result = quantized(teacher, source, tmp_path, quantizer="PtqQuantizer", fuse_batch_norm=True)
    description = tmp_path / "student.json"
    save_network(
        result.network,
        f"{__name__}:Residual",
        {},
        description.with_suffix(".safetensors"),
        description,
        extra={"quantization": save_calibration(result, description)},
    )
    again = load_quantization(description)
    images = SPEC.normalise(TEST)
    with torch.no_grad():
        assert torch.equal(simulated(again)(images), simulated(result)(images))
    assert again.folds == result.folds and again.quantizer == "PtqQuantizer"
    file = calibration_file(description)
    save_tensors(file, {"conv1:weight:scale": torch.ones(1)})
    with pytest.raises(UserError, match="checksum differs"):
        load_quantization(description)


@pytest.mark.parametrize(
    ("pruning", "fold"),
    [
        ({"pruner": "L1NormPruner"}, True),
        ({"pruner": "L1NormPruner", "schedule": {"name": "AGPPruner", "interval": 3, "total_times": 4}}, False),
        ({"pruner": "TaylorPruner"}, False),
    ],
)
def test_pruned_quantized_and_distilled_in_one_training(teacher, source, tmp_path, pruning, fold):
    small, result = compress_in_one_training(
        copy.deepcopy(teacher.model).requires_grad_(True),
        PruningConfig(**{"config_list": HALF, "steps": 15, **pruning}),
        section(quantizer="QATQuantizer", steps=25, fused=True, fuse_batch_norm=fold),
        teacher,
        source,
        SETTINGS,
        run=CompressionRun(checkpoint=tmp_path / "checkpoint", quiet=True),
    )
    assert small.record["shrunk"] and small.network.conv1.out_channels == 4
    assert not result.folds  # NNI folds no normalisation that a pruner masks
    assert small.record["agreement_after_shrinking"] >= 0.99
    assert small.record["steps_under_masks"] == 50
    assert result.calibration["conv2"]["weight"]["scale"].numel() == 4
    assert agrees(simulated(result), teacher) > 0.85
    export = export_quantized_onnx(result, SPEC, tmp_path / "student-int8.onnx", TEST)
    assert export.agreement >= 0.995


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantizer": "PtqQuantiser"}, "the nearest is 'PtqQuantizer'"),
        ({"fused": True}, "does not train"),
        ({"config_list": [{"op_types": ["Conv2d"], "quant_dtyp": "int8"}]}, "did you mean 'quant_dtype'"),
        ({"config_list": [{"op_types": ["Conv2d"], "target_names": ["weight"]}]}, "refuses the config"),
        ({"fuse_names": [["norm1", "relu1", "conv1"]]}, "no config of config_list selects 'norm1'"),
        ({"fuse_names": [["conv1", "bn9"]]}, "has no module 'bn9'"),
        ({"quantizer": "QATQuantizer", "arguments": {"start": 3}}, "refuses the config"),
        ({"quantizer": "QATQuantizer", "steps": 0}, "QATQuantizer quantizes while it trains and needs at least 1 step"),
        (
            {"quantizer": "QATQuantizer", "arguments": {"quant_start_step": 15}},
            "at step 15 the training is over, which has 15 steps",
        ),
        ({"quantizer": "QATQuantizer", "arguments": {"quant_start_step": "soon"}}, "whole number, not 'soon'"),
        ({"config_list": [{**INT8[0], "op_names_re": ["("]}]}, r"config_list\.0\.op_names_re: '\(' is no regular"),
        ({"config_list": [{**INT8[0], "op_types": 5}]}, "op_types must be a list of words, not 5"),
        ({"config_list": [{**INT8[0], "exclude_op_names": 5}]}, "exclude_op_names must be a list of words, not 5"),
        ({"config_list": [{**INT8[0], "fuse_names": 5}]}, "must list folds of 2 or 3 modules"),
        ({"config_list": [{**INT8[0], "target_settings": [1]}]}, "target_settings must map targets"),
        ({"config_list": [{**INT8[0], "target_names": ["nope"]}], "fuse_batch_norm": True}, "names 'nope' as a target"),
        ({"fuse_names": [[]]}, "must list folds of 2 or 3 modules"),
        ({"config_list": [{**INT8[0], "granularity": [1]}]}, "granularity|scales of shape|refuses the config"),
        *(
            ({"config_list": [{**INT8[0], "quant_dtype": name}]}, "ONNX files are written with 2 to 8")
            for name in ("int16", "int1")
        ),
        ({"config_list": [{**INT8[0], "quant_dtype": "int0"}]}, "with a number of bits, such as int8, not 'int0'"),
    ],
)
def test_mistakes_are_told_before_the_work(teacher, changes, message):
    with pytest.raises(UserError, match=message):
        check_quantization(teacher.model, section(**changes), teacher)


def test_of_a_fused_training_all_steps_count(teacher):
    late = section(quantizer="QATQuantizer", steps=0, arguments={"quant_start_step": 20}, fused=True)
    check_quantization(teacher.model, late, teacher, steps=21)
    with pytest.raises(UserError, match="the training is over, which has 20 steps"):
        check_quantization(teacher.model, late, teacher, steps=20)


def test_a_network_that_was_never_quantized_is_not_written_as_integers(teacher, source, tmp_path):
    late = quantized(teacher, source, tmp_path, quantizer="QATQuantizer", arguments={"quant_start_step": 1000})
    with pytest.raises(UserError, match="has no scale, so that QATQuantizer never quantized it"):
        export_quantized_onnx(late, SPEC, tmp_path / "student-int8.onnx", TEST)
    assert not (tmp_path / "student-int8.onnx").exists()


def test_folds_are_found_where_several_entries_share_a_module_or_none_names_targets(teacher, source, tmp_path):
    only_input = {**INT8[0], "target_names": ["_input_"]}
    only_weight = {**INT8[0], "target_names": ["weight"]}
    split = [{key: value for key, value in only_input.items() if key != "target_settings"}, only_weight]
    dummy = SPEC.example_input()
    folds = [("conv1", "norm1"), ("conv2", "norm2")]
    assert batch_norm_folds(teacher.model, split, dummy) == folds
    assert batch_norm_folds(teacher.model, [{"op_types": ["Conv2d"], "quant_dtype": "int8"}], dummy) == folds
    result = quantized(teacher, source, tmp_path, quantizer="PtqQuantizer", fuse_batch_norm=True, config_list=split)
    assert result.folds == folds and set(result.calibration["conv1"]) == {"_input_0", "weight"}
    assert agrees(simulated(result), teacher) > 0.95
    with_output = [*split, {"op_types": ["Conv2d"], "target_names": ["_output_"], "quant_dtype": "uint8"}]
    section_of = section(fuse_batch_norm=True, config_list=with_output)
    check_quantization(teacher.model, section_of, teacher)
    assert quantizer_config_list(teacher.model, section_of, teacher)[2]["fuse_names"] == [("conv1", "norm1", "relu1")]


@pytest.mark.parametrize(
    ("quantizer", "scheme", "fold"),
    [
        ("PtqQuantizer", "symmetric", True),
        ("QATQuantizer", "symmetric", True),
        ("QATQuantizer", "affine", False),
        ("LsqQuantizer", "symmetric", False),
        ("LsqPlusQuantizer", "affine", False),
    ],
)
def test_weights_that_pruning_set_to_zero_are_zero_integers(teacher, source, tmp_path, quantizer, scheme, fold):
    torch.manual_seed(0)
    network = copy.deepcopy(teacher.model).requires_grad_(True)
    masks: Masks = {name: {"weight": (torch.rand(8, 8, 3, 3) < 0.4).float()} for name in ("conv2",)}
    masks["head"] = {"weight": (torch.rand(6, 128) < 0.4).float()}
    multiply_in(network, masks)
    config = copy.deepcopy(INT8)
    config[0]["quant_scheme"] = config[0]["target_settings"]["weight"]["quant_scheme"] = scheme
    chosen = section(quantizer=quantizer, config_list=config, fuse_batch_norm=fold, learning_rate=1e-2)
    result = quantize(network, chosen, teacher, source, SETTINGS, masks=masks, run=CompressionRun(quiet=True))
    moved = torch.equal(result.network.head.weight, network.head.weight)
    assert moved == (quantizer == "PtqQuantizer")
    model = integer_model(result)
    for name, targets in masks.items():
        gone = targets["weight"] == 0
        assert (result.network.get_submodule(name).weight[gone] == 0).all()
        layer = model.get_submodule(name)
        levels = layer.parameter_levels["weight"]
        zero = levels.zero_point.view(-1, *[1] * (gone.dim() - 1)).expand(gone.shape)
        assert not levels.has_offset and torch.equal(layer.weight_[gone], zero[gone])


def test_folds_that_are_named_stay_and_others_are_found(teacher):
    configs = quantizer_config_list(
        teacher.model, section(fuse_names=[["conv2", "norm2"]], fuse_batch_norm=True), teacher
    )
    assert configs[0]["fuse_names"] == [("conv2", "norm2"), ("conv1", "norm1")]
    assert "fuse_names" not in INT8[0]
