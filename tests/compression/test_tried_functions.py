"""Functions that no list names: activations of the user's own, comparisons, roundings. Channels go where they can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nni.compression.pruning import L1NormPruner
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.compression.fx_trace import trace
from zskd_nni.compression.pruning.channel_flow import channel_flow
from zskd_nni.compression.pruning.dependency_config import plan_pruning
from zskd_nni.compression.pruning.speedup import ShrinkResult, shrink
from zskd_nni.compression.pruning.tried_functions import is_apart
from zskd_nni.runtime.errors import UserError

IMAGES = torch.full((2, 3, 8, 8), 0.5)


class Swish(torch.autograd.Function):
    """Keeps its input alone for the way back, as EfficientNets for PyTorch did."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        part = torch.sigmoid(x)
        return gradients[0] * (part * (1 + x * (1 - part)))


class Levels(torch.autograd.Function):
    """Rounds, and lets the gradient pass."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor, count: int) -> Tensor:
        return torch.round(x.clamp(0, 1) * count) / count

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


class Shuffled(torch.autograd.Function):
    """A function of the user's that mixes channels."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.relu() + x.relu().flip(1)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Net(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.norm, self.fc, self.act = nn.BatchNorm2d(12), nn.Linear(8, 5), act

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.b(functional.relu(self.a(x)))))
        return self.fc(functional.relu(self.c(x)).mean((2, 3)))


def half(act: Callable[[Tensor], Tensor], images: Tensor = IMAGES) -> ShrinkResult:
    torch.manual_seed(0)
    network = Net(act).eval()
    nn.init.uniform_(network.norm.bias, -0.5, 0.5)
    plan = plan_pruning(network, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], images)
    pruner = L1NormPruner(network, plan.config_list)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return shrink(network, masks, images)  # traced anew: the functions are tried again


SILENT: dict[str, Callable[[Tensor], Tensor]] = {
    "an autograd function": lambda x: Swish.apply(x),  # found when it is called
    "an autograd function whose apply was kept": Swish.apply,
    "one with a number": lambda x: Levels.apply(x, 3),
    "sign": torch.sign,
    "round": lambda x: torch.round(x * 4) / 4,
    "floor, in place": lambda x: x.clone().floor_(),
    "gradients let pass": lambda x: x + (torch.sign(x) - x).detach(),
    "a comparison": lambda x: (x > 0).float(),
    "a comparison as a factor": lambda x: x * (x > 0.1),
    "two of them": lambda x: x * torch.logical_and(x > -1, x < 1),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "where, and zeros": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "the larger of two": lambda x: torch.maximum(x, 0.2 * x),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0),
    "an index of truth values": lambda x: assigned(x.clone()),
    "lerp": lambda x: torch.lerp(x, functional.relu(x), 0.5),
    "einsum": lambda x: torch.einsum("nchw->nchw", functional.relu(x)),
    "cut off below what is drawn": lambda x: x.clamp(max=0.05),
}
CONSTANT: dict[str, Callable[[Tensor], Tensor]] = {
    "a sigmoid by hand": lambda x: 1 / (1 + torch.exp(-x)),
    "log": lambda x: torch.log(1 + functional.relu(x)),
    "greater or equal": lambda x: (x >= 0).float(),
    "where, and a number": lambda x: torch.where(x > 0, x, -0.1),
}
MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "an autograd function": lambda x: Shuffled.apply(x),
    "sorted channels": lambda x: x.sort(1).values,
    "the chosen channel": lambda x: functional.one_hot(x.argmax(1), 12).permute(0, 3, 1, 2).float(),
    "random numbers": lambda x: x + 0 * torch.randn_like(x),
    "numbers without an order": lambda x: torch.fft.ifft2(torch.fft.fft2(x)).real,
}


def assigned(x: Tensor) -> Tensor:
    x[x < 0] = 0.0
    return x


def left(result: ShrinkResult, name: str) -> int:
    return next(row.outputs_after for row in result.layers if row.name == name)


@pytest.mark.parametrize("name", SILENT)
def test_channels_pass_functions_that_treat_each_by_itself(name: str) -> None:
    result = half(SILENT[name])
    assert [left(result, layer) for layer in "abc"] == [4, 6, 4]
    assert result.max_logit_difference < 1e-5


@pytest.mark.parametrize("name", CONSTANT)
def test_what_a_function_makes_of_zero_is_seen(name: str) -> None:
    """Behind it is a padded convolution, for which a constant channel is no bias."""
    assert left(half(CONSTANT[name]), "b") == 12
    torch.manual_seed(0)
    network = Net(CONSTANT[name]).eval()
    network.c = nn.Conv2d(12, 8, 3)
    plan = plan_pruning(network, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], IMAGES)
    pruner = L1NormPruner(network, plan.config_list)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    result = shrink(network, masks, IMAGES, graph=plan.graph)
    assert left(result, "b") == 6 and result.max_logit_difference < 1e-5


@pytest.mark.parametrize("name", MIXED)
def test_channels_stay_where_a_function_mixes_them(name: str) -> None:
    result = half(MIXED[name])
    assert [left(result, layer) for layer in "abc"] == [4, 12, 4]


def test_what_was_tried_is_marked() -> None:
    graph = trace(Net(lambda x: torch.sign(x).sort(1).values), IMAGES)
    channel_flow(graph)
    marks = {getattr(node.target, "__name__", str(node.target)): is_apart(node) for node in graph.graph.nodes}
    assert marks["sign"] and not marks["sort"] and not marks["relu"]


def test_random_numbers_and_tensors_are_as_before() -> None:
    seen: list[Tensor] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, x: Tensor) -> Tensor:
            seen.append(x)
            return x.relu_()  # in place

        @staticmethod
        def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0]

    torch.manual_seed(5)
    expected = torch.rand(3)
    network = Net(lambda x: Watched.apply(x)).eval()
    torch.manual_seed(5)
    channel_flow(trace(network, IMAGES))
    assert torch.equal(torch.rand(3), expected) and len(seen) > 3


def test_a_function_that_refuses_what_it_is_tried_with_keeps_its_channels() -> None:
    def picky(x: Tensor) -> Tensor:
        return Picky.apply(x)

    class Picky(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, x: Tensor) -> Tensor:
            if x.shape[1] != 12:
                raise ValueError("twelve channels")
            return x.relu()

        @staticmethod
        def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0]

    assert left(half(picky), "b") == 12


def test_the_reason_names_the_function() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), Apply(lambda x: Shuffled.apply(x)), nn.Flatten(), nn.Linear(144, 5)
    ).eval()
    with pytest.raises(UserError, match="0: they pass `Shuffled`"):
        plan_pruning(network, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], IMAGES)


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
