"""The keys of NNI's documented pruning configs hold, are refused, or are warned about with figures."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from nni.compression.pruning import L1NormPruner
from torch import Tensor, nn

from zskd_nni.compression.nni_config import modern_config_list
from zskd_nni.compression.pruning.dependency_config import plan_pruning
from zskd_nni.compression.pruning.nni_pruner import pruning_plan, track_activations
from zskd_nni.compression.pruning.prune import check_pruning, prune
from zskd_nni.compression.pruning.speedup import shrink
from zskd_nni.data.sources import NoiseSource
from zskd_nni.models.teacher import Teacher
from zskd_nni.recipes.compression_config import CompressionRun, PruningConfig, ScheduleConfig
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.distillation import DistillationSettings

SPEC = (1, 8, 8)


class Plain(nn.Module):
    """Two convolutions, of which the first has the larger weights, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1, self.conv2 = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3)
        self.fc1, self.fc2 = nn.Linear(256, 20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv, self.fc = (
            nn.Conv2d(1, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Linear(16, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.fc(torch.relu(x + self.conv(x)).mean((2, 3)))


def pruned(network: nn.Module, config_list: list[dict[str, Any]], **options: Any) -> Any:
    teacher = Teacher(network, SPEC)
    config = PruningConfig(config_list, **{"steps": 8, **options})
    settings, run = DistillationSettings(batch=8, temperature=4), CompressionRun(quiet=True)
    return prune(teacher.student(), config, teacher, NoiseSource(teacher.spec, 8), settings, run=run)


def weights(record: dict[str, Any], network: nn.Module) -> dict[str, tuple[float, int]]:
    """Sparsity and size of each weight."""
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    return {name: (share, sizes[name]) for name, share in record["sparsity"].items() if name.endswith("weight")}


def total(record: dict[str, Any], network: nn.Module, names: list[str]) -> float:
    rows = [weights(record, network)[f"{name}.weight"] for name in names]
    return sum(share * size for share, size in rows) / sum(size for _, size in rows)


NAMES = ["conv1", "conv2", "fc1"]


@pytest.mark.parametrize("pruner", ["TaylorPruner", "L1NormPruner"])
@pytest.mark.parametrize("schedule", [None, ScheduleConfig(name="AGPPruner", interval=2, total_times=4)])
def test_a_global_group_reaches_its_sparsity_within_its_limits(pruner: str, schedule: Any) -> None:
    group = {"op_names": NAMES, "sparse_ratio": 0.5, "global_group_id": "g", "max_sparse_ratio": 0.6}
    result = pruned(Plain(), [{**group, "min_sparse_ratio": 0.25}], pruner=pruner, schedule=schedule)
    shares = [share for name, (share, _) in weights(result.record, Plain()).items() if name != "bn1.weight"]
    assert abs(total(result.record, Plain(), NAMES) - 0.5) < 256 / (72 + 1152 + 5120)
    assert all(0.2 < share <= 0.6 for share in shares)
    assert "missed_sparsity" not in result.record


def test_total_sparsity_of_nni_2_holds_max_sparsity_per_layer() -> None:
    config = [{"op_names": NAMES, "total_sparsity": 0.5, "max_sparsity_per_layer": 0.55}]
    result = pruned(Plain(), config, pruner="L1NormPruner")
    assert abs(total(result.record, Plain(), NAMES) - 0.5) < 0.05
    assert max(share for share, _ in weights(result.record, Plain()).values()) <= 0.55


def test_a_global_group_leaves_no_layer_without_a_channel() -> None:
    network = Plain()
    with torch.no_grad():
        network.conv1.weight.mul_(1e-3)  # its channels are the first to go
    result = pruned(network, [{"op_names": NAMES, "sparse_ratio": 0.5, "global_group_id": 1}], steps=0)
    assert result.network.conv1.out_channels == 1


def test_limits_hold_where_layers_share_their_channels(caplog: pytest.LogCaptureFixture) -> None:
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "max_sparse_ratio": 0.25}]
    with caplog.at_level(logging.WARNING):
        result = pruned(Residual(), config, steps=0)
    assert result.network.stem.out_channels == 12
    assert result.record["missed_sparsity"]["conv.weight"] == {"asked": 0.5, "reached": 0.25}
    assert "the sparsity asked for was missed: stem.weight 25.0% for 50.0%" in caplog.text
    assert "25.0% for 50.0%" in result.record["note"]


def test_a_missed_threshold_of_whole_channels_is_no_miss() -> None:
    assert "missed_sparsity" not in pruned(Plain(), [{"op_names": ["conv1"], "sparse_ratio": 0.3}], steps=0).record


@pytest.mark.parametrize("granularity", [[1, -1, -1, -1], [[1], "back", -1]])
def test_a_list_that_means_output_channels_is_out_channel(granularity: Any) -> None:
    image = torch.rand(2, *SPEC)
    plans = [
        plan_pruning(Residual(), [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "granularity": value}], image)
        for value in ("out_channel", granularity)
    ]
    assert plans[0].config_list == plans[1].config_list
    assert plans[1].config_list[0]["dependency_group_id"] == "channels of stem"


def test_a_list_in_target_settings_of_a_linear_layer_is_out_channel() -> None:
    weight = {"sparse_ratio": 0.5, "granularity": [1, -1]}
    config = [{"op_names": ["fc1"], "target_names": ["weight", "bias"], "target_settings": {"weight": weight}}]
    plan = plan_pruning(Plain(), config, torch.rand(2, *SPEC))
    assert plan.config_list[0]["target_settings"]["weight"]["granularity"] == "out_channel"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"sparse_ratio": 0.5, "apply_method": "add"}, "apply_method 'add' adds -1000"),
        (
            {"sparse_ratio": 0.5, "min_sparse_ratio": 0.6, "max_sparse_ratio": 0.4},
            "0.6 is larger than max_sparse_ratio",
        ),
        ({"sparse_ratio": 0.5, "max_sparse_ratio": 2}, "max_sparse_ratio must be a number from 0 to 1, not 2"),
        ({"sparse_ratio": 0.5, "internal_metric_block": 0}, "internal_metric_block must be a whole number"),
        ({"sparse_ratio": 0.5, "internal_metric_block": 3}, "3 does not divide the 8 channels of conv1"),
        ({"sparse_threshold": "small"}, "sparse_threshold must be a number"),
        ({"sparse_threshold": 0.1, "global_group_id": "g"}, "without a sparse_ratio"),
        ({"sparse_ratio": 0.5, "global_group_id": [1]}, "global_group_id must be a number or a word"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_pruning(Plain(), [{"op_names": ["conv1"], **entry}], torch.rand(2, *SPEC))


def test_one_group_has_one_ratio() -> None:
    config = [
        {"op_names": ["conv1"], "sparse_ratio": 0.5, "global_group_id": 1},
        {"op_names": ["fc1"], "sparse_ratio": 0.4, "global_group_id": 1},
    ]
    with pytest.raises(UserError, match=r"has the sparse_ratio 0.5 for conv1 and 0.4 for fc1"):
        plan_pruning(Plain(), config, torch.rand(2, *SPEC))


def test_whole_numbers_are_ratios() -> None:
    given = {"op_names": ["conv1"], "sparse_ratio": 0, "max_sparse_ratio": 1}
    given["target_settings"] = {"weight": {"sparse_threshold": 1}}
    modern = modern_config_list([given], "pruning")[0]
    assert [type(modern[key]) for key in ("sparse_ratio", "max_sparse_ratio")] == [float, float]
    assert modern["target_settings"]["weight"]["sparse_threshold"] == 1.0


def test_bypass_is_warned_about_in_pruning_and_refused_in_quantization(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        entry = {"op_names": ["conv1"], "sparse_ratio": 0.5, "apply_method": "bypass"}
        plan_pruning(Plain(), [entry], torch.rand(2, *SPEC))
    assert "conv1 has the apply_method 'bypass'" in caplog.text
    for nested in (False, True):
        own = {"apply_method": "bypass"}
        config = {"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int8"}
        config |= {"target_settings": {"weight": {"quant_dtype": "int8", **own}}} if nested else own
        with pytest.raises(UserError, match="apply_method 'bypass' has no effect in NNI"):
            modern_config_list([config], "quantization")


def aligned(name: str, output: str = "_output_") -> dict[str, Any]:
    align = {"align": {"module_name": name, "target_name": "weight", "dims": [0]}, "granularity": "per_channel"}
    return {"op_names": ["bn1"], "target_names": [output], "target_settings": {output: align}}


@pytest.mark.parametrize("pruner", ["L1NormPruner", "TaylorPruner"])
@pytest.mark.parametrize("output", ["_output_", "_output_0"])
@pytest.mark.parametrize("speedup", [True, False])
def test_an_aligned_activation_is_pruned_with_its_convolution(pruner: str, output: str, speedup: bool) -> None:
    teacher = Teacher(Plain(), SPEC)
    config_list = [{"op_names": ["conv1"], "sparse_ratio": 0.5}, aligned("conv1", output)]
    arguments = {"training_steps": 2} if pruner == "TaylorPruner" else {}
    config = PruningConfig(config_list, pruner=pruner, arguments=arguments, steps=2, speedup=speedup)
    check_pruning(teacher.student(), config, pruning_plan(teacher.model, config, teacher), teacher)
    result = pruned(Plain(), config_list, pruner=pruner, arguments=arguments, steps=2, speedup=speedup)
    assert result.network.conv1.out_channels == (4 if speedup else 8)
    gone = result.record["removed_channels"]["conv1"]
    if not speedup:  # zeros stay in the normalisation too, so that the channel is silent
        assert not bool(result.network.bn1.weight[gone].any()) and not bool(result.network.bn1.bias[gone].any())


def test_modes_are_restored_after_a_pass_that_fails() -> None:
    network = Plain().train()
    network.bn1.eval()
    modes = [module.training for module in network.modules()]
    pruner = L1NormPruner(network, [{"op_names": ["conv1"], "sparse_ratio": 0.5}, aligned("conv1")])
    with pytest.raises(RuntimeError):
        track_activations(pruner, torch.rand(1, 2, 8, 8))
    pruner.unwrap_model()
    assert [module.training for module in network.modules()] == modes


def test_masks_of_activations_in_the_tensors_shape() -> None:
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(1), nn.Linear(288, 10))
    weight, bias = torch.ones(8, 1, 3, 3), torch.ones(8)
    weight[:4], bias[:4] = 0, 0
    base = {"weight": weight, "bias": bias}
    image = torch.rand(2, 1, 8, 8)
    expected = shrink(network, {"0": base}, image).parameters_after
    channels = torch.ones(2, 8, 6, 6)
    channels[:, :4] = 0
    for masks in (
        {"0": {**base, "_output_0": torch.ones(2, 8, 6, 6)}},
        {"0": base, "1": {"_input_0": torch.ones(2, 8, 6, 6)}, "2": {"_output_0": torch.ones(2, 288)}},
        {"0": base, "3": {"_input_0": torch.ones(1, 288), "weight": None}},
        {"0": {"_output_0": channels}},
        {"0": {"_output_0": channels[:1, :, :1, :1]}},
    ):
        assert shrink(network, masks, image).parameters_after == expected
    channels[0, 5, 0, 0] = 0
    with pytest.raises(UserError, match=r"output mask of 0 has the shape \(2, 8, 6, 6\), not one value a channel"):
        shrink(network, {"0": {"_output_0": channels}}, image)
    with pytest.raises(UserError, match="covers neither a parameter nor the channels"):
        shrink(network, {"1": {"_output_0": channels}}, image)


class Excited(nn.Module):
    """Squeeze and excitation, whose gate is spread over the image as ``how`` says."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.conv, self.head, self.how = nn.Conv2d(1, 16, 3), nn.Linear(16, 4), how
        self.gate = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head((x * self.how(self.gate(x.mean((2, 3))).view(x.size(0), x.size(1), 1, 1), x)).mean((2, 3)))


@pytest.mark.parametrize(
    "how",
    [
        lambda y, x: y,
        lambda y, x: y.expand_as(x),
        lambda y, x: y.expand(x.size()),
        lambda y, x: y.expand(-1, -1, 6, 6),
        lambda y, x: torch.broadcast_to(y, x.shape),
        lambda y, x: y.repeat(1, 1, 6, 6),
    ],
)
def test_a_gate_may_be_spread_in_any_way(how: Any) -> None:
    network, image = Excited(how), torch.rand(2, *SPEC)
    plan = plan_pruning(network, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], image)
    copied = copy.deepcopy(network)
    pruner = L1NormPruner(copied, plan.config_list)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert shrink(copied, masks, image).model.conv.out_channels == 8


@pytest.mark.parametrize(
    "flat",
    [
        lambda x: x.view(-1, x.size()[1:].numel()),
        lambda x: x.reshape(x.shape[0], x.shape[1:].numel()),
        lambda x: x.view(len(x), x.size()[1:].numel()),
        lambda x: x.view(x.size(0), x.numel() // x.size(0)),
        lambda x: x.flatten(1),
    ],
)
def test_a_size_may_be_multiplied_by_numel(flat: Any) -> None:
    class Flat(Plain):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return self.fc2(torch.relu(self.fc1(flat(x))))

    result = pruned(Flat(), [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], steps=0)
    assert (result.network.conv2.out_channels, result.network.fc1.in_features) == (8, 128)
