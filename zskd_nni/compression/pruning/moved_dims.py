"""Where a dimension of a tensor is after an operation that only moves, drops or adds dimensions."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from zskd_nni.compression.fx_trace import node_shape

PERMUTATIONS = {
    "permute", "transpose", "transpose_", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT",
}  # fmt: skip


def permuted(node: Node, name: str, dim: int) -> int | None:
    """The place of dimension ``dim`` after a permutation; None if the batch does not stay in front.

    Example:
        >>> from torch.fx import Graph
        >>> graph = Graph()
        >>> x = graph.placeholder("x")
        >>> x.meta["zskd_nni_shape"] = (2, 3, 8, 8)
        >>> permuted(graph.call_method("permute", (x, 0, 2, 3, 1)), "permute", 1)
        3
    """
    order = _order(node, name)
    if order is None or order[:1] != [0]:
        return None
    return order.index(dim)


def _order(node: Node, name: str) -> list[int] | None:
    """Which dimension of the input each dimension of the output was."""
    dims = list(range(len(node_shape(node.all_input_nodes[0]) or ())))
    # By keyword the destination may come first.
    given: list[Any] = [*node.args[1:], *(node.kwargs[key] for key in sorted(node.kwargs, key="destination".__eq__))]
    if name == "permute":
        order = list(given[0]) if given and isinstance(given[0], tuple | list) else given
        return [dims[each] for each in order] if all(isinstance(each, int) for each in order) else None
    if name in ("t", "T") and not given:
        return dims[::-1]
    if name == "mT" and not given:
        given = [-1, -2]
    if len(given) != 2 or not all(isinstance(each, int) for each in given):
        return None
    first, second = (dims[each] for each in given)
    if name in ("movedim", "moveaxis"):
        dims.remove(first)
        dims.insert(second, first)
    else:
        dims[first], dims[second] = second, first
    return dims


def indexed(index: Any, rank: int, dim: int) -> int | None:
    """The place of dimension ``dim`` after ``x[index]``; None if the index picks from it or from the batch.

    Example:
        >>> indexed((..., slice(2, 5)), rank=4, dim=1), indexed((slice(None), 0), rank=3, dim=2)
        (1, 1)
    """
    entries = list(index) if isinstance(index, tuple) else [index]
    if entries.count(Ellipsis) > 1 or not all(map(_is_plain, entries)):
        return None
    named = sum(entry is not None and entry is not Ellipsis for entry in entries)
    if Ellipsis not in entries:
        entries.append(Ellipsis)
    position = entries.index(Ellipsis)
    entries[position : position + 1] = [slice(None)] * (rank - named)
    place, found, read = 0, None, 0
    for entry in entries:
        if entry is None:
            place += 1
            continue
        if read in (0, dim) and entry != slice(None):
            return None
        if read == dim:
            found = place
        read += 1
        place += not isinstance(entry, int)
    return found if entries[0] is not None else None


def _is_plain(entry: Any) -> bool:
    sliced = isinstance(entry, Node) and entry.target is slice
    return entry is None or entry is Ellipsis or isinstance(entry, slice | int) or sliced


def dropped(dims: Any, rank: int, dim: int, keep: bool) -> int | None:
    """The place of dimension ``dim`` after a reduction over ``dims``; None if it or the batch is reduced.

    Example:
        >>> dropped((2, 3), 4, 1, keep=False), dropped(1, 5, 2, keep=False), dropped((1,), 4, 1, keep=True)
        (1, 1, None)
    """
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, tuple | list) or not dims or not all(isinstance(each, int) for each in dims):
        return None
    places = {each % rank for each in dims}
    if places & {0, dim}:
        return None
    return dim if keep else dim - sum(each < dim for each in places)
