"""Completed pruning configs: what is tied, aligned, blocked, left out and left alone."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.compression.pruning.dependency_config import PruningPlan, complete_config_list, plan_pruning
from zskd_nni.models.zoo import alexnet, lenet5, wrn
from zskd_nni.runtime.errors import UserError

pruning = pytest.importorskip("nni.compression.pruning")

IMAGE = torch.rand(1, 3, 16, 16)
HALF: list[dict[str, Any]] = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]


class Net(nn.Module):
    """Layers by name, and a forward given as a function of the network and its input."""

    def __init__(self, forward: Any, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def head(net: Any, x: Tensor) -> Tensor:
    return net.fc(x.mean((2, 3)))


def plain() -> Net:
    return Net(
        lambda net, x: head(net, net.conv2(torch.relu(net.bn1(net.conv1(x))))),
        conv1=conv(3, 8), bn1=nn.BatchNorm2d(8), conv2=conv(8, 8), fc=nn.Linear(8, 4),
    )  # fmt: skip


def residual() -> Net:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.bn0(net.stem(x))
        x = x + net.bn2(net.conv2(torch.relu(net.bn1(net.conv1(x)))))
        return head(net, torch.relu(x))

    return Net(
        forward, stem=conv(3, 8), bn0=nn.BatchNorm2d(8), conv1=conv(8, 6), bn1=nn.BatchNorm2d(6), conv2=conv(6, 8),
        bn2=nn.BatchNorm2d(8), fc=nn.Linear(8, 4),
    )  # fmt: skip


def by_name(plan: PruningPlan | list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    config_list = plan.config_list if isinstance(plan, PruningPlan) else plan
    assert all(len(entry["op_names"]) == 1 for entry in config_list)
    return {entry["op_names"][0]: {k: v for k, v in entry.items() if k != "op_names"} for entry in config_list}


def aligned(leader: str, *targets: str) -> dict[str, Any]:
    alignment = {"module_name": leader, "target_name": "weight", "dims": [0]}
    return {"target_names": list(targets), "target_settings": {target: {"align": alignment} for target in targets}}


def kept(masks: dict[str, dict[str, Tensor]], name: str) -> list[int]:
    mask = masks[name]["weight"]
    return mask.reshape(len(mask), -1).any(1).nonzero().flatten().tolist()


def masks_of(model: nn.Module, config_list: list[dict[str, Any]], pruner: Any = None) -> dict[str, dict[str, Tensor]]:
    _, masks = (pruner or pruning.L1NormPruner)(deepcopy(model), config_list).compress()
    return masks


def test_the_completed_config_of_a_plain_network_in_full() -> None:
    assert by_name(complete_config_list(plain(), HALF, IMAGE)) == {
        "conv1": {"sparse_ratio": 0.5},
        "bn1": aligned("conv1", "weight", "bias"),
        "conv2": {"sparse_ratio": 0.5},
    }


@pytest.mark.parametrize(
    ("model", "last"),
    [
        (lenet5(), "fc3"),
        (alexnet(), "fc8"),
        (wrn(16, 1), "fc"),
        (torchvision.models.squeezenet1_0(), "classifier.1"),
        (torchvision.models.mobilenet_v2(), "classifier.1"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_logits_are_never_pruned(model: nn.Module, last: str) -> None:
    dummy = torch.rand(1, 1 if last == "fc3" else 3, 32, 32)
    plan = plan_pruning(model, HALF, dummy)
    assert last not in by_name(plan)
    assert plan.left_out == {last: "they are the network's output"}


def test_layers_that_are_added_share_a_group_and_their_norms_align() -> None:
    plan = plan_pruning(residual(), HALF, IMAGE)
    entries = by_name(plan)
    assert entries["stem"]["dependency_group_id"] == entries["conv2"]["dependency_group_id"]
    assert "dependency_group_id" not in entries["conv1"]
    assert entries["bn0"] == aligned("stem", "weight", "bias") == entries["bn2"]
    assert entries["bn1"] == aligned("conv1", "weight", "bias")
    masks = masks_of(residual(), plan.config_list)
    assert kept(masks, "stem") == kept(masks, "conv2") == kept(masks, "bn0") == kept(masks, "bn2")
    assert len(kept(masks, "stem")) == 4
    assert torch.equal(masks["bn2"]["bias"], masks["bn2"]["weight"])


def test_groups_of_different_stages_stay_apart() -> None:
    entries = by_name(complete_config_list(wrn(16, 1), HALF, torch.rand(1, 3, 32, 32)))
    groups = {entries[f"group{stage}.0.conv2"]["dependency_group_id"] for stage in (1, 2, 3)}
    assert len(groups) == 3
    # The stem has the width of the first group and is added to it.
    assert entries["conv1"]["dependency_group_id"] == entries["group1.0.conv2"]["dependency_group_id"]
    assert entries["bn"]["target_settings"]["weight"]["align"]["module_name"] in ("group3.0.shortcut", "group3.0.conv2")


def depthwise() -> Net:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = functional.relu6(net.bn1(net.expand(x)))
        return head(net, net.project(functional.relu6(net.bn2(net.deep(x)))))

    return Net(
        forward, expand=conv(3, 12), bn1=nn.BatchNorm2d(12), deep=conv(12, 12, groups=12), bn2=nn.BatchNorm2d(12),
        project=conv(12, 8), fc=nn.Linear(8, 4),
    )  # fmt: skip


def test_a_depthwise_convolution_follows_its_producer() -> None:
    entries = by_name(complete_config_list(depthwise(), HALF, IMAGE))
    assert entries["deep"] == aligned("expand", "weight", "bias")
    assert entries["bn2"] == aligned("expand", "weight", "bias")
    with pytest.raises(UserError, match="nothing that the pruning config names can be pruned"):
        complete_config_list(depthwise(), [{"op_names": ["deep"], "sparse_ratio": 0.5}], IMAGE)


def test_the_groups_of_a_grouped_convolution_lose_alike() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda net, x: head(net, net.out(torch.relu(net.grouped(torch.relu(net.first(x)))))),
        first=conv(3, 16), grouped=conv(16, 24, groups=4), out=conv(24, 8), fc=nn.Linear(8, 4),
    )  # fmt: skip
    entries = by_name(complete_config_list(model, HALF, IMAGE))
    assert entries["first"]["internal_metric_block"] == entries["grouped"]["internal_metric_block"] == 4
    assert entries["first"]["dependency_group_id"] != entries["grouped"]["dependency_group_id"]
    masks = masks_of(model, complete_config_list(model, HALF, IMAGE))
    assert [sum(index // 4 == block for index in kept(masks, "first")) for block in range(4)] == [2] * 4
    assert [sum(index // 6 == block for index in kept(masks, "grouped")) for block in range(4)] == [3] * 4


def excitation(kind: type[nn.Module]) -> Net:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = torch.relu(net.body(x))
        if kind is nn.Linear:
            batch, channels = x.size(0), x.size(1)
            gate = torch.sigmoid(net.up(torch.relu(net.down(x.mean((2, 3)))))).view(batch, channels, 1, 1)
        else:
            gate = torch.sigmoid(net.up(torch.relu(net.down(x.mean((2, 3), keepdim=True)))))
        return head(net, net.out(x * gate))

    layer = nn.Linear if kind is nn.Linear else (lambda inputs, outputs: nn.Conv2d(inputs, outputs, 1))
    return Net(forward, body=conv(3, 16), down=layer(16, 8), up=layer(8, 16), out=conv(16, 8), fc=nn.Linear(8, 4))


def test_gates_lose_the_channels_that_they_multiply() -> None:
    plan = plan_pruning(excitation(nn.Conv2d), HALF, IMAGE)
    masks = masks_of(excitation(nn.Conv2d), plan.config_list)
    assert kept(masks, "up") == kept(masks, "body") and len(kept(masks, "up")) == 8
    # NNI cannot average the metrics of a convolution and a linear layer; one of them leads.
    entries = by_name(complete_config_list(excitation(nn.Linear), HALF, IMAGE))
    assert entries["body"] == {"sparse_ratio": 0.5}
    assert entries["up"] == aligned("body", "weight", "bias")
    # A gate that the config does not name follows all the same.
    config = [{"op_names": ["body"], "sparse_ratio": 0.5}]
    only_body = by_name(complete_config_list(excitation(nn.Conv2d), config, IMAGE))
    assert only_body["up"] == aligned("body", "weight", "bias") and "down" not in only_body


def test_norms_behind_a_concatenation_cannot_align_but_do_not_hinder() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = torch.cat([net.left(x), net.right(x)], 1)
        return head(net, net.out(torch.relu(net.bn(x))))

    def model(**options: Any) -> Net:
        return Net(forward, left=conv(3, 8), right=conv(3, 4), bn=nn.BatchNorm2d(12), out=nn.Conv2d(12, 8, **options),
                   fc=nn.Linear(8, 4))  # fmt: skip

    assert set(by_name(complete_config_list(model(kernel_size=1), HALF, IMAGE))) == {"left", "right", "out"}
    # ... unless the constant that the norm leaves would meet a padding.
    plan = plan_pruning(model(kernel_size=3, padding=1), HALF, IMAGE)
    assert set(by_name(plan)) == {"out"}
    assert "padding of out" in plan.left_out["left"]


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda net, x: net.fc(net.first(x).mean((2, 3)).view(-1, 8)), "view"),
        (lambda net, x: net.fc(torch.cat(net.first(x).chunk(2, 1), 1).mean((2, 3))), "chunk"),
        (lambda net, x: net.fc(net.first(x)[:, :8].mean((2, 3))), "getitem"),
        (lambda net, x: net.fc(net.norm(net.first(x)).mean((2, 3))), "GroupNorm"),
        (lambda net, x: net.fc(functional.softmax(net.first(x), 1).mean((2, 3))), "softmax"),
        (lambda net, x: net.fc(functional.pad(net.first(x), (0, 0, 0, 0, 0, 0)).mean((2, 3))), "pad"),
        (lambda net, x: net.fc(net.again(net.again(net.first(x))).mean((2, 3))), "calls 2 times"),
        (lambda net, x: net.fc(net.second(torch.sigmoid(net.first(x))).mean((2, 3))), "padding of second"),
        (lambda net, x: net.fc((net.first(x) + net.first.bias.view(1, -1, 1, 1)).mean((2, 3))), "add"),
    ],
)
def test_channels_that_could_not_be_removed_stay_with_the_reason(forward: Any, reason: str) -> None:
    model = Net(
        forward, first=conv(8, 8), again=conv(8, 8), second=conv(8, 8), norm=nn.GroupNorm(2, 8), other=conv(8, 8),
        fc=nn.Linear(8, 4),
    )  # fmt: skip
    run = model._forward
    model._forward = lambda net, x: run(net, torch.relu(net.other(x)))  # something that can be pruned
    plan = plan_pruning(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], torch.rand(1, 8, 8, 8))
    assert "first" not in by_name(plan)
    assert reason in plan.left_out["first"]
    assert "again" not in by_name(plan)


def test_layers_that_share_some_channels_only_stay() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return head(net, net.out(torch.relu(torch.cat([net.left(x), net.right(x)], 1) + net.wide(x))))

    model = Net(forward, left=conv(3, 8), right=conv(3, 4), wide=conv(3, 12), out=conv(12, 8), fc=nn.Linear(8, 4))
    plan = plan_pruning(model, HALF, IMAGE)
    assert set(by_name(plan)) == {"out"}
    assert "some of their channels" in plan.left_out["wide"]


def test_excluding_one_of_the_tied_layers_leaves_out_all_of_them() -> None:
    plan = plan_pruning(residual(), [{**HALF[0], "exclude_op_names": ["stem"]}], IMAGE)
    assert set(by_name(plan)) == {"conv1", "bn1"}
    assert plan.left_out["conv2"] == "it shares channels with stem, which the config does not prune"


# ---- the user's own keys


def test_the_users_keys_pass_through() -> None:
    config = [
        {"op_names": ["conv1"], "sparse_ratio": 0.25, "max_sparse_ratio": 0.3, "global_group_id": "g"},
        {"op_types": ["Conv2d"], "target_names": ["weight"],
         "target_settings": {"weight": {"sparse_ratio": 0.5, "granularity": "out_channel"}}},
    ]  # fmt: skip
    given = deepcopy(config)
    entries = by_name(complete_config_list(plain(), config, IMAGE))
    assert config == given
    assert entries["conv1"] == {key: value for key, value in config[0].items() if key != "op_names"}
    # ... but a bias goes with its weight: it would keep the channel alive.
    assert entries["conv2"] == {"target_names": ["weight", "bias"], "target_settings": config[1]["target_settings"]}


def test_targets_of_several_entries_for_one_module_are_joined_as_nni_joins_them() -> None:
    align = {"align": {"module_name": None, "target_name": "weight", "dims": [0]}}
    config = [
        {"op_names": ["conv1"], "target_names": ["weight"], "sparse_ratio": 0.25, "max_sparse_ratio": 0.3},
        {"op_names": ["conv1"], "target_names": ["weight", "bias"], "target_settings": {"bias": align}},
        {"op_names": ["conv2"], "sparse_ratio": 0.5},
        {"op_names": ["conv2"], "sparse_ratio": 0.75},
    ]
    entries = by_name(complete_config_list(plain(), config, IMAGE))
    weight = {"sparse_ratio": 0.25, "max_sparse_ratio": 0.3}
    assert entries["conv1"] == {
        "target_names": ["weight", "bias"],
        "target_settings": {"weight": weight, "bias": align},
    }
    assert entries["conv2"] == {"sparse_ratio": 0.5}


def test_the_users_groups_and_alignments_win() -> None:
    own = {"sparse_ratio": 0.5, "dependency_group_id": "mine"}
    align = {"target_names": ["weight"], "target_settings": {"weight": {"align": {
        "module_name": "stem", "target_name": "weight", "dims": [0]}}}}  # fmt: skip
    config = [
        {"op_names": ["stem", "conv2"], **own},
        {"op_names": ["bn2"], **align},
        {"op_names": ["conv1"], "sparse_ratio": 0.5},
    ]
    entries = by_name(complete_config_list(residual(), config, IMAGE))
    assert entries["stem"] == entries["conv2"] == own
    assert entries["bn2"] == align
    assert entries["bn0"] == aligned("stem", "weight", "bias")
    assert entries["conv1"] == {"sparse_ratio": 0.5}


def test_fine_grained_settings_are_not_touched() -> None:
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "granularity": [1, 1]}]
    entries = by_name(complete_config_list(plain(), config, IMAGE))
    assert entries["conv1"] == {"sparse_ratio": 0.5, "granularity": [1, 1]}


def test_a_threshold_leads_and_the_tied_layers_follow() -> None:
    config = complete_config_list(residual(), [{"op_types": ["Conv2d"], "sparse_threshold": 1.0}], IMAGE)
    entries = by_name(config)
    assert entries["stem"] == {"sparse_threshold": 1.0}
    assert entries["conv2"] == aligned("stem", "weight", "bias")
    masks = masks_of(residual(), config)
    assert kept(masks, "stem") == kept(masks, "conv2") == kept(masks, "bn2")


def test_norms_lead_where_the_config_names_them() -> None:
    torch.manual_seed(0)
    model = residual()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    config = complete_config_list(model, [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}], IMAGE)
    masks = masks_of(model, config)
    assert set(masks) == {"bn0", "bn1", "bn2"}
    assert kept(masks, "bn0") == kept(masks, "bn2") and len(kept(masks, "bn0")) == 4
    assert all(torch.equal(mask["weight"], mask["bias"]) for mask in masks.values())
    plan = plan_pruning(model, [{"op_names": ["bn0", "bn1"], "sparse_ratio": 0.5}], IMAGE)
    assert set(by_name(plan)) == {"bn1"} and "bn2" in plan.left_out["bn0"]


def test_norms_do_not_lead_where_something_reads_past_them() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.conv1(x)
        return head(net, torch.relu(net.bn2(net.conv2(x + net.bn1(x)))))

    model = Net(forward, conv1=conv(3, 8), bn1=nn.BatchNorm2d(8), conv2=conv(8, 8), bn2=nn.BatchNorm2d(8),
                fc=nn.Linear(8, 4))  # fmt: skip
    plan = plan_pruning(model, [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}], IMAGE)
    assert set(by_name(plan)) == {"bn2"}
    assert "past the normalisation" in plan.left_out["bn1"]


def test_nnis_old_keys_work() -> None:
    entries = by_name(complete_config_list(plain(), [{"op_types": ["Conv2d"], "sparsity": 0.5}], IMAGE))
    assert entries["conv1"]["sparse_ratio"] == 0.5
    assert masks_of(plain(), complete_config_list(plain(), [{"op_types": ["Conv2d"], "sparsity": 0.5}], IMAGE))


def test_the_same_model_gets_the_same_config() -> None:
    dummy = torch.rand(1, 3, 32, 32)
    assert complete_config_list(wrn(16, 1), HALF, dummy) == complete_config_list(wrn(16, 1), HALF, dummy)


def test_the_model_is_left_as_it_was() -> None:
    model = residual().train()
    model.bn1.eval()
    state, modes = deepcopy(model.state_dict()), [module.training for module in model.modules()]
    complete_config_list(model, HALF, IMAGE)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# ---- errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([{"op_names": ["conv7"], "sparse_ratio": 0.5}], "entry 0 of the pruning config names 'conv7'"),
        ([*HALF, {"op_types": ["Conv3d"], "sparse_ratio": 0.5}], "entry 1 of the pruning config names 'Conv3d'"),
        ([{"op_names": ["fc"], "sparse_ratio": 0.5}], r"can be pruned \(fc: they are the network's output\)"),
        ([{"op_names": ["stem"], "sparse_ratio": 0.5}], "shares channels with conv2"),
        ({"op_types": ["Conv2d"], "sparse_ratio": 0.5}, "is a list of dicts"),
        (
            [{"op_names": ["stem"], "sparse_ratio": 0.5}, {"op_names": ["conv2"], "sparse_ratio": 0.25}],
            "stem and conv2 share their channels, but the pruning config gives them sparse_ratio 0.5 and 0.25",
        ),
        (
            [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}, {"op_names": ["bn1"], "sparse_ratio": 0.25}],
            "conv1 and bn1 share their channels",
        ),
        ([{"op_types": ["BatchNorm2d"], "sparse_threshold": 0.5}], "give a sparse_ratio"),
    ],
)
def test_what_cannot_be_meant_is_refused(config: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        complete_config_list(residual(), config, IMAGE)


def test_a_wrapped_model_is_refused() -> None:
    model = plain()
    pruning.L1NormPruner(model, complete_config_list(model, HALF, IMAGE))
    with pytest.raises(UserError, match="wrapped by an NNI compressor"):
        complete_config_list(model, HALF, IMAGE)
