"""A model as a torch.fx graph whose module calls carry the model's own module paths."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_map

from zskd_nni.compression import forward_recorder
from zskd_nni.compression.forward_recorder import DEPENDS, ValueNeededError, record
from zskd_nni.models.hooks import evaluating
from zskd_nni.models.network_kinds import check_kind
from zskd_nni.models.shared_modules import check_not_wrapped, set_module
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.gradients import with_gradients
from zskd_nni.runtime.precision import without_autocast

_TORCH_FOLDER = str(Path(torch.__file__).parent)
_OWN_FILES = (__file__, forward_recorder.__file__)
_SHAPE = "zskd_nni_shape"
_DTYPE = "zskd_nni_dtype"
_FIXED = "zskd_nni_fixed_dims"
_OWN_LAYERS = "zskd_nni_own_layers"


@with_gradients()
def trace(model: nn.Module, dummy_input: Any) -> GraphModule:
    """The model's evaluation graph, with the shape of every tensor attached.

    The modules of ``torch.nn`` are the leaves, so that each ``call_module`` target is a path of
    ``model.named_modules()``. The graph module shares its modules with the model; the model itself, its
    parameters, its buffers and its training flags are as before. What is only run in training (the auxiliary
    heads of GoogLeNet, for one) is not in the graph, and arguments of forward that the dummy input leaves out have
    their defaults.

    A class that computes a convolution, linear layer or batch normalisation with its own ``weight`` is a
    ``call_module`` as well: :func:`own_layers` has the layer of PyTorch that stands for that computation.

    Args:
        model: any module.
        dummy_input: one input: a tensor, or the positional arguments of ``forward`` as a tuple or list, or its
            arguments by name as a dict. The first dimension of each tensor is the batch.

    Returns:
        A graph module in evaluation mode; ``node_shape`` reads the shapes.

    Raises:
        UserError: forward depends on values of the input, or does not accept the dummy input.
    """
    check_not_wrapped(model)
    check_kind(model, "The network")
    name = type(model).__name__
    arguments = input_arguments(dummy_input, model)
    with evaluating(model), _own_random_numbers(model) as seed, without_autocast():
        try:
            seed(0)
            recorder = record(model, _named(model, copied(arguments)))
        except ValueNeededError as error:
            raise UserError(
                f"torch.fx cannot trace {name}: {_where(error, model)}: {error}; keep control flow that depends on "
                f"tensor values out of forward (or move it into a function marked with torch.fx.wrap)"
            ) from error
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"{name} does not accept the dummy input ({_describe(dummy_input)}): {_where(error, model)}: "
                f"{reason}; pass an input of the shape that the model is used with"
            ) from error
        if not any(node.all_input_nodes for node in recorder.graph.find_nodes(op="output")):
            raise UserError(
                f"torch.fx cannot trace {name}: no tensor is found in what forward returns; return a tensor, or "
                f"tensors in a tuple, dict or dataclass"
            )
        for constant, tensor in recorder.constants.items():
            _set_constant(model, constant, tensor)
        graph_module = _graph_module(model, recorder.graph, recorder.own_layers)
        fixed = {(node.name, dim) for node, dim in recorder.fixed}
        for node in graph_module.graph.nodes:
            node.meta[_FIXED] = tuple(dim for name, dim in fixed if name == node.name)
        with torch.no_grad():
            _ShapePropagation(graph_module).run(*copied(arguments))
            _check_graph(model, graph_module, arguments, seed)
    return graph_module


def _set_constant(model: nn.Module, name: str, tensor: Tensor) -> None:
    """An attribute that is no parameter of the model even if the tensor is one: state dicts stay as they are."""
    model.__dict__[name] = tensor


def _graph_module(model: nn.Module, graph: Graph, layers: Mapping[str, nn.Module]) -> GraphModule:
    graph_module = GraphModule(model, graph, class_name=type(model).__name__)
    for path, layer in layers.items():
        set_module(graph_module, path, layer)
    graph_module.meta[_OWN_LAYERS] = dict(layers)
    graph_module.training = False
    return graph_module


def _named(model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments of forward by name; further ones of ``*args`` together under a name with a star."""
    named: dict[str, Any] = {}
    rest = list(arguments)
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            named[f"*{parameter.name}"], rest = tuple(rest), []
        elif rest and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            named[parameter.name] = rest.pop(0)
    return named | {f"further_{position}": value for position, value in enumerate(rest)}


@contextmanager
def _own_random_numbers(model: nn.Module) -> Iterator[Callable[[int], None]]:
    """Within the block random numbers are the network's; yields what seeds them.

    ``torch.manual_seed`` would also seed the devices that the network is not on, for good.
    """
    devices = {tensor.device.index for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}

    def seed(number: int) -> None:
        for generator in (torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)):
            generator.manual_seed(number)

    with torch.random.fork_rng(devices=sorted(devices)):
        yield seed


def _check_graph(
    model: nn.Module, graph_module: GraphModule, arguments: tuple[Any, ...], seed: Callable[[int], None]
) -> None:
    """Refuse a graph that holds for the dummy input alone: another input of another batch size must give the same."""
    other = random_like(arguments, torch.Generator().manual_seed(2), uniform=True, count=3)
    try:
        seed(1)
        expected = output_leaves(model(*copied(other)))
    except Exception:  # the network is made for one batch size
        return
    try:
        seed(1)
        # The graph module itself would print a traceback.
        actual = output_leaves(Interpreter(graph_module).run(*copied(other)))
        pairs = [(a, b) for a, b in zip(expected, actual, strict=True) if isinstance(a, Tensor)]
        same = all(a.shape == b.shape and torch.allclose(a, b, 1e-3, 1e-4, equal_nan=True) for a, b in pairs)
    except Exception:
        same = False
    if not same:
        raise UserError(
            f"torch.fx cannot trace {type(model).__name__}: what it computes for one batch is not what it computes for "
            f"another; keep the number of images and values of tensors out of Python's numbers and control flow in "
            f"forward"
        )


def retrace(graph_module: GraphModule, model: nn.Module) -> GraphModule:
    """The graph of a network over another network of the same structure, without tracing that one.

    Args:
        graph_module: from ``trace``.
        model: such as a copy of the traced network with other weights. Constants that its forward makes are set on
            it as attributes, as tracing does.
    """
    graph = deepcopy(graph_module.graph)
    for node in graph.nodes:
        if node.op == "get_attr" and "." not in node.target and not hasattr(model, node.target):
            _set_constant(model, node.target, deepcopy(getattr(graph_module, node.target)))
    layers = {}
    for path, layer in own_layers(graph_module).items():
        owner, layers[path] = model.get_submodule(path), _without_tensors(layer)
        layers[path]._modules = dict(owner._modules)
        for name in OWN_TENSORS:
            if getattr(layer, name, None) is not None:
                setattr(layers[path], name, getattr(owner, name))
    return _graph_module(model, graph, layers)


OWN_TENSORS = ("weight", "bias", "running_mean", "running_var")


def _without_tensors(layer: nn.Module) -> nn.Module:
    """A copy of a layer whose tensors are still the layer's own."""
    twin = copy.copy(layer)
    twin._parameters, twin._buffers = dict(layer._parameters), dict(layer._buffers)
    return twin


def own_layers(graph_module: GraphModule) -> dict[str, nn.Module]:
    """By path, PyTorch's layers that stand for what a module computes in its own forward; the tensors are shared."""
    return graph_module.meta.get(_OWN_LAYERS, {})


def fixed_dims(node: Node) -> tuple[int, ...]:
    """The dimensions of a node's tensor whose size Python uses as a number, so that it must stay."""
    return node.meta.get(_FIXED, ())


def depends_on_input(node: Node) -> bool:
    """Whether a node's value, not only its shape, depends on the network's input."""
    return bool(node.meta.get(DEPENDS, True))


def random_like(arguments: tuple[Any, ...], generator: torch.Generator, uniform: bool, count: int) -> tuple[Any, ...]:
    """A batch of other inputs: normal values, or uniform ones in [0, 1); integers are drawn from the dummy's."""

    def draw(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        shape = (count, *value.shape[1:])
        if not value.is_floating_point():
            return value.flatten()[torch.randint(value.numel(), shape, generator=generator).to(value.device)]
        return (torch.rand if uniform else torch.randn)(shape, generator=generator).to(value.device, value.dtype)

    return tree_map(draw, arguments)


def copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the tensors among a network's arguments, for networks that change their input in place."""
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, arguments)


def output_leaves(output: Any) -> list[Any]:
    """The leaves of what a network returns, those of a dataclass included, which pytrees take for a leaf.

    Example:
        >>> @dataclasses.dataclass
        ... class Answer:
        ...     logits: int
        ...     features: tuple[int, int]
        >>> output_leaves([Answer(1, (2, 3)), {"k": 4}])
        [1, 2, 3, 4]
    """

    def parts(leaf: Any) -> list[Any]:
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            return [leaf]
        return output_leaves([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])

    return [part for leaf in tree_leaves(output) for part in parts(leaf)]


def input_arguments(dummy_input: Any, model: nn.Module | None = None) -> tuple[Any, ...]:
    """The dummy input as positional arguments.

    Args:
        dummy_input: as in ``trace``.
        model: whose forward orders a dict; the dict's own order without it.

    Raises:
        UserError: a dict lacks an argument that stands before one it has.
    """
    if isinstance(dummy_input, dict):
        if model is None:
            return tuple(dummy_input.values())
        names = list(inspect.signature(model.forward).parameters)
        first = names[: len(dummy_input)]
        if set(first) != set(dummy_input):
            raise UserError(
                f"the dummy input names {', '.join(sorted(dummy_input))}, but forward takes {', '.join(names)} in this "
                f"order; name the first of them without a gap"
            )
        return tuple(dummy_input[name] for name in first)
    return tuple(dummy_input) if isinstance(dummy_input, tuple | list) else (dummy_input,)


def node_shape(node: Node) -> tuple[int, ...] | None:
    """The shape of a node's tensor, None where the node holds no single tensor."""
    return node.meta.get(_SHAPE)


def node_dtype(node: Node) -> torch.dtype | None:
    """The type of a node's tensor, None where the node holds no single tensor."""
    return node.meta.get(_DTYPE)


def unread_nodes(graph_module: GraphModule) -> list[Node]:
    """The nodes that forward computes although its output does not depend on them, last first."""
    read: set[Node] = set()
    unread = []
    for node in reversed(graph_module.graph.nodes):
        if node.op in ("output", "placeholder") or node in read:
            read.update(node.all_input_nodes)
        else:
            unread.append(node)
    return unread


class _ShapePropagation(Interpreter):
    """Runs the graph once and notes each tensor's shape (torch's ShapeProp prints a traceback when a node fails)."""

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        n.meta[_SHAPE] = tuple(result.shape) if isinstance(result, torch.Tensor) else None
        n.meta[_DTYPE] = result.dtype if isinstance(result, torch.Tensor) else None
        return result


def _where(error: BaseException, model: nn.Module) -> str:
    """The last line of code outside torch that the error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if not f.filename.startswith((_TORCH_FOLDER, *_OWN_FILES, "<"))]
    if not outside:
        return f"in {type(model).__name__}"
    frame = outside[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}: `{frame.line}`"


def _describe(dummy_input: Any) -> str:
    return ", ".join(
        f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        for value in input_arguments(dummy_input)
    )
