"""What others reported about tools that prune channels, on networks written after their reports.

docs/reliability.md lists the outcomes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.compression.pruning.dependency_config import plan_pruning
from zskd_nni.compression.pruning.speedup import shrink

pruning = pytest.importorskip("nni.compression.pruning")
relu = functional.relu


def half(network: nn.Module, shape: tuple[int, ...] = (3, 16, 16)) -> tuple[dict[str, int], dict[str, str]]:
    """The widths of the layers after half of the channels went by the L1 norm, and why others stay."""
    kinds = {type(module).__name__ for module in network.modules()} & {"Conv1d", "Conv2d", "Linear"}
    images = torch.full((2, *shape), 0.5)
    plan = plan_pruning(network.eval(), [{"op_types": sorted(kinds), "sparse_ratio": 0.5}], images)
    pruner = pruning.L1NormPruner(network, plan.config_list)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    result = shrink(network, masks, images)
    assert result.max_logit_difference < 1e-4 and result.parameters_after < result.parameters_before
    return {row.name: row.outputs_after for row in result.layers}, plan.left_out


class Net(nn.Module):
    def __init__(self, forward: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.forward_of = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_of(self, x)


def conv(before: int, after: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, padding=size // 2, **options)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_features_of_a_linear_layer_that_become_channels() -> None:
    """VainF/Torch-Pruning#125: ``x.view(-1, conv.in_channels, 4, 4)`` in front of transposed convolutions."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = relu(net.linear(relu(net.stem(x)).mean((2, 3)))).view(-1, net.up.in_channels, 4, 4)
        return net.fc(relu(net.last(relu(net.up(x)))).mean((2, 3)))

    layers = {"stem": conv(3, 16), "linear": nn.Linear(16, 32 * 16), "up": nn.ConvTranspose2d(32, 16, 4, 2, 1)}
    widths, left_out = half(Net(forward, **layers, last=conv(16, 16), fc=nn.Linear(16, 10)))
    assert (widths["stem"], widths["linear"], widths["last"]) == (8, 512, 8) and "view" in left_out["linear"]


def test_the_gate_of_chunks() -> None:
    """microsoft/nni#5416: ``torch.chunk`` along the channels, as NAFNet's gate does."""

    def forward(net: Any, x: Tensor) -> Tensor:
        missing = -x.shape[-1] % 16
        x = net.intro(functional.pad(x, (0, missing, 0, missing)))
        one, other = net.depthwise(net.wide(x)).chunk(2, dim=1)
        x = x + net.back(one * other) * 0.5
        return net.fc(relu(net.last(x)).mean((2, 3)))

    layers = {"intro": conv(3, 16), "wide": conv(16, 32, 1), "depthwise": conv(32, 32, groups=32)}
    widths, left_out = half(Net(forward, **layers, back=conv(16, 16, 1), last=conv(16, 24), fc=nn.Linear(24, 10)))
    assert widths["last"] == 12 and widths["wide"] == 32 and "chunk" in left_out["wide"]


def test_a_convolution_of_some_channels() -> None:
    """microsoft/nni#5713: ``torch.split`` with sizes, as FasterNet's partial convolution does."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = relu(net.stem(x))
        some, others = torch.split(x, [8, 24], dim=1)
        x = x + net.project(relu(net.norm(net.expand(torch.cat((net.part(some), others), 1)))))
        return net.fc(x.mean((2, 3)))

    layers = {"stem": conv(3, 32), "part": conv(8, 8, bias=False), "expand": conv(32, 64, 1, bias=False)}
    widths, left_out = half(
        Net(forward, **layers, norm=nn.BatchNorm2d(64), project=conv(64, 32, 1), fc=nn.Linear(32, 10))
    )
    assert (widths["expand"], widths["part"], widths["stem"]) == (32, 4, 32) and "split" in left_out["stem"]


def test_a_tensor_beside_itself() -> None:
    """VainF/Torch-Pruning#146: ``torch.cat([x, x], 1)``."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.second(functional.gelu(net.norm(net.first(x))))
        return net.fc(relu(net.last(torch.cat([x, x], dim=1))).mean((2, 3)))

    layers = {"first": conv(3, 16, 1), "norm": nn.BatchNorm2d(16), "second": conv(16, 16, 1), "last": conv(32, 16, 1)}
    widths, left_out = half(Net(forward, **layers, fc=nn.Linear(16, 10)))
    assert widths == {"first": 8, "norm": 8, "second": 8, "last": 8, "fc": 10} and left_out.keys() == {"fc"}


def test_wide_and_deep_features_side_by_side() -> None:
    """VainF/Torch-Pruning#481: ``torch.concat`` of two layers' features, which lose channels of their own."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = x.reshape(x.shape[0], -1)
        return net.last(torch.concat([net.wide(x), net.deep(x)], dim=-1))

    deep = nn.Sequential(nn.Linear(48, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4))
    widths, _ = half(Net(forward, wide=nn.Linear(48, 6), deep=deep, last=nn.Linear(10, 3)), (3, 4, 4))
    assert widths == {"wide": 3, "deep.0": 16, "deep.1": 16, "deep.4": 2, "last": 3}


def test_layers_that_read_parts_and_are_called_twice() -> None:
    """tianyic/only_train_once_personal_footprint#50: parts by the layers' own sizes, one layer for two of them."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.wide(functional.gelu(net.first(x)))
        one, two, rest = torch.split(x, [net.of_one.in_channels, net.of_one.in_channels, net.of_rest.in_channels], 1)
        return net.fc(torch.cat([net.of_one(one), net.of_one(two), net.of_rest(rest)], 1).mean((2, 3)))

    layers = {"first": conv(3, 10, 1), "wide": conv(10, 40, 1), "of_one": conv(10, 10, 1), "of_rest": conv(20, 10, 1)}
    widths, left_out = half(Net(forward, **layers, fc=nn.Linear(30, 10)))
    assert widths == {"first": 5, "wide": 40, "of_one": 10, "of_rest": 5, "fc": 10}
    assert left_out["of_one"] == "forward calls it 2 times"


def test_a_classifier_of_signals() -> None:
    """VainF/Torch-Pruning#451: Conv1d, flattened into the classifier, whose classes stay."""

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.fc(relu(net.c(relu(net.b(relu(net.a(x)))))).flatten(1))

    layers = {name: nn.Conv1d(i, o, 3, padding=1) for name, i, o in (("a", 1, 32), ("b", 32, 16), ("c", 16, 8))}
    widths, left_out = half(Net(forward, **layers, fc=nn.Linear(8 * 4, 2)), (1, 4))
    assert widths == {"a": 16, "b": 8, "c": 4, "fc": 2} and left_out.keys() == {"fc"}


@pytest.mark.parametrize("way", ["pad", "cat"])
def test_shortcuts_that_add_empty_channels(way: str) -> None:
    """VainF/Torch-Pruning#64: a CIFAR residual network whose shortcuts have no weights (option A)."""

    def shortcut(x: Tensor) -> Tensor:
        if way == "pad":
            return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
        x = functional.avg_pool2d(x, 2)
        return torch.cat((x, x.mul(0)), 1)

    def forward(net: Any, x: Tensor) -> Tensor:
        x = relu(net.stem(x))
        return net.fc(relu(net.second(relu(net.first(x))) + shortcut(x)).mean((2, 3)))

    layers = {"stem": conv(3, 16), "first": conv(16, 32, stride=2), "second": conv(32, 32)}
    widths, left_out = half(Net(forward, **layers, fc=nn.Linear(32, 10)))
    assert widths == {"stem": 16, "first": 16, "second": 32, "fc": 10} and {"stem", "second"} <= left_out.keys()


def test_one_output_beside_many() -> None:
    """VainF/Torch-Pruning#179: a convolution with one output is no depthwise one."""

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.fc(relu(net.one(relu(net.two(relu(net.first(x)))))).flatten(1))

    layers = {"first": conv(3, 16), "two": nn.Conv2d(16, 64, 2, 2), "one": conv(64, 1)}
    widths, _ = half(Net(forward, **layers, fc=nn.Linear(64, 10)))
    assert widths == {"first": 8, "two": 32, "one": 1, "fc": 10}
