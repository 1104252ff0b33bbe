"""A model as a torch.fx graph whose module calls carry the model's own module paths."""

from __future__ import annotations

import traceback
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node, Tracer
from torch.utils._pytree import tree_map

from zskd_nni.models.hooks import evaluating
from zskd_nni.runtime.errors import UserError

_TORCH_FOLDER = str(Path(torch.__file__).parent)
_SHAPE = "zskd_nni_shape"


def trace(model: nn.Module, dummy_input: Any) -> GraphModule:
    """The model's evaluation graph, with the shape of every tensor attached.

    The modules of ``torch.nn`` are the leaves, so that each ``call_module`` target is a path of
    ``model.named_modules()``. The graph module shares its modules with the model; the model itself, its
    parameters, its buffers and its training flags are as before. What is only run in training (the auxiliary
    heads of GoogLeNet, for one) is not in the graph.

    Args:
        model: any module that torch.fx can trace.
        dummy_input: one input: a tensor, or the positional arguments of ``forward`` as a tuple or list, or its
            arguments by name as a dict. The first dimension of each tensor is the batch.

    Returns:
        A graph module in evaluation mode; ``node_shape`` reads the shapes.

    Raises:
        UserError: the model cannot be traced, or does not accept the dummy input.
    """
    name = type(model).__name__
    with evaluating(model):
        try:
            graph_module = GraphModule(model, Tracer().trace(model), class_name=name)
        except Exception as error:
            raise UserError(
                f"torch.fx cannot trace {name}: {_where(error, model)}: {error}; keep control flow that depends on "
                f"tensor values out of forward (or move it into a function marked with torch.fx.wrap)"
            ) from error
        try:
            with torch.no_grad():
                _ShapePropagation(graph_module).run(*copied(input_arguments(dummy_input, graph_module)))
        except UserError:
            raise
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"{name} does not accept the dummy input ({_describe(dummy_input)}): {_where(error, model)}: "
                f"{reason}; pass an input of the shape that the model is used with"
            ) from error
    graph_module.training = False
    return graph_module


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
            setattr(model, node.target, deepcopy(getattr(graph_module, node.target)))
    moved = GraphModule(model, graph, class_name=type(model).__name__)
    moved.training = False
    return moved


def copied(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the tensors among a network's arguments, for networks that change their input in place."""
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, arguments)


def input_arguments(dummy_input: Any, graph_module: GraphModule | None = None) -> tuple[Any, ...]:
    """The dummy input as positional arguments.

    Args:
        dummy_input: as in ``trace``.
        graph_module: the graph whose placeholders order a dict; the dict's own order without it.

    Raises:
        UserError: a dict lacks an argument that stands before one it has.
    """
    if isinstance(dummy_input, dict):
        if graph_module is None:
            return tuple(dummy_input.values())
        names = [str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"]
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
        return result


def _where(error: BaseException, model: nn.Module) -> str:
    """The last line of code outside torch that the error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if not f.filename.startswith((_TORCH_FOLDER, __file__, "<"))]
    if not outside:
        return f"in {type(model).__name__}"
    frame = outside[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}: `{frame.line}`"


def _describe(dummy_input: Any) -> str:
    return ", ".join(
        f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        for value in input_arguments(dummy_input)
    )
