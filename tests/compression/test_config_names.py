"""Names, targets and granularities of config lists that a network lacks are refused, with the nearest one."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("nni")

from zskd_nni.compression.config_names import block_sizes, checked_config_list
from zskd_nni.compression.pruning.dependency_config import plan_pruning
from zskd_nni.compression.pruning.nni_pruner import pruning_plan
from zskd_nni.compression.quantization.quantize import quantize
from zskd_nni.data.sources import NoiseSource
from zskd_nni.models.teacher import Teacher
from zskd_nni.recipes.compression_config import PruningConfig, QuantizationConfig
from zskd_nni.runtime.errors import UserError

IMAGE = torch.rand(2, 1, 8, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.relu = nn.Conv2d(8, 8, 3), nn.ReLU()
        self.flat, self.fc = nn.Flatten(1), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.flat(self.relu(self.conv2(torch.relu(self.bn1(self.conv1(x)))))))


HALF: dict[str, Any] = {"op_types": ["Conv2d"], "sparse_ratio": 0.5}
INT8: dict[str, Any] = {"op_types": ["Conv2d"], "target_names": ["weight"], "quant_dtype": "int8"}


@pytest.mark.parametrize(
    ("config_list", "message"),
    [
        ([{"op_names": ["conv1", "cnov2"], "sparse_ratio": 0.5}], "'cnov2' in op_names.* nearest is 'conv2'"),
        ([{**HALF, "exclude_op_names": ["module.conv1"]}], "'module.conv1' in exclude_op_names.* nearest is 'conv1'"),
        ([HALF, {"exclude": True, "op_names": ["conv_1"]}], "entry 1 .*'conv_1' in op_names.* nearest is 'conv1'"),
        ([{**HALF, "exclude_op_names_re": ["stem.*"]}], "exclude_op_names_re has the pattern 'stem"),
        ([{"op_names_re": ["^layer1"], "sparse_ratio": 0.5}], "op_names_re has the pattern '.layer1'"),
        ([{"op_types": ["Conv2D", "Conv2d"], "sparse_ratio": 0.5}], "'Conv2D' in op_types.* nearest is 'Conv2d'"),
        ([{**HALF, "exclude_op_types": ["Linaer"]}], "'Linaer' in exclude_op_types.* nearest is 'Linear'"),
        ([{"op_partial_names": ["covn"], "sparsity": 0.5}], "'covn' in op_partial_names"),
        ([{**HALF, "target_names": ["wieght"]}], "'wieght' as a target, which conv. .Conv2d. has not got.*'weight'"),
        ([{**HALF, "target_settings": {"biass": {}}}], "'biass' as a target.* nearest is 'bias'"),
        (
            [HALF, {"op_names": ["bn1"], "target_settings": {"weight": {"align": {"module_name": "conv"}}}}],
            "'conv' in align.module_name.* nearest is 'conv.'",
        ),
        ([{"op_types": ["Conv2d"], "exclude_op_names_re": ["conv"], "sparse_ratio": 0.5}], "selects no module"),
        ([{**HALF, "granularity": [3, -1, -1, -1]}], r"granularity \[3.*cannot be divided so; 2 would divide it"),
        ([{**HALF, "granularity": [1, -1, -1, -1, -1]}], "5 sizes for 4 dimensions; .1, -1, -1, -1. would"),
        ([{**HALF, "granularity": "per_channel"}], "'per_channel'; it may be out_channel, in_channel, default"),
        ([{"op_types": "Conv2d", "sparse_ratio": 0.5}], "op_types must be a list of words, not 'Conv2d'"),
        ([{"op_types": ["default"], "sparse_ratio": 0.5}], "'default' in op_types, which NNI 3 .*: Conv2d, Linear"),
        ([{**HALF, "exclude_op_name": ["conv1"]}], "'exclude_op_name'; did you mean 'exclude_op_names'"),
    ],
)  # fmt: skip
def test_what_the_network_has_not_got_is_refused_in_pruning(config_list: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_pruning(Net(), config_list, IMAGE)
    for pruner in ("L1NormPruner", "LevelPruner"):
        with pytest.raises(UserError, match="compression.pruning.*" + message):
            pruning_plan(Net(), PruningConfig(config_list, pruner=pruner), Teacher(Net(), (1, 8, 8)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"op_names": ["conv1", "cnov2"], "quant_dtype": "int8"}, "'cnov2' in op_names.* nearest is 'conv2'"),
        ({**INT8, "exclude_op_names": ["conv3"]}, "'conv3' in exclude_op_names"),
        ({**INT8, "target_names": ["_input_input", "weight"]}, "'_input_input' as a target.*write '_input_0'"),
        ({**INT8, "target_names": ["_output_1", "weight"]}, "'_output_1' as a target.* 1 output; write '_output_0'"),
        ({**INT8, "op_types": ["Linear"], "granularity": [4, 4]}, "cannot be divided so; 5 would divide it"),
        ({**INT8, "op_names": ["relu"], "op_types": ["ReLU"]}, "'weight' as a target, which relu .ReLU. has not got"),
        ({**INT8, "target_names": ["_input_", "weight"], "granularity": "out_channel"}, "_input_ of conv.*per_channel"),
        ({**INT8, "target_names": ["_input_"], "granularity": [2, 1, 1, 1]}, "blocks along the batch"),
        ({**INT8, "granularity": [0, -1]}, "neither a word nor a list of block sizes"),
        ({**INT8, "fuse_names": [("conv1", "bn")]}, "'bn' in fuse_names.* nearest is 'bn1'"),
        ({**INT8, "quant_dtype": "int"}, "quant_dtype is int or uint with a number of bits, such as int8, not 'int'"),
        ({**INT8, "target_settings": {"weight": {"quant_dtype": "fp8"}}}, "number of bits, such as int8, not 'fp8'"),
    ],
)  # fmt: skip
def test_what_the_network_has_not_got_is_refused_in_quantization(config: dict[str, Any], message: str) -> None:
    teacher = Teacher(Net(), (1, 8, 8))
    with pytest.raises(UserError, match=f"entry 0 of the quantization config.*{message}"):
        quantize(teacher.student(), QuantizationConfig([config]), teacher, NoiseSource(teacher.spec, 8))


@pytest.mark.parametrize("entry", [{"op_types": ["Conv2d"]}, {"op_names": ["conv1", "conv2"], "max_sparse_ratio": 0.5}])
def test_an_entry_without_a_sparsity_says_so(entry: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"gives conv1, conv2 no sparsity; add sparse_ratio"):
        plan_pruning(Net(), [entry], IMAGE)


def test_a_type_of_pytorch_that_the_network_has_none_of_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plan = plan_pruning(Net(), [{"op_types": ["Conv2d", "Conv3d"], "sparse_ratio": 0.5}], IMAGE)
    assert plan.config_list == plan_pruning(Net(), [HALF], IMAGE).config_list
    assert "'Conv3d' in op_types, which the model has not got; the nearest is 'Conv2d'" in caplog.text


class StandardConv2d(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class NormedLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, functional.normalize(self.weight, dim=1), self.bias)


@pytest.mark.parametrize(
    ("base", "network", "shape"),
    [
        ("Conv2d", nn.Sequential(StandardConv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 2)), (2, 1, 8, 8)),
        ("Linear", nn.Sequential(NormedLinear(4, 6), nn.ReLU(), NormedLinear(6, 2)), (2, 4)),
    ],
)
def test_classes_that_are_derived_from_a_type_are_named(base: str, network: nn.Module, shape: tuple[int, ...]) -> None:
    derived, images = type(network[0]).__name__, torch.zeros(shape)
    with pytest.raises(UserError, match=f"'{base}' in op_types; the model has only .* derived from it: {derived}$"):
        plan_pruning(network, [{"op_types": [base], "sparse_ratio": 0.5}], images)
    with pytest.raises(UserError, match="0: forward computes with its weight in a way of its own"):
        plan_pruning(network, [{"op_types": [derived], "sparse_ratio": 0.5}], images)


def test_a_head_that_was_removed_may_still_be_excluded() -> None:
    network = Net()
    network.aux = nn.Linear(2, 2)
    config_list = [{**HALF, "exclude_op_names": ["aux"], "exclude_op_names_re": ["aux.*"]}]
    assert checked_config_list(network, config_list, "pruning") == config_list
    network.aux = None
    assert checked_config_list(network, config_list, "pruning") == config_list


def test_block_sizes_are_filled_up_as_nni_fills_them() -> None:
    scaling = pytest.importorskip("nni.compression.utils.scaling").Scaling
    for value, sizes in (([4, 4], [1, 1, 4, 4]), ([[1], "back", -1], [1, -1, -1, -1]), ([[2, 2]], [1, 1, 2, 2])):
        assert block_sizes(value, 4) == sizes
        given = (value, None, None) if isinstance(value[0], int) else (*value, None, None)[:3]
        mode = given[1] or "front"
        theirs = scaling(given[0], mode, given[2] or (1 if mode == "front" else -1))
        weight = torch.rand(8, 4, 4, 4)
        assert theirs.shrink(weight, keepdim=True).shape == scaling(sizes).shrink(weight, keepdim=True).shape
