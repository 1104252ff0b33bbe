"""Which channels of a network belong together, read from its graph.

Each output channel of a convolution or linear layer gets a label, and the labels follow the channels through the graph:
an addition ties the labels of its operands, a concatenation lines them up, flattening repeats them. A label is frozen,
with the reason, if its channel could not be removed from the layers that follow (a fixed ``view``, a channel shuffle, a
normalisation over channels, the logits).

A channel counts as removed if the masked network computes zero there. Behind a normalisation that no single layer's
mask can silence, or behind an activation with ``f(0) != 0``, a removed channel still holds a constant. A layer without
padding can take the constant into its bias. If a padded layer would see it, the label is frozen as well.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn
from torch.fx import GraphModule, Node

from zskd_nni.compression.fx_trace import fixed_dims, node_shape, own_layers, unread_nodes
from zskd_nni.compression.pruning.moved_dims import PERMUTATIONS, dropped, indexed, permuted
from zskd_nni.compression.pruning.tried_functions import channels_apart, mark_apart

Labels = np.ndarray
_Shape = tuple[int, ...]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

# f(0) = 0, element by element, or only another shape
_ZERO_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.RReLU,
    nn.Tanh, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Softsign, nn.PReLU,
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_ZERO_FUNCTIONS = {
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "celu", "gelu", "silu", "mish",
    "hardswish", "tanh", "tanh_", "softsign", "tanhshrink", "hardshrink", "softshrink", "rrelu", "rrelu_", "dropout",
    "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "stochastic_depth",
    "clone", "contiguous", "abs", "neg", "square", "sqrt", "sin", "erf", "atan", "log1p", "expm1", "float", "to",
    "type_as", "squeeze", "unsqueeze",
}  # fmt: skip
# element by element, but f(0) may be another constant
_CONSTANT_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid, nn.Hardtanh)
_CONSTANT_FUNCTIONS = {
    "sigmoid", "sigmoid_", "hardsigmoid", "softplus", "logsigmoid", "log_sigmoid", "exp", "cos",
}  # fmt: skip
# element by element, and f(0) depends on the numbers that are given
_NUMBERED_FUNCTIONS = {
    "hardtanh", "hardtanh_", "clamp", "clamp_", "clip", "clamp_min", "clamp_max", "threshold", "_threshold", "pow",
}  # fmt: skip
_POOL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.LPPool1d, nn.LPPool2d, nn.Upsample,
)  # fmt: skip
_PAD_MODULES = (
    nn.ConstantPad1d, nn.ConstantPad2d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d,
    nn.ReplicationPad2d, nn.CircularPad1d, nn.CircularPad2d,
)  # fmt: skip
_POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
_POOL_FUNCTIONS = {"interpolate", *(f"{name}{dims}d" for name in _POOLS for dims in (1, 2))}
_SIZED = {"view", "reshape", "expand", "broadcast_to", "repeat"}
_ADDITIONS = {"add", "add_", "iadd", "sub", "sub_", "isub", "subtract", "maximum", "minimum"}
_PRODUCTS = {"mul", "mul_", "imul", "multiply"}
_QUOTIENTS = {"div", "div_", "truediv", "itruediv", "divide"}
_REDUCTIONS = {"mean", "sum", "amax", "amin"}
_CONCATENATIONS = {"cat", "concat", "concatenate"}
_ALONG = {
    "flip": 1,
    "roll": 2,
    "narrow": 1,
    "index_select": 1,
    "cumsum": 1,
}  # where the dimension is among the arguments
_PARTS = {"chunk", "split", "unbind", "tensor_split"}
_QUESTIONS = {"size", "dim", "numel", "ndimension", "getattr", "len", "is_floating_point"}


@dataclass(frozen=True)
class Flow:
    """The channels of one tensor.

    Attributes:
        dim: the dimension that holds the channels.
        labels: one label per channel, ``(channels,)``.
        constant: a removed channel may hold a constant here; zero otherwise.
        raw: no normalisation has scaled the channels yet since they were computed.
    """

    dim: int
    labels: Labels
    constant: bool = False
    raw: bool = False


@dataclass
class ChannelFlow:
    """The channels as followed through the graph; tied labels are replaced by one of them.

    Attributes:
        sources: labels of the outputs of each convolution or linear layer, except depthwise ones.
        followers: labels of each normalisation and depthwise convolution, which have no channels of their own.
        composite: the followers whose channels are not those of a single source, so that no single mask fits them.
        gates: the sources whose outputs only multiply other channels (squeeze and excitation).
        blocks: source -> number of equal blocks in which its channels are pruned.
        frozen: label -> why the channels with this label stay.
        read_raw: the labels that some layer reads before a normalisation could silence them.
        unfollowed: module path -> why a layer that is called is neither a source nor a follower.
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
        """Why a module's channels stay; None if they may be removed."""
        labels = self.sources[name] if name in self.sources else self.followers[name]
        return next((self.frozen[label] for label in labels.tolist() if label in self.frozen), None)

    def tied(self, name: str) -> list[str]:
        """The sources and followers that lose the same channels as ``name``, in graph order."""
        labels = {**self.sources, **self.followers}
        return [other for other in labels if np.array_equal(labels[other], labels[name])]

    def freeze(self, labels: Labels, reason: str) -> None:
        """Keep the channels with these labels; the first reason counts."""
        for label in labels.tolist():
            self.frozen.setdefault(label, reason)


def channel_flow(graph_module: GraphModule) -> ChannelFlow:
    """Follow every channel through a traced network.

    Args:
        graph_module: a graph with shapes, from ``fx_trace.trace``.
    """
    composite: set[str] = set()
    while True:
        # Only when all ties are known does it show whether a follower has a single source. What a removed channel
        # holds behind it depends on that, so another round is needed.
        flow = _Analysis(graph_module, composite).run()
        if flow.composite <= composite:
            return flow
        composite = composite | flow.composite


def is_depthwise(module: nn.Module) -> bool:
    """Whether a convolution filters each channel by itself, with as many outputs as inputs."""
    return isinstance(module, CONVOLUTIONS) and 1 < module.groups == module.in_channels == module.out_channels


class _Analysis:
    """One round through the graph. Methods for nodes return the channels of the node's output, None if none go on."""

    def __init__(self, graph_module: GraphModule, composite: set[str]) -> None:
        self.graph_module = graph_module
        self.composite = composite
        self.parents: list[int] = []  # of each label, in the forest of tied labels
        self.flows: dict[Node, Flow] = {}
        self.raw = ChannelFlow()  # with labels that are not yet replaced by those they are tied to
        self.gate_labels: set[int] = set()
        self.read_labels: set[int] = set()  # by anything but a product
        self.grouped: list[tuple[str, Labels, int]] = []
        self.entering: dict[str, Labels] = {}  # of each layer that is called
        self.own_layers = own_layers(graph_module)
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
            self.parents[self.find(b)] = self.find(a)

    def stop(self, node: Node, reason: str) -> Flow | None:
        """Freeze all channels that the node reads; its own output has none."""
        for flow in self.inputs(node):
            self.raw.freeze(flow.labels, reason)
            self.read_labels.update(flow.labels.tolist())
        return None

    # ---- the graph, node by node

    def run(self) -> ChannelFlow:
        for node in self.graph_module.graph.nodes:
            flow = None
            if node.op == "output":
                self.output(node)
            elif node.op == "call_module":
                flow = self.module(node, self.graph_module.get_submodule(node.target))
            elif node.op in ("call_function", "call_method"):
                flow = self.operation(node)
            if flow is not None:
                self.flows[node] = flow
                if flow.dim in fixed_dims(node):
                    self.raw.freeze(flow.labels, "forward uses their number in Python")
        self.keep_channels_whose_number_is_computed_with()
        self.keep_layers_whose_weights_are_read_elsewhere()
        return self.settle()

    def output(self, node: Node) -> None:
        """What forward returns keeps its channels: the logits, and what stands beside them."""
        logits = _logits(node.args[0])
        for returned in node.all_input_nodes:
            if returned in self.flows:
                beside = logits is not None and returned is not logits
                why = "forward returns them beside the logits" if beside else "they are the network's output"
                self.raw.freeze(self.flows[returned].labels, why)
                self.read_labels.update(self.flows[returned].labels.tolist())

    def keep_channels_whose_number_is_computed_with(self) -> None:
        """A tensor that is divided by the number of its channels, for one, would change with that number."""
        for node in self.graph_module.graph.nodes:
            if node.op != "call_method" or node.target not in ("size", "numel"):
                continue
            flow = self.flows.get(_first(node))
            counted = flow is not None and (node.target == "numel" or node.args[1:] == (flow.dim,))
            if flow is not None and counted and (reader := self.reader_of_number(node)) is not None:
                self.raw.freeze(flow.labels, f"`{_label(reader)}` computes with their number")

    def reader_of_number(self, number: Node) -> Node | None:
        """The first node that computes a tensor from a number, except to give a tensor its sizes; None if none does."""
        for reader in number.users:
            if node_shape(reader) is None:
                found = self.reader_of_number(reader)
            else:
                found = None if _name(reader) in _SIZED else reader
            if found is not None and found.op != "output":
                return found
        return None

    def keep_layers_whose_weights_are_read_elsewhere(self) -> None:
        """A weight that forward reads beside its layer's call, or that two layers share, keeps its shape."""
        graph = self.graph_module
        readers: dict[tuple[str, str], str] = {}
        for node in graph.graph.nodes:
            if node.op == "get_attr" and node not in self.unread:
                owner, _, parameter = str(node.target).rpartition(".")
                readers.setdefault((owner, parameter), f"forward also reads its {parameter} by itself")
                if owner not in self.entering:
                    self.raw.unfollowed.setdefault(owner, f"forward computes with its {parameter} in a way of its own")
        owners: dict[int, tuple[str, str]] = {}
        for name in self.entering:
            for parameter, value in graph.get_submodule(name).named_parameters(recurse=False):
                other = owners.setdefault(id(value), (name, parameter))
                if other[0] != name:
                    readers.setdefault((name, parameter), f"its {parameter} is that of {other[0]} too")
                    readers.setdefault(other, f"its {parameter} is that of {name} too")
        for (name, parameter), reason in readers.items():
            touched = [self.raw.sources.get(name), self.raw.followers.get(name)]
            if parameter == "weight":  # the only one whose shape depends on the channels that enter
                touched.append(self.entering.get(name))
            for labels in touched:
                if labels is not None:
                    self.raw.freeze(labels, reason)

    def inputs(self, node: Node) -> list[Flow]:
        return [self.flows[read] for read in node.all_input_nodes if read in self.flows]

    def note_raw(self, flow: Flow | None) -> None:
        if flow is not None:
            self.read_labels.update(flow.labels.tolist())
            if flow.raw:
                self.raw.read_raw.update(flow.labels.tolist())

    def kept(self, node: Node, flow: Flow, constant: bool | None = None, tensor: Node | None = None) -> Flow | None:
        """The same channels in the node's output, if they are in the same dimension there as in ``tensor``.

        By default ``tensor`` is the first that the node reads.
        """
        before, after = node_shape(_first(node) if tensor is None else tensor), node_shape(node)
        if before is None or after is None or before[: flow.dim + 1] != after[: flow.dim + 1]:
            return self.stop(node, f"they pass `{_label(node)}`, which moves the channel dimension")
        return flow if constant is None else replace(flow, constant=constant)

    def module(self, node: Node, module: Any) -> Flow | None:
        name, calls = str(node.target), self.calls[node.target]
        entering = [flow.labels for flow in self.inputs(node)]
        self.entering[name] = np.concatenate(entering) if entering else self.fresh(0)
        if next(module.parameters(), None) is not None:
            if calls > 1:
                self.raw.unfollowed[name] = f"forward calls it {calls} times"
                return self.stop(node, f"they enter {name}, which forward calls {calls} times")
            if node in self.unread:
                self.raw.unfollowed[name] = "nothing reads its output"
                return self.stop(node, f"they enter {name}, whose output nothing reads")
        if len(node.all_input_nodes) != 1:
            return self.stop(node, f"they enter {name} ({type(module).__name__}) beside other tensors")
        if isinstance(module, (nn.Linear, *CONVOLUTIONS, *NORMS)) and "weight" not in module._parameters:
            remedy = "such as by a weight norm; a plain weight can be pruned"
            self.raw.unfollowed[name] = f"its weight is computed anew at every call, {remedy}"
            return self.stop(node, f"they enter {name}, whose weight is computed anew at every call, {remedy}")
        flow = self.flows.get(_first(node))
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
            padded = isinstance(module, nn.AvgPool1d | nn.AvgPool2d) and is_padded(module.padding)
            kind = next(each for each in _POOL_MODULES if isinstance(module, each)).__name__
            uneven = padded or getattr(module, "return_indices", False)
            return self.pool(node, flow, uneven, _pooled_dims(node, kind))
        if isinstance(module, _PAD_MODULES):
            sizes = [module.padding] if isinstance(module.padding, int) else module.padding
            constant = isinstance(module, nn.ConstantPad1d | nn.ConstantPad2d)
            return self.pad(node, flow, len(sizes), module.value if constant else None)
        if exact is nn.LocalResponseNorm and flow.dim == 1 and not flow.constant:
            self.note_raw(flow)
            return self.kept(node, flow)
        if exact is nn.Softmax:
            return self.softmax(node, flow, module.dim)
        if exact is nn.LayerNorm:
            return self.layer_norm(node, flow, module.normalized_shape)
        if exact in (nn.InstanceNorm1d, nn.InstanceNorm2d):
            return self.instance_norm(node, flow, module.weight is not None or module.track_running_stats)
        if exact is nn.GroupNorm:
            return self.group_norm(node)
        if isinstance(module, nn.Threshold):
            return self.kept(node, flow, flow.constant or not (module.value == 0 or module.threshold < 0))
        if exact is nn.Flatten:
            return self.flatten(node, flow, module.start_dim, module.end_dim)
        if exact is nn.Unflatten:
            return self.unflatten(node, flow, module.dim, module.unflattened_size)
        return self.stop(node, f"they enter {name}, and a {exact.__name__} cannot lose channels")

    def convolution(self, node: Node, module: Any, flow: Flow | None) -> Flow | None:
        name = str(node.target)
        if flow is not None and flow.dim != 1:
            flow = self.stop(node, f"they enter {name} as something else than channels")
        depthwise, composite = is_depthwise(module), name in self.composite
        padded = is_padded(module.padding) or name in self.own_layers  # such a class may pad before it convolves
        if flow is not None and flow.constant and padded and (composite or not depthwise):
            self.stop(node, f"what a removed channel leaves behind would reach the padding of {name}")
        if depthwise:
            if flow is None:
                return None
            self.raw.followers[name] = flow.labels
            biased = module.bias is not None
            return Flow(1, flow.labels, composite and (flow.constant or biased), flow.raw or biased)
        self.note_raw(flow)
        labels = self.raw.sources[name] = self.fresh(module.out_channels)
        if module.groups > 1:
            tied = [labels] if flow is None else [flow.labels, labels]
            self.grouped += [(name, each, module.groups) for each in tied]
        return Flow(1, labels, raw=True)

    def linear(self, node: Node, module: nn.Linear, flow: Flow | None) -> Flow | None:
        dim = len(node_shape(node) or ()) - 1
        if flow is not None and flow.dim != dim:
            self.stop(node, f"they enter {node.target} as something else than features")
        if flow is not None and flow.constant and str(node.target) in self.own_layers:
            self.stop(node, f"what a removed channel leaves behind would reach {node.target}, a class of its own")
        self.note_raw(flow)
        labels = self.raw.sources[str(node.target)] = self.fresh(module.out_features)
        return Flow(dim, labels, raw=True)

    def norm(self, node: Node, module: Any, flow: Flow) -> Flow | None:
        name = str(node.target)
        if flow.dim != 1 or module.running_mean is None:
            why = " as something else than channels" if flow.dim != 1 else ", which keeps no running statistics"
            return self.stop(node, f"they enter {name}{why}")
        self.raw.followers[name] = flow.labels
        silent = module.affine and name not in self.composite
        if not silent:
            self.note_raw(flow)
        return Flow(1, flow.labels, constant=not silent)

    def pool(self, node: Node, flow: Flow, uneven: bool, dims: int = 0) -> Flow | None:
        """``uneven``: a constant channel may not come out constant. ``dims``: how many of the last are pooled."""
        if flow.dim >= len(node_shape(node) or ()) - dims:
            return self.stop(node, f"they pass `{_label(node)}`, which mixes neighbouring ones")
        if uneven and flow.constant:
            self.stop(node, f"what a removed channel leaves behind would reach the padding of {_label(node)}")
        return self.kept(node, flow)

    def pad(self, node: Node, flow: Flow, sizes: int, value: Any) -> Flow | None:
        """A border of ``value``, or of what stands at the edge where that is None, around the last dimensions."""
        dims = len(node_shape(node) or ())
        if sizes > 2 * (dims - flow.dim - 1) or (value is not None and value != 0):
            return self.stop(node, f"they pass `{_label(node)}`")
        return self.pool(node, flow, value is not None)

    def flatten(self, node: Node, flow: Flow, start: int, end: int) -> Flow | None:
        shape = node_shape(_first(node)) or ()  # what has channels has a shape
        start, end = start % len(shape), end % len(shape)
        if start > flow.dim:
            return self.kept(node, flow)
        if end < flow.dim:
            return replace(flow, dim=flow.dim - (end - start))
        if start == 0:
            return self.stop(node, f"they pass `{_label(node)}`, which mixes them with the batch")
        labels = np.repeat(flow.labels, math.prod(shape[flow.dim + 1 : end + 1]))
        return replace(flow, dim=start, labels=np.tile(labels, math.prod(shape[start : flow.dim])))

    def unflatten(self, node: Node, flow: Flow, dim: Any, sizes: Any) -> Flow | None:
        """Another dimension as several."""
        rank = len(node_shape(_first(node)) or ())
        if not isinstance(dim, int) or dim % rank == flow.dim:
            return self.stop(node, f"they pass `{_label(node)}`, which regroups them or names their number")
        added = len(node_shape(node) or ()) - rank
        return replace(flow, dim=flow.dim + added * (dim % rank < flow.dim))

    def operation(self, node: Node) -> Flow | None:
        name, inputs = _name(node), self.inputs(node)
        if not inputs or name in _QUESTIONS:
            return None
        if name in _CONCATENATIONS:
            return self.concatenation(node)
        if name == "stack":
            return self.stack(node)
        if name in _ADDITIONS | _PRODUCTS | _QUOTIENTS:
            return self.arithmetic(node, name)
        if name == "expand_as" and len(node.all_input_nodes) == 2:
            return self.expand_as(node)
        if name in ("view_as", "reshape_as"):
            return self.view_as(node)
        if len(inputs) > 1 or _first(node) not in self.flows:
            return self.tried(node, f"they enter `{_label(node)}` beside other tensors")
        flow = inputs[0]
        if name in _ZERO_FUNCTIONS | _CONSTANT_FUNCTIONS:
            return self.kept(node, flow, flow.constant or name in _CONSTANT_FUNCTIONS)
        if name in _NUMBERED_FUNCTIONS:
            mark_apart(node)  # numbers such as clamp's may cut off all that NNI draws
            return self.kept(node, flow, flow.constant or not _is_zero_at_zero(node, name))
        if name == "prelu" and math.prod(node_shape(node.all_input_nodes[1]) or (0,)) == 1:
            return self.kept(node, flow)
        if name in _POOL_FUNCTIONS:
            # An average over a padded border is not constant; reading the padding from the arguments is not worth it.
            return self.pool(node, flow, name.startswith("avg_pool"), _pooled_dims(node, name))
        if name in _REDUCTIONS:
            return self.reduction(node, flow)
        if name == "pad" and isinstance(sizes := _argument(node, 1, "pad", None), tuple | list):
            value = (
                (_argument(node, 3, "value", 0) or 0) if _argument(node, 2, "mode", "constant") == "constant" else None
            )
            return self.pad(node, flow, len(sizes), value)
        if name == "flatten":
            return self.flatten(node, flow, _argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1))
        if name == "unflatten":
            return self.unflatten(node, flow, _argument(node, 1, "dim", None), _argument(node, 2, "sizes", ()))
        if name in _ALONG:
            return self.along(
                node, flow, _argument(node, _ALONG[name], "dim", _argument(node, _ALONG[name], "dims", None))
            )
        if name == "normalize":
            return self.normalised(node, flow)
        if name == "instance_norm":
            return self.instance_norm(node, flow, len(node.all_input_nodes) > 1)
        if name == "group_norm":
            return self.group_norm(node)
        if name in ("view", "reshape"):
            return self.view(node, flow)
        if name in PERMUTATIONS:
            return self.moved(node, flow, permuted(node, name, flow.dim))
        if name in _PARTS:
            return self.parts(node, flow, name)
        if name in ("softmax", "log_softmax"):
            return self.softmax(node, flow, _argument(node, 1, "dim", None))
        if name == "layer_norm":
            return self.layer_norm(node, flow, _argument(node, 1, "normalized_shape", ()))
        if name in ("expand", "broadcast_to", "repeat"):
            return self.expand(node, flow, name)
        if name == "getitem":
            return self.getitem(node, flow)
        return self.tried(node, f"they pass `{_label(node)}`")

    def tried(self, node: Node, reason: str) -> Flow | None:
        """A function that no list names; ``reason`` is why channels stay if it mixes them."""
        read = [each for each in node.all_input_nodes if each in self.flows]
        flows = [self.flows[each] for each in read]
        first = flows[0]
        alike = all(flow.dim == first.dim and len(flow.labels) == len(first.labels) for flow in flows)
        trial = channels_apart(node, self.graph_module, read, first.dim) if alike else None
        constant = any(flow.constant for flow in flows)
        # Where a constant comes in, zeros do not; only that the result is constant too must hold.
        if trial is None or (not trial.even and (constant or not trial.silent)):
            return self.stop(node, reason)
        for flow in flows:
            self.tie(first.labels, flow.labels)
            self.read_labels.update(flow.labels.tolist())
        return Flow(first.dim, first.labels, constant or not trial.silent, any(flow.raw for flow in flows))

    def along(self, node: Node, flow: Flow, dims: Any) -> Flow | None:
        """What moves, picks or adds up along other dimensions."""
        rank, dims = len(node_shape(node) or ()), [dims] if isinstance(dims, int) else dims
        named = isinstance(dims, tuple | list) and dims and all(isinstance(dim, int) for dim in dims)
        if not named or {0, flow.dim} & {dim % rank for dim in dims}:
            return self.stop(node, f"they pass `{_label(node)}`, which moves the batch or picks some of them")
        return replace(flow)

    def normalised(self, node: Node, flow: Flow) -> Flow | None:
        """Divided by a length, in which a channel of zeros does not count."""
        dim = _argument(node, 2, "dim", 1)
        if flow.constant or not isinstance(dim, int) or dim % len(node_shape(node) or ()) == 0:
            return self.stop(node, f"they pass `{_label(node)}`")
        return self.kept(node, flow)

    def instance_norm(self, node: Node, flow: Flow, constant: bool) -> Flow | None:
        """Each channel of each image by itself; nothing is left of a constant but what is added at the end."""
        if flow.dim != 1:
            return self.stop(node, f"they enter {_label(node)} as something else than channels")
        self.note_raw(flow)
        return self.kept(node, flow, constant)

    def group_norm(self, node: Node) -> Flow | None:
        """Those that are removed count as zeros in the mean of their group."""
        return self.stop(
            node, f"they enter {_label(node)}, a GroupNorm, whose mean and variance are over groups of them"
        )

    def view_as(self, node: Node) -> Flow | None:
        """In the shape of another tensor: the channels of both must stay the same number."""
        flow, other = (self.flows.get(each) for each in (*node.all_input_nodes, *node.all_input_nodes)[:2])
        before, after = node_shape(_first(node)) or (), node_shape(node) or ()
        if flow is None or other is None or len(flow.labels) != len(other.labels):
            return self.stop(node, f"they enter `{_label(node)}` with a tensor of another layout")
        if math.prod(before[: flow.dim]) != math.prod(after[: other.dim]):
            return self.stop(node, f"they enter `{_label(node)}` with a tensor of another layout")
        self.tie(flow.labels, other.labels)
        return replace(flow, dim=other.dim)

    def expand(self, node: Node, flow: Flow, name: str) -> Flow | None:
        """Copies along other dimensions, if the number of channels is not written down as a number."""
        sizes: Any = _sizes(node)
        if len(sizes) == len(node_shape(_first(node)) or ()):
            size = sizes[flow.dim]
            if size == 1 if name == "repeat" else size == -1 or isinstance(size, Node):
                return self.kept(node, flow)
        return self.stop(node, f"they pass `{_label(node)}`, which names their number")

    def expand_as(self, node: Node) -> Flow | None:
        """As wide as another tensor: the channels of both must stay the same number."""
        narrow, wide = node.all_input_nodes
        flow, other = self.flows.get(narrow), self.flows.get(wide)
        if flow is None or other is None or flow.dim != other.dim or len(flow.labels) != len(other.labels):
            return self.stop(node, f"they enter `{_label(node)}` with a tensor of another layout")
        if len(node_shape(narrow) or ()) != len(node_shape(wide) or ()):
            return self.stop(node, f"they enter `{_label(node)}` with a tensor of another layout")
        self.tie(flow.labels, other.labels)
        return self.kept(node, flow, tensor=narrow)

    def concatenation(self, node: Node) -> Flow | None:
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        dim, shape = _argument(node, 1, "dim", 0), node_shape(node)
        if not isinstance(parts, tuple | list) or shape is None or not isinstance(dim, int):
            return self.stop(node, f"they pass `{_label(node)}`")
        dim %= len(shape)
        known = [self.flows[part] for part in parts if part in self.flows]
        if len(known) == len(parts) and dim not in (0, known[0].dim) and self.tied_parts(known):
            return self.beside_one_another(node, known)
        flows = []
        for part in parts:
            flow, part_shape = self.flows.get(part), node_shape(part)
            if flow is None and part_shape is not None:
                flow = Flow(dim, self.fresh(part_shape[dim]))
                self.raw.freeze(flow.labels, f"they are joined with channels that stay by `{_label(node)}`")
            if flow is None or flow.dim != dim:
                return self.stop(node, f"they pass `{_label(node)}` along another dimension")
            flows.append(flow)
        for flow in flows:
            self.read_labels.update(flow.labels.tolist())
        constant, raw = any(flow.constant for flow in flows), any(flow.raw for flow in flows)
        return Flow(dim, np.concatenate([flow.labels for flow in flows]), constant, raw)

    def arithmetic(self, node: Node, name: str) -> Flow | None:
        if any(isinstance(argument, Node) for argument in node.kwargs.values()):
            return self.stop(node, f"they enter `{_label(node)}` by keyword")
        tensors = [argument for argument in node.args if isinstance(argument, Node) and self.is_wide(argument)]
        flows = [self.flows[argument] for argument in tensors if argument in self.flows]
        if len(tensors) == len(flows) == 1:
            number = next((argument for argument in node.args if argument is not tensors[0]), None)
            scaled = name in _PRODUCTS or (name in _QUOTIENTS and node.args[0] is tensors[0])
            if name in _QUOTIENTS and not scaled:
                return self.tried(node, f"they are a divisor in `{_label(node)}`")
            return self.kept(node, flows[0], flows[0].constant or not (scaled or number == 0), tensors[0])
        if len(tensors) != 2 or len(flows) != 2 or name in _QUOTIENTS:
            return self.stop(node, f"they enter `{_label(node)}` with a tensor whose channels stay")
        first, second = flows
        narrow, wide = sorted(flows, key=lambda flow: len(flow.labels))
        spread = len(narrow.labels) != len(wide.labels)
        other_layout = len(node_shape(tensors[0]) or ()) != len(node_shape(tensors[1]) or ()) or first.dim != second.dim
        if other_layout or (spread and len(narrow.labels) != 1):
            return self.stop(node, f"they enter `{_label(node)}` with a tensor of another layout")
        if spread:
            self.raw.freeze(narrow.labels, f"it is spread over other channels by `{_label(node)}`")
            if name in _ADDITIONS:
                self.raw.freeze(wide.labels, f"something else is added to all of them by `{_label(node)}`")
            return wide
        itself = np.array_equal(first.labels, second.labels)  # a tensor times what was computed from it
        self.tie(first.labels, second.labels)
        if name in _ADDITIONS:
            self.read_labels.update(first.labels.tolist(), second.labels.tolist())
            return Flow(first.dim, first.labels, first.constant or second.constant, first.raw or second.raw)
        if first.constant != second.constant and not itself:
            self.gate_labels.update((first if first.constant else second).labels.tolist())
        value = second if first.constant else first
        return Flow(first.dim, value.labels, first.constant and second.constant, first.raw and second.raw)

    def is_wide(self, node: Node) -> bool:
        """Whether a node holds a tensor of more than one number, or one with channels."""
        shape = node_shape(node)
        return shape is not None and (node in self.flows or math.prod(shape) != 1)

    def moved(self, node: Node, flow: Flow, dim: int | None) -> Flow | None:
        """The same channels in another dimension."""
        if dim is None:
            return self.stop(node, f"they pass `{_label(node)}`, which moves the batch or picks some of them")
        return replace(flow, dim=dim)

    def reduction(self, node: Node, flow: Flow) -> Flow | None:
        rank, dims = len(node_shape(_first(node)) or ()), _argument(node, 1, "dim", None)
        keep = len(node_shape(node) or ()) == rank
        dim = dropped(dims, rank, flow.dim, keep)
        if dim is None:
            return self.stop(node, f"they are averaged away by `{_label(node)}`")
        return replace(flow, dim=dim)

    def softmax(self, node: Node, flow: Flow, dim: Any) -> Flow | None:
        """Along another dimension, where a removed channel becomes a constant."""
        if not isinstance(dim, int) or dim % len(node_shape(node) or ()) == flow.dim:
            return self.stop(node, f"they pass `{_label(node)}`, which makes each depend on all the others")
        return replace(flow, constant=True)

    def layer_norm(self, node: Node, flow: Flow, normalised: Any) -> Flow | None:
        """The mean of all channels changes with their number; those that are removed count as zeros in it."""
        within = flow.dim >= len(node_shape(node) or ()) - len(normalised)
        why = "whose mean and variance are over all of them" if within else "a LayerNorm, which cannot lose channels"
        return self.stop(node, f"they enter {_label(node)}, {why}")

    def stack(self, node: Node) -> Flow | None:
        """Tensors along a new dimension: all must lose the same channels."""
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        dim, rank = _argument(node, 1, "dim", 0), len(node_shape(node) or ())
        flows = [self.flows.get(part) for part in parts] if isinstance(parts, tuple | list) else [None]
        known = [flow for flow in flows if flow is not None]
        followed = len(known) == len(flows) and isinstance(dim, int) and dim % rank != 0
        if not followed or not self.tied_parts(known):
            return self.stop(node, f"they pass `{_label(node)}` with tensors whose channels stay")
        flow = self.beside_one_another(node, known)
        return flow and replace(flow, dim=flow.dim + (dim % rank <= flow.dim))

    def beside_one_another(self, node: Node, flows: list[Flow]) -> Flow | None:
        """What tied tensors make along a dimension that does not hold their channels."""
        if any(flow.constant for flow in flows):
            return self.stop(node, f"a removed channel may leave several constants behind in `{_label(node)}`")
        return replace(flows[0], raw=any(flow.raw for flow in flows))

    def tied_parts(self, flows: list[Flow]) -> bool:
        """Tie the channels of tensors that are put beside one another; False where they are laid out differently."""
        first = flows[0]
        if any(flow.dim != first.dim or len(flow.labels) != len(first.labels) for flow in flows):
            return False
        for flow in flows:
            self.tie(first.labels, flow.labels)
            self.read_labels.update(flow.labels.tolist())
        return True

    def parts(self, node: Node, flow: Flow, name: str) -> Flow | None:
        """Parts along another dimension; the flow is that of each part."""
        rank = len(node_shape(_first(node)) or ())
        dim = _argument(node, 1, "dim", 0) if name == "unbind" else _argument(node, 2, "dim", 0)
        if not isinstance(dim, int) or dim % rank in (0, flow.dim):
            return self.stop(node, f"they pass `{_label(node)}`, which picks some of them")
        return replace(flow, dim=flow.dim - (name == "unbind" and dim % rank < flow.dim))

    def view(self, node: Node, flow: Flow) -> Flow | None:
        """Channels that stay a dimension, are cut into rows of equal length, or are merged with other dimensions."""
        sizes: Any = _sizes(node)
        before, after = node_shape(_first(node)) or (), node_shape(node) or ()
        if len(sizes) == len(after):
            # The batch may be merged with dimensions in front of the channels, or be cut into several.
            same_batch = before[:1] == after[:1]
            for way in (self.unmoved, self.rows, self.merged) if same_batch else (self.unmoved,):
                for place in range(1, len(after)):
                    if (seen := way(sizes, before, after, place, flow)) is not None:
                        return seen
        return self.stop(node, f"they pass `{_label(node)}`, which regroups them or names their number")

    def unmoved(self, sizes: Any, before: _Shape, after: _Shape, place: int, flow: Flow) -> Flow | None:
        """``(N, ..., channels, ...)`` with other sizes around them."""
        same = after[place] == before[flow.dim] and math.prod(after[:place]) == math.prod(before[: flow.dim])
        return replace(flow, dim=place) if same and self.is_counted(sizes[place], flow) else None

    def rows(self, sizes: Any, before: _Shape, after: _Shape, place: int, flow: Flow) -> Flow | None:
        """``(N, rows * channels, ...)`` as ``(N, rows, channels, ...)``: all rows lose the same channels."""
        count = after[place]
        if math.prod(after[:place]) != math.prod(before[: flow.dim]) or count == 1 or isinstance(sizes[place], Node):
            return None
        if place + 1 >= len(after) or count * after[place + 1] != len(flow.labels) or sizes[place] == -1:
            return None
        if not self.is_counted(sizes[place + 1], flow):
            return None
        rows = flow.labels.reshape(count, -1)
        for row in rows[1:]:
            self.tie(rows[0], row)
        return replace(flow, dim=place + 1, labels=rows[0])

    def merged(self, sizes: Any, before: _Shape, after: _Shape, place: int, flow: Flow) -> Flow | None:
        """``(N, a, channels, b, ...)`` as ``(N, a * channels * b, ...)``."""
        front = math.prod(after[:place])
        for start in range(1, flow.dim + 1):
            for end in range(flow.dim, len(before)):
                same = math.prod(before[:start]) == front and math.prod(before[start : end + 1]) == after[place]
                if same and self.is_counted(sizes[place], flow):
                    labels = np.repeat(flow.labels, math.prod(before[flow.dim + 1 : end + 1]))
                    return replace(flow, dim=place, labels=np.tile(labels, math.prod(before[start : flow.dim])))
        return None

    def is_counted(self, size: Any, flow: Flow) -> bool:
        """Whether a size of a view follows the number of channels."""
        return (isinstance(size, int) and size == -1) or self.counts_channels(size, flow)

    def counts_channels(self, size: Any, flow: Flow) -> bool:
        """Whether a size is computed from the number of these channels, so that it shrinks with them.

        The number may be that of another tensor's channels, which must then lose the same.
        """
        if not isinstance(size, Node):
            return False
        if size.op == "call_method" and size.target in ("size", "numel"):
            asked = self.flows.get(size.args[0])  # type: ignore[arg-type]
            if asked is None or len(asked.labels) != len(flow.labels):
                return False
            if size.target == "size" and size.args[1:] != (asked.dim,):
                return False
            self.tie(asked.labels, flow.labels)
            return True
        return any(self.counts_channels(each, flow) for each in size.all_input_nodes)

    def getitem(self, node: Node, flow: Flow) -> Flow | None:
        shape = node_shape(_first(node))
        if shape is None:  # one of several parts
            return flow
        if isinstance(node.args[1], int) and all(_name(reader) in _QUESTIONS for reader in node.users):
            return replace(flow, dim=flow.dim - 1)  # of one image, only to ask how large it is
        return self.moved(node, flow, indexed(node.args[1], len(shape), flow.dim))

    # ---- the result

    def layers_that_follow_their_products(self) -> dict[str, str]:
        """Gates of several branches, by name with the reason.

        Several outputs of such a layer scale the same channel, each in another branch. No mask of NNI's fits that, and
        none is needed: where the channel is zero, ``ModelSpeedup`` finds that nothing depends on these outputs.
        """
        found = {}
        gates = {self.find(label) for label in self.gate_labels}
        for name, raw in self.raw.sources.items():
            labels = self.roots(raw).tolist()
            if set(labels) <= gates and self.read_labels.isdisjoint(raw.tolist()) and len(set(labels)) < len(labels):
                found[name] = "its outputs only scale channels of other layers, and go with them"
        return found

    def settle(self) -> ChannelFlow:
        """Replace tied labels by one of them, and freeze the layers that share only some of their channels."""
        followers = self.layers_that_follow_their_products()
        flow = ChannelFlow(
            {name: self.roots(labels) for name, labels in self.raw.sources.items() if name not in followers},
            {name: self.roots(labels) for name, labels in self.raw.followers.items()},
            gates={name for name, labels in self.raw.sources.items() if self.gate_labels & set(labels.tolist())},
            read_raw={self.find(label) for label in self.raw.read_raw},
            unfollowed=self.raw.unfollowed | followers,
        )
        for label, reason in self.raw.frozen.items():
            flow.frozen.setdefault(self.find(label), reason)
        keys = {name: labels.tobytes() for name, labels in flow.sources.items()}
        single = set(keys.values())
        flow.composite = {name for name, labels in flow.followers.items() if labels.tobytes() not in single}
        blocks: dict[bytes, int] = {}
        for name, raw, groups in self.grouped:
            labels = self.roots(raw)
            if labels.tobytes() not in single:
                flow.freeze(labels, f"{name} has {groups} groups and reads the channels of several layers")
            elif len(labels) % groups:
                flow.freeze(labels, f"the {groups} groups of {name} do not divide them evenly")
            else:
                blocks[labels.tobytes()] = math.lcm(blocks.get(labels.tobytes(), 1), groups)
        flow.blocks = {name: blocks[key] for name, key in keys.items() if key in blocks}
        _freeze_partial_ties(flow)
        return flow


def _freeze_partial_ties(flow: ChannelFlow) -> None:
    """NNI's masks tie whole layers: layers that share only some channels, or in another order, stay."""
    owners: dict[int, str] = {}
    for name, labels in flow.sources.items():
        if len(set(labels.tolist())) < len(labels):
            flow.freeze(labels, f"two channels of {name} depend on each other")
        for label in labels.tolist():
            owner = owners.setdefault(label, name)
            if not np.array_equal(flow.sources[owner], labels):
                for shared in (labels, flow.sources[owner]):
                    flow.freeze(shared, f"{owner} and {name} share some of their channels only")
    frozen = -1
    while frozen != len(flow.frozen):
        frozen = len(flow.frozen)
        for name, labels in flow.sources.items():
            if reason := flow.reason(name):
                flow.freeze(labels, reason)


def _logits(returned: Any) -> Node | None:
    """The node of the logits in what forward returns, as ``models.teacher.first_tensor`` finds them."""
    if isinstance(returned, Node):
        return returned
    if isinstance(returned, Mapping):
        return _logits(returned["logits"]) if "logits" in returned else _logits(list(returned.values()))
    parts = returned if isinstance(returned, tuple | list) else ()
    return next((each for each in parts if isinstance(each, Node)), None)


def _first(node: Node) -> Node:
    return node.all_input_nodes[0]


def _sizes(node: Node) -> Any:
    """The sizes in ``x.view(sizes)`` or ``x.view(*sizes)``."""
    sizes = node.args[1:]
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes


def _is_zero_at_zero(node: Node, name: str) -> bool:
    """Whether ``f(0) = 0`` with the numbers that a function is given; False where they are not known."""
    if name == "pow":
        exponent = _argument(node, 1, "exponent", None)
        return isinstance(exponent, int | float) and exponent > 0
    if name.endswith("threshold"):
        threshold, value = _argument(node, 1, "threshold", None), _argument(node, 2, "value", None)
        return value == 0 or (isinstance(threshold, int | float) and threshold < 0)
    hard = name.startswith("hardtanh")
    low_name, high_name = ("min_val", "max_val") if hard else ("min", "max")
    low = None if name == "clamp_max" else _argument(node, 1, low_name, -1.0 if hard else None)
    high = (
        _argument(node, 1, "max", None) if name == "clamp_max" else _argument(node, 2, high_name, 1.0 if hard else None)
    )
    numbers = all(each is None or isinstance(each, int | float) for each in (low, high))
    return numbers and (low is None or low <= 0) and (high is None or high >= 0)


def _argument(node: Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _name(node: Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return "getitem" if node.target is operator.getitem else getattr(node.target, "__name__", str(node.target))


def _pooled_dims(node: Node, name: str) -> int:
    """Over how many of the last dimensions a pooling runs; resizing runs over all behind the second."""
    return int(name[-2]) if name[-1] == "d" else len(node_shape(node) or ()) - 2


def _label(node: Node) -> str:
    return str(node.target) if node.op == "call_module" else _name(node)


def is_padded(padding: str | int | tuple[int, ...]) -> bool:
    """Whether a convolution or pooling with this ``padding`` sees zeros around the image."""
    return padding != "valid" if isinstance(padding, str) else any([padding] if isinstance(padding, int) else padding)
