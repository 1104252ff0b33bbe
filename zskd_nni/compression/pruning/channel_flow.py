"""Which channels of a network belong together, read from its graph.

Each output channel of a convolution or linear layer gets a label. The labels flow through the graph as the channels
do: an addition ties the labels of its operands, a concatenation lines them up, flattening repeats them. Where a
removed channel could not be removed from what follows (a fixed ``view``, a channel shuffle, a normalisation over
channels, the logits), its label is frozen, with the reason.

"Removed" means: the masked network computes zero there. Behind a normalisation that no single layer's mask can
silence, or behind an activation with ``f(0) != 0``, a removed channel still holds a constant. A constant can be folded
into the bias of a layer without padding; where a padded layer would see it, the label is frozen as well.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn
from torch.fx import GraphModule, Node

from zskd_nni.compression.fx_trace import node_shape, unread_nodes

Labels = np.ndarray

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

# f(0) = 0, element by element
_ZERO_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.RReLU,
    nn.Tanh, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Softsign, nn.PReLU,
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
_ZERO_FUNCTIONS = {
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "celu", "gelu", "silu", "mish",
    "hardswish", "tanh", "tanh_", "softsign", "tanhshrink", "dropout", "dropout_", "dropout2d", "stochastic_depth",
    "clone", "detach", "contiguous", "abs", "neg", "square", "float", "to", "type_as",
}  # fmt: skip
# element by element, but f(0) may be another constant
_CONSTANT_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid, nn.Hardtanh)
_CONSTANT_FUNCTIONS = {
    "sigmoid", "sigmoid_", "hardsigmoid", "softplus", "logsigmoid", "exp", "hardtanh", "hardtanh_", "clamp", "clamp_",
}  # fmt: skip
_POOL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Upsample,
)  # fmt: skip
_POOL_FUNCTIONS = {
    "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "interpolate",
}  # fmt: skip
_ADDITIONS = {"add", "add_", "iadd", "sub", "sub_", "isub", "subtract"}
_PRODUCTS = {"mul", "mul_", "imul", "multiply"}
_QUOTIENTS = {"div", "div_", "truediv", "itruediv", "divide"}
_REDUCTIONS = {"mean", "sum", "amax", "amin"}
_SQUEEZES = {"squeeze", "unsqueeze"}
_CONCATENATIONS = {"cat", "concat", "concatenate"}
_QUESTIONS = {"size", "dim", "numel", "ndimension", "getattr", "len", "is_floating_point"}


@dataclass(frozen=True)
class Flow:
    """The channels of one tensor.

    Attributes:
        dim: the dimension that holds the channels.
        labels: one label a channel, ``(channels,)``.
        constant: a removed channel may hold a constant here; zero otherwise.
        raw: no normalisation has scaled the channels yet since they were computed.
    """

    dim: int
    labels: Labels
    constant: bool = False
    raw: bool = False


@dataclass
class ChannelFlow:
    """What the graph says about the channels; all labels are representatives of their tied sets.

    Attributes:
        sources: labels of the outputs of each convolution or linear layer (depthwise ones excepted).
        followers: labels of each normalisation and each depthwise convolution, which have no channels of their own.
        composite: the followers whose channels are not those of a single source, so that no single mask fits them.
        gates: the sources whose outputs only multiply other channels (squeeze and excitation).
        blocks: by module path of a source: its channels are pruned in this many equal blocks.
        frozen: label -> why the channels with this label stay.
        read_raw: the labels that some layer reads before a normalisation could silence them.
        unfollowed: module path -> why a layer is neither a source nor a follower although it is called.
    """

    sources: dict[str, Labels] = field(default_factory=dict)
    followers: dict[str, Labels] = field(default_factory=dict)
    composite: set[str] = field(default_factory=set)
    gates: set[str] = field(default_factory=set)
    blocks: dict[str, int] = field(default_factory=dict)
    frozen: dict[int, str] = field(default_factory=dict)
    read_raw: set[int] = field(default_factory=set)
    unfollowed: dict[str, str] = field(default_factory=dict)

    def reason(self, name: str) -> str | None:
        """Why a module's channels stay, None where they may go."""
        labels = self.sources[name] if name in self.sources else self.followers[name]
        return next((self.frozen[label] for label in labels.tolist() if label in self.frozen), None)

    def tied(self, name: str) -> list[str]:
        """The sources and followers that lose the same channels as ``name``, in graph order."""
        key = {**self.sources, **self.followers}[name].tobytes()
        return [other for other, labels in {**self.sources, **self.followers}.items() if labels.tobytes() == key]


def channel_flow(graph_module: GraphModule) -> ChannelFlow:
    """Follow every channel through a traced network.

    Args:
        graph_module: a graph with shapes, from ``graph.trace``.
    """
    composite: set[str] = set()
    while True:
        # Whether a follower has a single source shows only when all ties are known, and what a removed channel
        # holds behind it depends on that: a second round settles it.
        analysis = _Analysis(graph_module, composite)
        flow = analysis.run()
        if flow.composite <= composite:
            return flow
        composite = composite | flow.composite


def is_depthwise(module: nn.Module) -> bool:
    """Whether each channel of a convolution is filtered for itself, so that it has as many outputs as inputs."""
    return isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.in_channels == module.out_channels


class _Analysis:
    def __init__(self, graph_module: GraphModule, composite: set[str]) -> None:
        self.graph_module = graph_module
        self.composite = composite
        self.parents: list[int] = []
        self.frozen: dict[int, str] = {}
        self.flows: dict[Node, Flow] = {}
        self.sources: dict[str, Labels] = {}
        self.followers: dict[str, Labels] = {}
        self.gate_labels: set[int] = set()
        self.read_raw: set[int] = set()
        self.unfollowed: dict[str, str] = {}
        self.grouped: list[tuple[str, Labels, int]] = []
        self.unread = set(unread_nodes(graph_module))
        self.calls = Counter(node.target for node in graph_module.graph.nodes if node.op == "call_module")

    # ---- labels

    def fresh(self, count: int) -> Labels:
        start = len(self.parents)
        self.parents.extend(range(start, start + count))
        return np.arange(start, start + count)

    def find(self, label: int) -> int:
        while self.parents[label] != label:
            self.parents[label] = self.parents[self.parents[label]]
            label = self.parents[label]
        return label

    def roots(self, labels: Labels) -> Labels:
        return np.array([self.find(label) for label in labels.tolist()], dtype=np.int64)

    def tie(self, first: Labels, second: Labels) -> None:
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            root, other = self.find(a), self.find(b)
            if root != other:
                self.parents[other] = root

    def freeze(self, labels: Labels, reason: str) -> None:
        for label in labels.tolist():
            self.frozen.setdefault(label, reason)

    def freeze_flow(self, flow: Flow | None, reason: str) -> None:
        if flow is not None:
            self.freeze(flow.labels, reason)

    # ---- the graph, node by node

    def run(self) -> ChannelFlow:
        for node in self.graph_module.graph.nodes:
            if node.op == "output":
                for read in node.all_input_nodes:
                    self.freeze_flow(self.flows.get(read), "they are the network's output")
                continue
            if node.op == "placeholder":
                flow = None
            elif node.op == "call_module":
                flow = self.module(node, self.graph_module.get_submodule(node.target))
            elif node.op in ("call_function", "call_method"):
                flow = self.operation(node)
            else:
                flow = None
            if flow is not None:
                self.flows[node] = flow
        return self.settle()

    def inputs(self, node: Node) -> list[Flow]:
        return [self.flows[read] for read in node.all_input_nodes if read in self.flows]

    def give_up(self, node: Node, what: str) -> None:
        """Freeze everything that the node reads; its own channels are nobody's."""
        for flow in self.inputs(node):
            self.freeze_flow(flow, what)

    def note_raw(self, flow: Flow | None) -> None:
        if flow is not None and flow.raw:
            self.read_raw.update(flow.labels.tolist())

    def kept(self, node: Node, flow: Flow, constant: bool | None = None, tensor: Node | None = None) -> Flow | None:
        """The same channels in the node's output, provided that its shape has them where they were in ``tensor``.

        That is what the node reads first where it is not given.
        """
        before, after = node_shape(_first(node) if tensor is None else tensor), node_shape(node)
        if before is None or after is None or before[: flow.dim + 1] != after[: flow.dim + 1]:
            self.freeze_flow(flow, f"they pass `{_label(node)}`, which moves the channel dimension")
            return None
        return flow if constant is None else replace(flow, constant=constant)

    def module(self, node: Node, module: Any) -> Flow | None:
        name = str(node.target)
        inputs = self.inputs(node)
        parametric = next(module.parameters(), None) is not None
        if self.calls[name] > 1 and parametric:
            self.unfollowed[name] = f"forward calls it {self.calls[name]} times"
            self.give_up(node, f"they enter {name}, which forward calls {self.calls[name]} times")
            return None
        if node in self.unread and parametric:
            self.unfollowed[name] = "nothing reads its output"
            self.give_up(node, f"they enter {name}, whose output nothing reads")
            return None
        flow = inputs[0] if inputs else None
        if len(node.all_input_nodes) != 1 or len(inputs) > 1:
            self.give_up(node, f"they enter {name} ({type(module).__name__}) beside other tensors")
            return None
        # NNI chooses its replacement by the class name: a subclass would be replaced by its parent.
        exact = type(module)
        if exact in CONVOLUTIONS:
            return self.convolution(node, module, flow)
        if exact is nn.Linear:
            return self.linear(node, module, flow)
        if flow is None:
            return None
        if exact in NORMS:
            return self.norm(node, module, flow)
        if isinstance(module, _ZERO_MODULES):
            return self.kept(node, flow)
        if isinstance(module, _CONSTANT_MODULES):
            zero = isinstance(module, nn.Hardtanh) and module.min_val <= 0 <= module.max_val
            return self.kept(node, flow, flow.constant or not zero)
        if isinstance(module, _POOL_MODULES):
            padded = isinstance(module, nn.AvgPool1d | nn.AvgPool2d) and _is_padded(module.padding)
            return self.pool(node, flow, padded or getattr(module, "return_indices", False))
        if exact is nn.LocalResponseNorm and flow.dim == 1 and not flow.constant:
            self.note_raw(flow)
            return self.kept(node, flow)
        if exact is nn.Flatten:
            return self.flatten(node, flow, module.start_dim, module.end_dim)
        self.give_up(node, f"they enter {name}, and a {exact.__name__} cannot lose channels")
        return None

    def convolution(self, node: Node, module: Any, flow: Flow | None) -> Flow | None:
        name = str(node.target)
        if flow is not None and flow.dim != 1:
            self.freeze_flow(flow, f"they enter {name} as something else than channels")
            flow = None
        depthwise = is_depthwise(module)
        if flow is not None and flow.constant and _is_padded(module.padding):
            silenced = depthwise and name not in self.composite
            if not silenced:
                self.freeze_flow(flow, f"what a removed channel leaves behind would reach the padding of {name}")
        if depthwise:
            if flow is None:
                return None
            self.followers[name] = flow.labels
            constant = name in self.composite and (flow.constant or module.bias is not None)
            return Flow(1, flow.labels, constant, flow.raw or module.bias is not None)
        self.note_raw(flow)
        if module.groups > 1:
            labels = self.fresh(module.out_channels)
            if flow is not None:
                self.grouped.append((name, flow.labels, module.groups))
            self.grouped.append((name, labels, module.groups))
        else:
            labels = self.fresh(module.out_channels)
        self.sources[name] = labels
        return Flow(1, labels, raw=True)

    def linear(self, node: Node, module: nn.Linear, flow: Flow | None) -> Flow | None:
        shape = node_shape(node)
        if flow is not None and shape is not None and flow.dim != len(shape) - 1:
            self.freeze_flow(flow, f"they enter {node.target} as something else than features")
        self.note_raw(flow)
        labels = self.fresh(module.out_features)
        self.sources[str(node.target)] = labels
        return Flow(len(shape) - 1, labels, raw=True) if shape is not None else None

    def norm(self, node: Node, module: Any, flow: Flow) -> Flow | None:
        name = str(node.target)
        if flow.dim != 1:
            self.freeze_flow(flow, f"they enter {name} as something else than channels")
            return None
        if module.running_mean is None:
            self.freeze_flow(flow, f"they enter {name}, which keeps no running statistics")
            return None
        self.followers[name] = flow.labels
        silent = module.affine and name not in self.composite
        if not silent:
            self.note_raw(flow)
        return Flow(1, flow.labels, constant=not silent)

    def pool(self, node: Node, flow: Flow, uneven: bool) -> Flow | None:
        if uneven and flow.constant:
            self.freeze_flow(flow, f"what a removed channel leaves behind would reach the padding of {_label(node)}")
        return self.kept(node, flow)

    def flatten(self, node: Node, flow: Flow, start: int, end: int) -> Flow | None:
        shape = node_shape(_first(node))
        if shape is None:
            self.give_up(node, f"they pass `{_label(node)}`")
            return None
        start, end = start % len(shape), end % len(shape)
        if start > flow.dim:
            return self.kept(node, flow)
        if start < flow.dim or end < flow.dim:
            self.freeze_flow(flow, f"they pass `{_label(node)}`, which mixes them with another dimension")
            return None
        repeats = math.prod(shape[start + 1 : end + 1])
        return replace(flow, dim=start, labels=np.repeat(flow.labels, repeats))

    def operation(self, node: Node) -> Flow | None:
        name = _name(node)
        inputs = self.inputs(node)
        if not inputs or name in _QUESTIONS:
            return None
        flow = inputs[0]
        if name in _CONCATENATIONS:
            return self.concatenation(node)
        if name in _ADDITIONS | _PRODUCTS | _QUOTIENTS:
            return self.arithmetic(node, name)
        if len(inputs) > 1 or _first(node) not in self.flows:
            self.give_up(node, f"they enter `{_label(node)}` beside other tensors")
            return None
        if name in _ZERO_FUNCTIONS:
            return self.kept(node, flow)
        if name in _CONSTANT_FUNCTIONS:
            return self.kept(node, flow, True)
        if name in _POOL_FUNCTIONS:
            # An average over a padded border is not constant; reading the padding from the arguments is not worth it.
            return self.pool(node, flow, name.startswith("avg_pool"))
        if name in _REDUCTIONS:
            return self.reduction(node, flow)
        if name in _SQUEEZES:
            return self.kept(node, flow)
        if name == "flatten":
            start = _argument(node, 1, "start_dim", 0)
            return self.flatten(node, flow, start, _argument(node, 2, "end_dim", -1))
        if name in ("view", "reshape"):
            return self.view(node, flow)
        if name == "getitem":
            return self.getitem(node, flow)
        self.give_up(node, f"they pass `{_label(node)}`")
        return None

    def concatenation(self, node: Node) -> Flow | None:
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = _argument(node, 1, "dim", 0)
        shape = node_shape(node)
        if not isinstance(parts, tuple | list) or shape is None or not isinstance(dim, int):
            self.give_up(node, f"they pass `{_label(node)}`")
            return None
        dim %= len(shape)
        labels = []
        for part in parts:
            flow, part_shape = self.flows.get(part), node_shape(part)
            if flow is None and part_shape is not None:
                fresh = self.fresh(part_shape[dim])
                self.freeze(fresh, f"they are joined with channels that stay by `{_label(node)}`")
                labels.append(fresh)
            elif flow is not None and flow.dim == dim:
                labels.append(flow.labels)
            else:
                self.give_up(node, f"they pass `{_label(node)}` along another dimension")
                return None
        inputs = self.inputs(node)
        constant, raw = any(flow.constant for flow in inputs), any(flow.raw for flow in inputs)
        return Flow(dim, np.concatenate(labels), constant, raw)

    def arithmetic(self, node: Node, name: str) -> Flow | None:
        if any(isinstance(argument, Node) for argument in node.kwargs.values()):
            self.give_up(node, f"they enter `{_label(node)}` by keyword")
            return None
        tensors = [argument for argument in node.args if isinstance(argument, Node) and self.is_wide(argument)]
        flows = [self.flows[argument] for argument in tensors if argument in self.flows]
        if len(tensors) == len(flows) == 1:
            number = next((argument for argument in node.args if argument is not tensors[0]), None)
            scaled = name in _PRODUCTS or (name in _QUOTIENTS and node.args[0] is tensors[0])
            if name in _QUOTIENTS and not scaled:
                self.give_up(node, f"they are a divisor in `{_label(node)}`")
                return None
            return self.kept(node, flows[0], flows[0].constant or not (scaled or number == 0), tensors[0])
        if len(tensors) != 2 or len(flows) != 2 or name in _QUOTIENTS:
            self.give_up(node, f"they enter `{_label(node)}` with a tensor whose channels stay")
            return None
        first, second = flows
        if len(node_shape(tensors[0]) or ()) != len(node_shape(tensors[1]) or ()) or first.dim != second.dim:
            self.give_up(node, f"they enter `{_label(node)}` with a tensor of another layout")
            return None
        if len(first.labels) != len(second.labels):
            wide, narrow = (first, second) if len(second.labels) == 1 else (second, first)
            if len(narrow.labels) != 1:
                self.give_up(node, f"they enter `{_label(node)}` with a tensor of another layout")
                return None
            self.freeze_flow(narrow, f"it is spread over other channels by `{_label(node)}`")
            if name in _ADDITIONS:
                self.freeze_flow(wide, f"something else is added to all of them by `{_label(node)}`")
            return wide
        self.tie(first.labels, second.labels)
        if name in _ADDITIONS:
            constant, raw = first.constant or second.constant, first.raw or second.raw
            return Flow(first.dim, first.labels, constant, raw)
        if first.constant != second.constant:
            self.gate_labels.update((first if first.constant else second).labels.tolist())
        value = second if first.constant else first
        return Flow(first.dim, value.labels, first.constant and second.constant, first.raw and second.raw)

    def is_wide(self, node: Node) -> bool:
        """Whether a node holds a tensor of more than one number, or one with channels."""
        shape = node_shape(node)
        return shape is not None and (node in self.flows or math.prod(shape) != 1)

    def reduction(self, node: Node, flow: Flow) -> Flow | None:
        shape = node_shape(_first(node))
        dims = _argument(node, 1, "dim", None)
        dims = (dims,) if isinstance(dims, int) else dims
        if shape is None or not isinstance(dims, tuple | list) or not all(isinstance(dim, int) for dim in dims):
            self.give_up(node, f"they are averaged away by `{_label(node)}`")
            return None
        if any(dim % len(shape) <= flow.dim for dim in dims):
            self.freeze_flow(flow, f"they are averaged away by `{_label(node)}`")
            return None
        return self.kept(node, flow)

    def view(self, node: Node, flow: Flow) -> Flow | None:
        sizes: Any = node.args[1:]
        if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
            sizes = sizes[0]
        before, after = node_shape(_first(node)), node_shape(node)
        if flow.dim == 1 and before is not None and after is not None and len(sizes) == len(after) >= 2:
            if len(sizes) == 2 and sizes[1] == -1 and after[0] == before[0]:
                return replace(flow, labels=np.repeat(flow.labels, math.prod(before[2:])))
            if isinstance(sizes[1], Node) and after[:2] == before[:2]:
                return flow
        self.freeze_flow(flow, f"they pass `{_label(node)}`, which regroups them or names their number")
        return None

    def getitem(self, node: Node, flow: Flow) -> Flow | None:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        whole = slice(None)
        picked = all(entry is None or isinstance(entry, slice) for entry in index)
        if picked and all(entry == whole for entry in index[: flow.dim + 1]):
            return self.kept(node, flow)
        self.freeze_flow(flow, f"they pass `{_label(node)}`, which picks some of them")
        return None

    # ---- the sum of it

    def settle(self) -> ChannelFlow:
        flow = ChannelFlow(
            {name: self.roots(labels) for name, labels in self.sources.items()},
            {name: self.roots(labels) for name, labels in self.followers.items()},
        )
        frozen: dict[int, str] = {}
        for label, reason in self.frozen.items():
            frozen.setdefault(self.find(label), reason)
        flow.gates = {name for name, labels in self.sources.items() if set(labels.tolist()) & self.gate_labels}
        flow.frozen = frozen
        flow.unfollowed = self.unfollowed
        flow.read_raw = {self.find(label) for label in self.read_raw}
        whole = {labels.tobytes(): name for name, labels in flow.sources.items()}
        flow.composite = {name for name, labels in flow.followers.items() if labels.tobytes() not in whole}

        blocks: dict[bytes, int] = {}
        for name, raw, groups in self.grouped:
            labels = self.roots(raw)
            if labels.tobytes() not in whole:
                _freeze(flow, labels, f"{name} has {groups} groups and reads the channels of several layers")
            elif len(labels) % groups:
                _freeze(flow, labels, f"the {groups} groups of {name} do not divide them evenly")
            else:
                blocks[labels.tobytes()] = math.lcm(blocks.get(labels.tobytes(), 1), groups)
        flow.blocks = {
            name: blocks[labels.tobytes()] for name, labels in flow.sources.items() if labels.tobytes() in blocks
        }
        self.freeze_partial_ties(flow)
        return flow

    def freeze_partial_ties(self, flow: ChannelFlow) -> None:
        """NNI's masks tie whole layers: layers that share only some channels, or twist them, stay."""
        owners: dict[int, str] = {}
        for name, labels in flow.sources.items():
            if len(set(labels.tolist())) < len(labels):
                _freeze(flow, labels, f"two channels of {name} depend on each other")
            for label in labels.tolist():
                owner = owners.setdefault(label, name)
                if flow.sources[owner].tobytes() != labels.tobytes():
                    _freeze(flow, labels, f"{owner} and {name} share some of their channels only")
                    _freeze(flow, flow.sources[owner], f"{owner} and {name} share some of their channels only")
        changed = True
        while changed:
            changed = False
            for labels in flow.sources.values():
                inside = [label in flow.frozen for label in labels.tolist()]
                if any(inside) and not all(inside):
                    reason = next(flow.frozen[label] for label in labels.tolist() if label in flow.frozen)
                    _freeze(flow, labels, reason)
                    changed = True


def _freeze(flow: ChannelFlow, labels: Labels, reason: str) -> None:
    for label in labels.tolist():
        flow.frozen.setdefault(label, reason)


def _first(node: Node) -> Node:
    return node.all_input_nodes[0]


def _argument(node: Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _name(node: Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    if node.target is operator.getitem:
        return "getitem"
    return getattr(node.target, "__name__", str(node.target))


def _label(node: Node) -> str:
    return str(node.target) if node.op == "call_module" else _name(node)


def _is_padded(padding: Any) -> bool:
    if isinstance(padding, str):
        return padding != "valid"
    if isinstance(padding, int):
        return padding != 0
    return any(side != 0 for side in padding)
