"""Config lists in the keys of NNI 2, through recipes and by themselves, and wrong keys of either version."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torchvision
from helpers import random, small_teacher
from nni.compression.pruning import L1NormPruner, LevelPruner
from torch import nn

from zskd_nni.compression import DataFreeEvaluator
from zskd_nni.compression.nni_config import modern_config_list
from zskd_nni.compression.pruning.dependency_config import plan_pruning
from zskd_nni.compression.pruning.nni_pruner import make_pruner, pruning_plan
from zskd_nni.compression.quantization.calibration import Calibration
from zskd_nni.compression.quantization.nni_quantizer import QUANTIZERS
from zskd_nni.compression.quantization.quantize import quantize
from zskd_nni.compression.quantization.stage import check_quantization
from zskd_nni.data.sources import StoredSource
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.models.zoo import lenet5
from zskd_nni.pipeline import Run
from zskd_nni.recipes.compression_config import PruningConfig, QuantizationConfig
from zskd_nni.recipes.load import load_recipe
from zskd_nni.runtime.errors import UserError

Config = list[dict[str, Any]]
BOTH = ["Conv2d", "Linear"]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher(lenet5(), InputSpec((1, 32, 32)))


def masks_of(teacher: Teacher, pruner: str, config_list: Config) -> dict[str, torch.Tensor]:
    """The masks of weights and biases that a recipe's pruning section makes."""
    section = PruningConfig(pruner=pruner, config_list=config_list)
    network = deepcopy(teacher.model).requires_grad_(True)
    evaluator = DataFreeEvaluator(teacher, StoredSource(torch.rand(4, 1, 32, 32), 4, 0, "x"), quiet=True)
    plan = pruning_plan(network, section, teacher)
    _, masks = make_pruner(network, section, plan, evaluator).compress()
    return {f"{name}.{target}": mask for name, targets in masks.items() for target, mask in targets.items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("pruner", ["L1NormPruner", "LevelPruner"])
@pytest.mark.parametrize(
    ("legacy", "modern"),
    [
        ([{"op_types": ["Conv2d"], "sparsity": 0.5}], [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]),
        ([{"op_types": ["Conv2d"], "sparsity_per_layer": 0.5}], [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]),
        (
            [{"op_types": BOTH, "sparsity": 0.5}, {"exclude": True, "op_names": ["fc3", "conv1"]}],
            [{"op_types": BOTH, "sparse_ratio": 0.5, "exclude_op_names": ["fc3", "conv1"]}],
        ),
        (
            [{"exclude": True, "op_types": ["Linear"]}, {"op_types": BOTH, "sparsity": 0.25}],
            [{"op_types": ["Conv2d"], "sparse_ratio": 0.25}],
        ),
        (
            [{"op_partial_names": ["onv"], "op_types": BOTH, "sparsity": 0.5}],
            [{"op_names": ["conv1", "conv2"], "sparse_ratio": 0.5}],
        ),
        (
            [{"op_types": ["Conv2d"], "total_sparsity": 0.5, "max_sparsity_per_layer": 0.6}],
            [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "global_group_id": 7, "max_sparse_ratio": 0.6}],
        ),
        (
            [{"op_names": ["conv1"], "sparse_ratio": 0.5}, {"op_names": ["conv2"], "sparsity": 0.25}],
            [{"op_names": ["conv1"], "sparse_ratio": 0.5}, {"op_names": ["conv2"], "sparse_ratio": 0.25}],
        ),
    ],
)
def test_pruning_in_legacy_keys_masks_as_in_modern_ones(
    teacher: Teacher, pruner: str, legacy: Config, modern: Config
) -> None:
    before = deepcopy(legacy)
    masks = masks_of(teacher, pruner, legacy)
    assert same(masks, masks_of(teacher, pruner, modern))
    assert not all(mask.all() for mask in masks.values())
    assert legacy == before


@pytest.mark.parametrize("kind", [L1NormPruner, LevelPruner])
def test_what_nni_translates_itself_means_the_same_here(teacher: Teacher, kind: Any) -> None:
    legacy = [{"op_types": ["Conv2d"], "op_partial_names": ["conv"], "sparsity_per_layer": 0.5}]
    # NNI's ranking of single weights takes no other memory format.
    network = deepcopy(teacher.model).to(memory_format=torch.contiguous_format)
    _, masks = kind(network, deepcopy(legacy)).compress()
    theirs = {f"{name}.{target}": mask for name, targets in masks.items() for target, mask in targets.items()}
    assert same(masks_of(teacher, kind.__name__, legacy), theirs)


def test_groups_and_alignment_are_found_for_legacy_keys_too() -> None:
    network = torchvision.models.resnet18(num_classes=10)
    image = torch.rand(1, 3, 32, 32)
    legacy = plan_pruning(network, [{"op_types": ["Conv2d"], "sparsity": 0.5}], image)
    modern = plan_pruning(network, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], image)
    assert legacy == modern
    assert any("dependency_group_id" in entry for entry in legacy.config_list)


def calibrated(teacher: Teacher, config_list: Config) -> Calibration:
    source = StoredSource(torch.rand((8, *teacher.spec.shape), generator=random(1)), 8, 0, "x")
    return quantize(teacher.student(), QuantizationConfig(config_list), teacher, source).calibration


@pytest.mark.parametrize(
    ("legacy", "settings"),
    [
        ({"quant_types": ["input", "weight"], "quant_bits": 8}, {"_input_": {}, "weight": {}}),
        (
            {"quant_types": ["weight", "output"], "quant_bits": {"weight": 4, "output": 8}},
            {"weight": {"quant_dtype": "int4"}, "_output_": {}},
        ),
        (
            {
                "quant_types": ["input", "weight"],
                "quant_bits": 8,
                "quant_dtype": {"input": "uint", "weight": "int"},
                "quant_scheme": {"input": "per_tensor_affine", "weight": "per_channel_symmetric"},
            },
            {
                "_input_": {"quant_dtype": "uint8", "quant_scheme": "affine"},
                "weight": {"quant_dtype": "int8", "quant_scheme": "symmetric", "granularity": "out_channel"},
            },
        ),
    ],
)
def test_quantization_in_legacy_keys_calibrates_as_in_modern_ones(legacy: Any, settings: Any) -> None:
    teacher = small_teacher()
    settings = {target: {"quant_dtype": "int8", **setting} for target, setting in settings.items()}
    modern = {"quant_dtype": "int8", "target_names": list(settings), "target_settings": settings}
    ours = calibrated(teacher, [{"op_types": BOTH, **legacy}, {"exclude": True, "op_names": ["head"]}])
    theirs = calibrated(teacher, [{"op_types": BOTH, "exclude_op_names": ["head"], **modern}])
    assert set(ours) == {"conv", "hidden"}
    for path, targets in theirs.items():
        for target, entry in targets.items():
            for key, value in entry.items():
                found = ours[path][target][key]
                assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value


@pytest.mark.parametrize("quantizer", sorted(QUANTIZERS))
def test_every_quantizer_takes_legacy_keys(quantizer: str) -> None:
    teacher = small_teacher()
    legacy = {"op_types": BOTH, "quant_types": ["weight"], "quant_bits": 8, "quant_scheme": "affine"}
    section = QuantizationConfig(quantizer=quantizer, config_list=[legacy])
    check_quantization(teacher.model, section, teacher)
    assert not any(hasattr(module, "_nni_wrapper") for module in teacher.model.modules())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pruning.config_list.0.sparse_ratios", "0.5", "'sparse_ratios'; did you mean 'sparse_ratio'?"),
        ("pruning.config_list.0.total_sparsity", "0.5", "gives both total_sparsity and sparse_ratio"),
        ("pruning.config_list.0.max_sparsity_per_layer", "{conv1: 0.5}", "max_sparsity_per_layer must be a number"),
        ("pruning.config_list", "[{sparsity: 1.5, op_types: [Conv2d]}]", r"a sparsity lies in \[0, 1\), not 1.5"),
        ("pruning.config_list", "[{exclude: true, op_names: [fc3]}]", "only excludes modules"),
        ("pruning.config_list", "[{sparsity: 0.5, op_partial_names: conv}]", "op_partial_names must be a list"),
        ("quantization.config_list.0.quant_dtypes", "int8", "'quant_dtypes'; did you mean 'quant_dtype'?"),
        ("quantization.config_list.0.quant_bits", "8", "quant_bits without quant_types"),
        ("quantization.config_list.0.op_types", "[default]", "names 'default' in op_types"),
        (
            "quantization.config_list.0.target_settings.weight.quant_sheme",
            "affine",
            "target_settings.weight: unknown key 'quant_sheme'; did you mean 'quant_scheme'?",
        ),
        ("quantization.config_list", "[{op_types: [Conv2d], quant_types: [weight]}]", "a number of bits .* not None"),
        (
            "quantization.config_list",
            "[{op_types: [Conv2d], quant_types: [weight], quant_bits: {input: 8}}]",
            "must give weight a number of bits",
        ),
        (
            "quantization.config_list",
            "[{op_types: [Conv2d], quant_types: [activation], quant_bits: 8}]",
            "quant_types are input, weight, output, not activation",
        ),
        (
            "quantization.config_list",
            "[{op_types: [Conv2d], quant_types: [weight], quant_bits: 8, quant_scheme: linear}]",
            "quant_scheme is affine or symmetric",
        ),
        (
            "quantization.config_list",
            "[{op_types: [Conv2d], quant_types: [weight], quant_bits: 8, quant_dtype: float}]",
            "quant_dtype is int or uint, not 'float'",
        ),
    ],
)
def test_a_wrong_key_is_refused_before_the_long_work(tmp_path: Any, key: str, value: str, message: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message) as refusal:
        Run(load_recipe("digits-prune50", [f"compression.{key}={value}"]), out, quiet=True)
    assert "\n" not in str(refusal.value)
    assert not out.exists()


def test_a_recipe_in_legacy_keys_passes_all_early_checks(tmp_path: Any) -> None:
    changes = [
        "compression.pruning.config_list=[{op_types: [Conv2d, Linear], sparsity: 0.5}, {exclude: true, "
        "op_names: [fc3]}]",
        "compression.quantization.config_list=[{op_types: [Conv2d, Linear], quant_types: [input, weight], "
        "quant_bits: {input: 8, weight: 8}, quant_dtype: int, quant_scheme: per_tensor_symmetric}]",
    ]
    run = Run(load_recipe("digits-prune50", changes), tmp_path / "out", quiet=True)
    assert "sparsity" in run.recipe.compression.pruning.config_list[0]  # the recipe itself stays as it was written


def test_a_list_without_legacy_keys_passes_as_it_is() -> None:
    config_list = [
        {"op_names_re": ["c.*"], "target_names": ["weight"], "target_settings": {"weight": {"sparse_ratio": 0.5}}},
        {"op_types": ["Linear"], "sparse_threshold": 0.1, "granularity": [4, 4], "internal_metric_block": 2},
    ]
    result = modern_config_list(config_list, "pruning")
    assert result == config_list and result[0] is not config_list[0]


def test_anything_but_a_list_of_mappings_is_refused() -> None:
    for wrong in ({"op_types": ["Conv2d"]}, ["Conv2d"], nn.Identity()):
        with pytest.raises(UserError, match="a quantization config is a list of dicts such as"):
            modern_config_list(wrong, "quantization")  # type: ignore[arg-type]
