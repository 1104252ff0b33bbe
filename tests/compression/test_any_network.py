"""Networks as people write them shrink, each way of writing in a few instances."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from zskd_nni.compression.fx_trace import trace
from zskd_nni.compression.pruning.dependency_config import PruningPlan, plan_pruning
from zskd_nni.compression.pruning.speedup import ShrinkResult, compare, shrink
from zskd_nni.models.serialization import load_network, save_network
from zskd_nni.runtime.errors import UserError

pruning = pytest.importorskip("nni.compression.pruning")

HALF = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
IMAGES = torch.full((2, 3, 16, 16), 0.5)


class Net(nn.Module):
    """Two convolutions and a classifier; ``body`` computes what lies between the first and the second."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], inner: int = 16, **modules: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(inner, 16, 3, padding=1)
        self.fc, self._body = nn.Linear(16, 10), body
        for name, value in modules.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor, return_features: bool = False, *, scale: float = 1.0) -> Any:
        x = self._body(self, functional.relu(self.a(x)))
        features = functional.relu(self.b(x)).mean((2, 3)) * scale
        return (self.fc(features), features) if return_features else self.fc(features)


def plan_of(network: nn.Module, config: list[dict[str, Any]] = HALF) -> PruningPlan:
    return plan_pruning(network.eval(), config, IMAGES)


def half(network: nn.Module, config: list[dict[str, Any]] = HALF) -> ShrinkResult:
    """Half of the channels by the L1 norm; the result computes what the masked network does."""
    plan = plan_of(network, config)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pruner = pruning.L1NormPruner(network, plan.config_list)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    result = shrink(network, masks, IMAGES)
    assert result.parameters_after < result.parameters_before and result.max_logit_difference < 1e-4
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    return result


def widths(result: ShrinkResult) -> dict[str, int]:
    return {row.name: row.outputs_after for row in result.layers}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# Python on shapes and on arguments that have defaults.


def checked(net: Any, x: Tensor) -> Tensor:
    assert x.dim() == 4 and x.shape[-1] == 16 and len(x) > 0
    return x


def resized(net: Any, x: Tensor) -> Tensor:
    if x.shape[-1] != 8:
        x = functional.interpolate(x, size=(8, 8))
    return x


def starred(net: Any, x: Tensor) -> Tensor:
    n, c, *_ = x.shape
    return x.view(n, c, -1).unsqueeze(3)


def joined_sizes(net: Any, x: Tensor) -> Tensor:
    return x.view(*(x.shape[:2] + (-1, 1)))  # noqa: RUF005 - a sum of sizes is the case


def expanded(net: Any, x: Tensor) -> Tensor:
    return x + net.grid.expand(x.shape[0], -1, -1, -1)


def padded_to_a_multiple(net: Any, x: Tensor) -> Tensor:
    missing = -x.size(2) % 12
    return functional.pad(x, (0, missing, 0, missing)) if missing else x


def looped(net: Any, x: Tensor) -> Tensor:
    for _ in range(int(x.shape[-1] ** 0.5)):
        x = torch.tanh(x)
    return x


def in_place(net: Any, x: Tensor) -> Tensor:
    x.mul_(2.0)
    x += 0.0
    return x


def cropped(net: Any, x: Tensor) -> Tensor:
    return x[:, :, : x.shape[2] // 2, 1 : x.size(3) - 1]


def told_by_constants(net: Any, x: Tensor) -> Tensor:
    return x * 2 if bool(net.grid.sum() > 0) else x


@pytest.mark.parametrize(
    "body",
    [checked, starred, joined_sizes, looped, in_place, resized, cropped, told_by_constants],
    ids=lambda body: body.__name__,
)
def test_python_on_shapes_is_followed(body: Callable[..., Tensor]) -> None:
    result = half(Net(body, grid=torch.rand(1, 1, 16, 16)))
    assert widths(result) == {"a": 8, "b": 8, "fc": 10}


@pytest.mark.parametrize("body", [expanded, padded_to_a_multiple], ids=lambda body: body.__name__)
def test_where_channels_stay_the_others_go(body: Callable[..., Tensor]) -> None:
    assert widths(half(Net(body, grid=torch.rand(1, 1, 16, 16))))["b"] == 8


def test_a_number_of_channels_that_python_uses_stays() -> None:
    def swapped(net: Any, x: Tensor) -> Tensor:
        middle = int(x.size(1) * 0.5)
        return torch.cat([x[:, middle:], x[:, :middle]], 1)

    def counted(net: Any, x: Tensor) -> Tensor:
        return x if x.size(1) == 16 else x * 2

    def divided(net: Any, x: Tensor) -> Tensor:
        return x * x.shape[1] ** -0.5

    for body in (swapped, counted, divided):
        assert widths(half(Net(body))) == {"a": 16, "b": 8, "fc": 10}
    assert "Python" in plan_of(Net(counted)).left_out["a"]
    assert plan_of(Net(divided)).left_out["a"] == "`mul` computes with their number"


def test_only_the_image_is_traced() -> None:
    network = Net(lambda net, x: x)
    graph = trace(network, IMAGES).graph
    assert [node.target for node in graph.nodes if node.op == "placeholder"] == ["x"]
    shrunken = half(network).model
    assert isinstance(shrunken(IMAGES), Tensor) and len(shrunken(IMAGES, True)) == 2  # the argument is still there

    class Flags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(lambda net, x: x)

        def forward(self, x: Tensor, mask: Tensor | None = None, *rest: Any, mode: str = "logits") -> Tensor:
            x = x if mask is None else x * mask
            return self.net(x) if mode == "logits" and not rest else self.net(x, True)[1]

    half(Flags())


@pytest.mark.parametrize(
    "body",
    [
        lambda net, x: x if x.mean() > 0 else -x,
        lambda net, x: x * x.max().item(),
        lambda net, x: x[: int((x > 0).sum())],
        lambda net, x: torch.from_numpy(x.numpy()) * 2,
    ],
)
def test_values_of_the_image_are_refused(body: Callable[..., Tensor]) -> None:
    with pytest.raises(UserError, match=r"cannot trace Net: .*value of a tensor that depends on the input"):
        trace(Net(body).eval(), IMAGES)


def test_a_graph_that_holds_for_one_batch_alone_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    def one_by_one(net: Any, x: Tensor) -> Tensor:
        return torch.stack([torch.relu(x[i]) for i in range(x.shape[0])])

    def counted(net: Any, x: Tensor) -> Tensor:
        return x.reshape(int(x.shape[0]), 16, 16, 16)

    for body in (one_by_one, counted):
        with pytest.raises(UserError, match="number of images"):
            trace(Net(body).eval(), IMAGES)
    assert capfd.readouterr().err == ""  # no traceback of torch.fx


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradients[0]


def test_an_autograd_function_is_one_node() -> None:
    own = torch.autograd.Function.__dict__["apply"]
    network = Net(lambda net, x: Square.apply(x))
    assert "Square" in [getattr(node.target, "__name__", "") for node in trace(network, IMAGES).graph.nodes]
    assert torch.autograd.Function.__dict__["apply"] is own
    assert widths(half(network))["b"] == 8


def test_a_parameter_in_a_list_does_not_enter_the_state_dict() -> None:
    scales = [nn.Parameter(torch.full((1,), 2.0))]
    network = Net(lambda net, x: x * scales[0])
    before = list(network.state_dict())
    result = half(network)
    assert list(network.state_dict()) == list(result.model.state_dict()) == before


def test_random_numbers_go_on_as_if_nothing_was_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    network, seeded = Net(lambda net, x: x + torch.rand_like(x)), list[int]()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trace(network, IMAGES)
    assert torch.equal(torch.rand(3), expected)
    assert seeded == [5, 5]  # no device is seeded that the network is not on


# What forward returns.


@dataclass
class Answer:
    logits: Tensor
    features: Tensor


class Answers(Net):
    def __init__(self, kind: Callable[..., Any]) -> None:
        super().__init__(lambda net, x: x)
        self.kind = kind

    def forward(self, x: Tensor, *_arguments: Any, **_named: Any) -> Any:
        logits, features = super().forward(x, True)
        return self.kind(logits=logits, features=features)


@pytest.mark.parametrize("kind", [Answer, dict])
def test_all_that_forward_returns_is_compared(kind: Callable[..., Any]) -> None:
    network = Answers(kind).eval()
    assert widths(half(network))["a"] == 8
    assert compare(network, copy.deepcopy(network), (IMAGES,))[0] == 0
    other = copy.deepcopy(network)
    nn.init.zeros_(other.fc.weight)
    assert compare(network, other, (IMAGES,))[0] > 0.1


@pytest.mark.parametrize("form", [lambda z, x: (z, x), lambda z, x: {"features": x, "logits": z}])
def test_what_stands_beside_the_logits_is_told_from_them(form: Callable[..., Any]) -> None:
    class Beside(Net):
        def forward(self, x: Tensor) -> Any:
            x = functional.relu(self.b(functional.relu(self.a(x))))
            return form(self.fc(x.mean((2, 3))), x)

    plan = plan_pruning(Beside(lambda net, x: x), [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}], IMAGES)
    assert plan.left_out["b"] == "forward returns them beside the logits"
    assert plan.left_out["fc"] == "they are the network's output"


def in_a_block(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = functional.relu(net.c(x))
    return x.float()


class UnderAutocast(Net):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize(
    "network", [lambda: Net(in_a_block, c=nn.Conv2d(16, 16, 3)), lambda: UnderAutocast(lambda net, x: x * 2)]
)
def test_a_forward_with_autocast_is_followed_in_its_own_precision(network: Callable[[], nn.Module]) -> None:
    enter = torch.autocast.__enter__
    result = half(network())
    assert widths(result)["b"] == 8 and result.max_logit_difference < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.autocast.__enter__ is enter and torch.is_autocast_enabled("cpu")


def test_an_answer_without_tensors_is_refused() -> None:
    network = Answers(SimpleNamespace).eval()
    with pytest.raises(UserError, match="cannot trace Answers: no tensor is found in what forward returns"):
        trace(network, IMAGES)
    assert compare(network, network, (IMAGES,))[0] == float("inf")


# Classes that compute a layer by themselves.


class NormAct(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        x = functional.batch_norm(x, mean, variance, self.weight, self.bias, False, 0.1, self.eps)
        return functional.relu(x)


class SamePadding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x, (1, 1, 1, 1))
        return functional.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Named(nn.Conv2d):
    """Nothing but another name."""


class Scaled(nn.Module):
    """A linear layer that was written from scratch."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(outputs, inputs) - 0.5)
        self.bias = nn.Parameter(torch.rand(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias) * 2.0


def own_classes(first: Callable[[int], nn.Module], second: Callable[[int], nn.Module]) -> nn.Module:
    layers = (nn.Conv2d(3, 16, 3, bias=False), first(16), nn.ReLU(), nn.Conv2d(16, 24, 3, bias=False), second(24))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


@pytest.mark.parametrize("first", [NormAct, nn.BatchNorm2d])
@pytest.mark.parametrize("second", [NormAct, nn.BatchNorm2d])
def test_a_norm_of_a_class_of_its_own_loses_channels_as_any(first: Any, second: Any) -> None:
    network = own_classes(first, second)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias)
    result = half(network)
    assert (result.parameters_before, result.parameters_after) == (4218, 1250)
    assert isinstance(result.model[1], first) and result.model[1].num_features == 8


def test_convolutions_of_classes_of_their_own_are_pruned_by_their_name() -> None:
    config = [{"op_types": ["Conv2d", "SamePadding", "Named"], "sparse_ratio": 0.5}]
    network = nn.Sequential(
        Named(3, 16, 3), nn.ReLU(), SamePadding(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    shrunken = half(network, config).model
    assert [type(shrunken[i]) for i in (0, 2, 4)] == [Named, SamePadding, nn.Conv2d]
    assert [shrunken[i].out_channels for i in (0, 2, 4)] == [8, 8, 4]
    # Where the config names PyTorch's own alone, these lose the inputs that go.
    assert [half(network).model[i].out_channels for i in (0, 2, 4)] == [16, 16, 4]


def test_a_linear_layer_from_scratch_loses_the_inputs_that_go() -> None:
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Scaled(16, 10))
    assert half(network).model[4].weight.shape == (10, 8)


def written(width: int = 16) -> nn.Module:
    return own_classes(NormAct, NormAct)


def test_a_shrunken_class_of_its_own_is_saved_and_read(tmp_path: Path) -> None:
    result = half(own_classes(NormAct, NormAct))
    reference = f"{__name__}:written"
    save_network(result.model, reference, {}, tmp_path / "n.safetensors", tmp_path / "n.json")
    loaded = load_network(tmp_path / "n.json")
    assert torch.equal(loaded(IMAGES), result.model.eval()(IMAGES)) and loaded[1].num_features == 8
    text = (tmp_path / "n.json").read_text()
    (tmp_path / "n.json").write_text(text.replace('"num_features": 8', '"num_features": "8"'))
    with pytest.raises(UserError, match="which is no size"):
        load_network(tmp_path / "n.json")
    content = json.loads(text)
    next(each for each in content["layers"].values() if "shapes" in each)["shapes"]["2.weight"] = [1]
    (tmp_path / "n.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"'2\.weight', which is no tensor of its own"):
        load_network(tmp_path / "n.json")
    (tmp_path / "n.json").write_text(text.replace('"num_features"', '"forward"'))
    with pytest.raises(UserError, match="is not described"):
        load_network(tmp_path / "n.json")


def test_a_function_with_another_modules_statistics_holds_what_it_reads_only() -> None:
    def by_function(net: Any, x: Tensor) -> Tensor:
        n = net.n
        return functional.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias)

    assert widths(half(Net(by_function, n=nn.BatchNorm2d(16))))["b"] == 8


# Constants that forward reads.


def layer_scale(net: Any, x: Tensor) -> Tensor:
    return (x.permute(0, 2, 3, 1) * net.g).permute(0, 3, 1, 2)


def channel_norm(net: Any, x: Tensor) -> Tensor:
    return functional.layer_norm(x.permute(0, 2, 3, 1), (16,), net.g, None).permute(0, 3, 1, 2)


def coordinates(net: Any, x: Tensor) -> Tensor:
    row = torch.linspace(-1, 1, 16).view(1, 1, 16, 1).expand(x.shape[0], 1, 16, 16)
    return torch.cat([x, row], 1)


def of_zeros(net: Any, x: Tensor) -> Tensor:
    return x * torch.sigmoid(torch.zeros_like(x) + 1)


def of_new_ones(net: Any, x: Tensor) -> Tensor:
    return x + x.new_ones(x.shape) * 0.5


def masked(net: Any, x: Tensor) -> Tensor:
    return x.masked_fill(torch.arange(16) % 2 == 0, 0.5)


def weighed_by_table(net: Any, x: Tensor) -> Tensor:
    return x * net.table(torch.arange(16)).view(1, 16, 1, 1)


@pytest.mark.parametrize("body", [layer_scale, channel_norm, of_zeros, of_new_ones, masked, weighed_by_table])
@pytest.mark.parametrize("value", [1.0, 1e-6, 0.0])
def test_equal_constants_are_no_empty_channels(body: Callable[..., Tensor], value: float) -> None:
    table = nn.Embedding(16, 1)
    nn.init.constant_(table.weight, value)
    assert widths(half(Net(body, g=nn.Parameter(torch.full((16,), value)), table=table)))["b"] == 8


def test_constant_channels_are_joined() -> None:
    assert widths(half(Net(coordinates, inner=17))) == {"a": 8, "b": 8, "fc": 10}


# One channel a group.


@pytest.mark.parametrize(("inside", "groups"), [(1, 1), (4, 4), (8, 8), (16, 16)])
def test_layers_with_one_channel_a_group(inside: int, groups: int) -> None:
    narrow = nn.Conv2d(16, inside, 3, padding=1, groups=groups)
    result = half(Net(lambda net, x: torch.relu(net.q(x)), inner=inside, q=narrow))
    assert widths(result)["a"] == widths(result)["b"] == 8


def test_a_gate_of_one_channel_and_a_classifier_of_one_output() -> None:
    def gate(net: Any, x: Tensor) -> Tensor:
        return x * torch.sigmoid(net.e(functional.relu(net.s(x.mean((2, 3), keepdim=True)))))

    assert widths(half(Net(gate, s=nn.Conv2d(16, 1, 1), e=nn.Conv2d(1, 16, 1))))["a"] == 8
    network = Net(lambda net, x: x)
    network.fc = nn.Linear(16, 1)
    assert widths(half(network)) == {"a": 8, "b": 8, "fc": 1}


# Sums that are constant: attention and normalisation.


def test_a_layer_with_two_outputs() -> None:
    def attended(net: Any, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return net.attention(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)

    assert widths(half(Net(attended, attention=nn.MultiheadAttention(16, 2, batch_first=True))))["b"] == 8


@pytest.mark.parametrize(
    "attend",
    [
        lambda w: functional.softmax(w, 1),
        lambda w: w.softmax(1),
        lambda w: torch.softmax(w, dim=1),
        lambda w: w.log_softmax(1).exp(),
        lambda w: w.exp() / w.exp().sum(1, keepdim=True),
        lambda w: w - w.mean(1, keepdim=True),
    ],
)
def test_attention_over_branches(attend: Callable[[Tensor], Tensor]) -> None:
    def branches(net: Any, x: Tensor) -> Tensor:
        y, z = net.left(x), net.right(x)
        w = attend(net.w((y + z).mean((2, 3), keepdim=True)).view(-1, 2, 16, 1, 1))
        return y * w[:, 0] + z * w[:, 1]

    parts = {name: nn.Conv2d(16, 16, 3, padding=1) for name in ("left", "right")}
    result = half(Net(branches, w=nn.Conv2d(16, 32, 1), **parts))
    assert (widths(result)["a"], widths(result)["b"]) == (8, 8)


# Weights that are read, shared or computed elsewhere.


def twin(net: Any, x: Tensor) -> Tensor:
    return net.c(x) + functional.conv2d(torch.tanh(x), net.c.weight, padding=1)


def over_norm(net: Any, x: Tensor) -> Tensor:
    return net.c(x) / net.c.weight.norm()


def over_statistics(net: Any, x: Tensor) -> Tensor:
    return net.n(net.c(x)) + net.n.running_mean.view(1, -1, 1, 1)


@pytest.mark.parametrize("body", [twin, over_norm, over_statistics], ids=lambda body: body.__name__)
def test_a_layer_whose_weight_is_read_stays(body: Callable[..., Tensor]) -> None:
    network = Net(body, c=nn.Conv2d(16, 16, 3, padding=1), n=nn.BatchNorm2d(16))
    reason = plan_of(network).left_out["c"]
    assert "by itself" in reason or "whose channels stay" in reason
    result = half(network)
    assert widths(result)["c"] == 16 and widths(result)["b"] == 8


def test_layers_that_share_a_weight_stay() -> None:
    network = Net(
        lambda net, x: torch.relu(net.d(torch.relu(net.c(x)))), c=nn.Conv2d(16, 16, 3), d=nn.Conv2d(16, 16, 3)
    )
    network.d.weight = network.c.weight
    assert "is that of c too" in plan_of(network).left_out["d"]
    assert widths(half(network)) == {"a": 16, "b": 8, "c": 16, "d": 16, "fc": 10}


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    "wrap", [nn.utils.spectral_norm, parametrizations.spectral_norm, parametrizations.weight_norm, old_weight_norm]
)
def test_a_layer_whose_weight_is_computed_stays(wrap: Callable[[nn.Module], nn.Module]) -> None:
    with torch.no_grad():
        network = Net(lambda net, x: torch.relu(net.c(x)), c=wrap(nn.Conv2d(16, 16, 3, padding=1)))
    assert "c" not in {name for entry in plan_of(network).config_list for name in entry["op_names"]}
    assert widths(half(network))["b"] == 8


@pytest.mark.parametrize("method", [prune.l1_unstructured, prune.random_unstructured])
def test_masks_of_torch_are_to_be_made_permanent(method: Callable[..., Any]) -> None:
    network = Net(lambda net, x: x)
    method(network.a, "weight", 0.5)
    with pytest.raises(UserError, match=r"a is pruned by torch\.nn\.utils\.prune.*prune\.remove\("):
        plan_of(network)
    prune.remove(network.a, "weight")
    half(network)


# Rounding.


def test_the_difference_is_relative_to_the_largest_logit() -> None:
    class Told(nn.Module):
        def __init__(self, change: Tensor) -> None:
            super().__init__()
            self.change = change

        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[150.0, -148.0, 0.3]]).expand(len(x), 3) + self.change

    reference = Told(torch.zeros(3))
    for change, expected in ((torch.tensor([0.0, 0.0, 1.9e-4]), 1.9e-4 / 150), (torch.tensor([3.0, 0.0, 0.0]), 0.02)):
        assert compare(reference, Told(change), (IMAGES,))[0] == pytest.approx(expected, rel=0.1)


# Channels that move to another dimension, branches in a stack, parts of tensors, compiled functions.


@torch.jit.script
def compiled_swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@torch.jit.script
def compiled_branch(x: Tensor) -> Tensor:
    if float(x.sum()) > 1e9:
        return x
    return x * 2


def edges_halved(net: Any, x: Tensor) -> Tensor:
    inner = x[:, :, 2:]
    inner[:, :, :3] = 0
    x[..., :1].mul_(0.5)
    return x


@pytest.mark.parametrize(
    "body",
    [
        lambda net, x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        lambda net, x: x.flatten(2).transpose(1, 2).tanh().movedim(2, 1).reshape(x.shape),
        lambda net, x: x.movedim(destination=3, source=1).tanh().permute(0, 3, 1, 2),
        lambda net, x: x + functional.dropout(x[:, :, 1:], training=False).mean((2, 3), keepdim=True),
        lambda net, x: sum(x.unbind(2)).unsqueeze(3),
        lambda net, x: torch.cat([part * 2 for part in x.chunk(2, dim=2)], 2),
        lambda net, x: torch.stack([x, x.tanh()], dim=1).sum(1),
        lambda net, x: torch.stack([x, x.tanh()], 4).amax(-1),
        lambda net, x: x[..., 1:-1],
        lambda net, x: x[:, :, 1:].relu_(),
        lambda net, x: x[..., 0, :].unsqueeze(2),
        lambda net, x: compiled_swish(x),
        lambda net, x: x.data,
        lambda net, x: x * torch.softmax(x.flatten(2), 2).view(x.shape),
    ],
)
def test_channels_are_followed_where_they_move(body: Callable[..., Tensor]) -> None:
    result = half(Net(body))
    assert (widths(result)["a"], widths(result)["b"]) == (8, 8)


@pytest.mark.parametrize(
    "body",
    [
        edges_halved,
        lambda net, x: x[:, :12] if x[:, :12].mul_(0.5) is None else x,
        lambda net, x: compiled_branch(x),
        lambda net, x: torch.softmax(x, 1),
        lambda net, x: x[..., ::2, :, :].repeat(1, 2, 1, 1),
        lambda net, x: functional.layer_norm(x.permute(0, 2, 3, 1), (16,)).permute(0, 3, 1, 2),
        lambda net, x: functional.avg_pool2d(x.permute(0, 2, 3, 1), 3, 1, 1).permute(0, 3, 1, 2),
    ],
)
def test_what_cannot_be_followed_stays_and_is_computed_right(body: Callable[..., Tensor]) -> None:
    result = half(Net(body))
    assert (widths(result)["a"], widths(result)["b"]) == (16, 8)


@pytest.mark.parametrize(
    "body",
    [lambda net, x: torch.cat([x.sigmoid(), x], 2), lambda net, x: torch.stack([x.sigmoid(), x], 2).flatten(2, 3)],
    ids=["cat", "stack"],
)
def test_different_constants_of_one_channel_keep_it(body: Callable[..., Tensor]) -> None:
    """The bias of the next convolution could take one constant, but not two."""
    result = half(Net(body, b=nn.Conv2d(16, 16, 3)))
    assert (widths(result)["a"], widths(result)["b"]) == (16, 8)


class Selective(nn.Module):
    """Two branches, weighted channel by channel; one convolution makes the weights of both."""

    def __init__(self, cut: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.paths = nn.ModuleList(nn.Conv2d(16, 16, size, padding=size // 2) for size in (1, 3))
        self.narrow, self.select, self.cut = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 32, 1), cut

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([functional.relu(path(x)) for path in self.paths], dim=1)
        weights = self.select(functional.relu(self.narrow(x.sum(1).mean((2, 3), keepdim=True))))
        return (x * torch.softmax(self.cut(weights, len(self.paths)), dim=1)).sum(dim=1)


@pytest.mark.parametrize(
    "cut",
    [
        lambda w, count: w.view(w.size(0), count, w.shape[1] // count, 1, 1),
        lambda w, count: w.reshape((w.shape[0], count, -1, 1, 1)),
    ],
)
def test_weights_of_branches_go_with_their_channels(cut: Callable[[Tensor, int], Tensor]) -> None:
    network = Net(lambda net, x: net.selective(x), selective=Selective(cut))
    sizes = widths(half(network))
    assert (sizes["selective.paths.0"], sizes["selective.paths.1"], sizes["selective.select"]) == (8, 8, 16)
    assert "go with them" in plan_of(network).left_out["selective.select"]


def test_flattened_by_the_size_of_one_image() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 16, 3, stride=4), nn.Linear(256, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.fc(x.view(x.size(0), x[0].numel()))

    assert widths(half(Flat())) == {"conv": 8, "fc": 5}


class NormsOverChannels(nn.Module):
    """A block of ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm, self.wide, self.narrow = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.narrow(functional.gelu(self.wide(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))))
        return self.fc((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


def test_channels_that_are_normalised_together_stay_and_the_advice_can_be_followed() -> None:
    with pytest.raises(
        UserError, match=r"norm, whose mean and variance are over all.*; name other layers, such as wide"
    ):
        plan_of(NormsOverChannels())
    linear = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["fc"], "sparse_ratio": 0.5}]
    sizes = widths(half(NormsOverChannels(), linear))
    assert (sizes["stem"], sizes["wide"], sizes["narrow"]) == (16, 32, 16)


def attention_to_one_token(net: Any, x: Tensor) -> Tensor:
    query, key, value = net.qkv(x.mean((2, 3))[:, None]).chunk(3, -1)
    weights = torch.softmax(query @ key.transpose(1, 2), -1)
    return (weights @ value).transpose(1, 2).unsqueeze(3).expand(-1, -1, 4, 4)


def softmax_of_one_channel(net: Any, x: Tensor) -> Tensor:
    weights, value = net.qkv(x.mean((2, 3))).split([1, 47], 1)
    return (functional.softmax(weights, 1) * value)[:, :16, None, None].expand(-1, -1, 4, 4)


@pytest.mark.parametrize("body", [attention_to_one_token, softmax_of_one_channel])
def test_what_is_constant_by_itself_is_no_removed_channel(body: Callable[[Any, Tensor], Tensor]) -> None:
    result = half(Net(body, qkv=nn.Linear(16, 48)))
    assert widths(result)["a"] == widths(result)["b"] == 8 and widths(result)["qkv"] == 48
