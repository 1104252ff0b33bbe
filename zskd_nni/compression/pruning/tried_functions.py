"""Functions that no list names, tried out: does each channel of the result come from that channel alone?

An autograd function of the user's own (a Swish that saves memory, a rounding that lets gradients pass) or a rare
function of PyTorch may leave channels where they are. Then half of the channels give half of the result. That is asked
of random tensors of the shapes in the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from zskd_nni.compression.fx_trace import depends_on_input, node_dtype, node_shape

_APART = "zskd_nni_channels_apart"


@dataclass(frozen=True)
class Trial:
    """What a function does that treats each channel by itself.

    Attributes:
        silent: zeros stay zeros.
        even: tensors that are constant give a constant one.
    """

    silent: bool
    even: bool


def channels_apart(node: Node, graph_module: GraphModule, read: Sequence[Node], dim: int) -> Trial | None:
    """Try a function; None if a channel of the result depends on others, or if that cannot be found out.

    A node that passes is marked, see :func:`is_apart`.

    Args:
        node: a function or a method.
        graph_module: has the node, and the constants that it reads.
        read: the tensors among its arguments that have channels.
        dim: the dimension of the channels, in all of them and in the result.
    """
    shape = node_shape(node)
    numbers = {each: _number(each, graph_module) for each in node.all_input_nodes if each not in read}
    same = all(node_shape(each) == shape for each in read)
    if shape is None or not same or any(number is None for number in numbers.values()) or shape[dim] < 2:
        return None
    if any(node_dtype(each) not in (torch.float32, torch.bool) for each in read):
        return None
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            trial = _trial(node, numbers, read, shape, dim)
        except Exception:  # a function of the user's may raise anything on such tensors
            return None
    if trial is not None:
        mark_apart(node)
    return trial


def mark_apart(node: Node) -> None:
    """Note that a function treats each channel by itself."""
    node.meta[_APART] = True


def is_apart(node: Node) -> bool:
    """Whether a function was tried and found to treat each channel by itself."""
    return bool(node.meta.get(_APART))


def _number(node: Node, graph_module: GraphModule) -> Tensor | None:
    """A constant of one number that a node holds; None for anything else."""
    if node.op != "get_attr" or depends_on_input(node):
        return None
    value = operator.attrgetter(str(node.target))(graph_module)
    return value.detach().cpu() if isinstance(value, Tensor) and value.numel() == 1 else None


def _trial(
    node: Node, numbers: dict[Node, Any], read: Sequence[Node], shape: tuple[int, ...], dim: int
) -> Trial | None:
    def result(tensors: dict[Node, Tensor]) -> Tensor:
        given = numbers | tensors
        args, kwargs = map_arg((node.args, node.kwargs), lambda each: given[each].clone())
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    for scale in (1.0, 8.0, 1.0):
        drawn = {each: torch.randn(shape).mul_(scale) for each in read}
        drawn = {each: value > 0 if node_dtype(each) is torch.bool else value for each, value in drawn.items()}
        kept = torch.randperm(shape[dim])[: shape[dim] // 2].sort().values
        whole, again = result(drawn), result(drawn)
        part = result({each: value.index_select(dim, kept) for each, value in drawn.items()})
        if tuple(whole.shape) != shape or not _equal(whole, again):
            return None
        if not _equal(part, whole.index_select(dim, kept)):
            return None

    def of_constants(value: float) -> Tensor:
        return result({each: torch.full(shape, value).to(node_dtype(each)) for each in read}).float()

    silent = of_constants(0.0)
    even = all(bool((found == found.flatten()[0]).all()) for found in map(of_constants, (0.3, 1.7)))
    return Trial(bool((silent == 0).all()), even and bool((silent == silent.flatten()[0]).all()))


def _equal(first: Tensor, second: Tensor) -> bool:
    """With what vectorised code rounds otherwise at the end of a row."""
    return first.shape == second.shape and torch.allclose(first.float(), second.float(), 1e-5, 1e-6, equal_nan=True)
