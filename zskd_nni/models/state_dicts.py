"""Which entries of a state dict are a network's, whatever wrapped the network when they were saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from zskd_nni.runtime.tensors import is_averaged

_WRAPPERS = {"module", "_orig_mod"}  # of DataParallel, AveragedModel and torch.compile
_COUNTERS = {"num_batches_tracked", "n_averaged", "total_ops", "total_params"}  # of averaging and of profilers


@dataclass(frozen=True)
class Fit:
    """How a state dict fits a network.

    Attributes:
        weights: name in the network -> tensor.
        names: name in the network -> name in the state dict.
        prefix: what stands before the network's names, such as ``model.`` of Lightning; without wrappers.
        missing: names of the network that were not found, except counters.
        left_over: names in the state dict that are not the network's.
        beside: names in the state dict outside the prefix: of a loss, or of another network.
        shapes: sentences about tensors of another shape.
    """

    weights: dict[str, Tensor]
    names: dict[str, str]
    prefix: str = ""
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether it can be loaded."""
        return not (self.missing or self.left_over or self.shapes)

    @property
    def removed(self) -> str:
        """What was taken off the names in the state dict, for a message; empty where nothing was."""
        name, given = next(((name, given) for name, given in self.names.items() if name != given), ("", ""))
        if given.endswith(name):
            return given.removesuffix(name)
        return next((f"{part}." for part in given.split(".") if part in _WRAPPERS), "")


def fit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Fit:
    """Find a network's entries in a state dict.

    The names may stand behind a prefix, in any nesting, and hold the ``module`` of DataParallel or the ``_orig_mod`` of
    ``torch.compile`` anywhere. Where several prefixes fit, averaged weights count first, then the shorter prefix,
    then the one that comes first.

    Args:
        expected: the network's state dict.
        given: another one.

    Returns:
        A complete fit, or the one that lacks least.

    Example:
        >>> import torch
        >>> linear = torch.nn.Linear(2, 1)
        >>> saved = {f"module._orig_mod.{name}": value for name, value in linear.state_dict().items()}
        >>> fit(linear.state_dict(), saved).names
        {'weight': 'module._orig_mod.weight', 'bias': 'module._orig_mod.bias'}
    """
    as_they_are = _fit_behind(expected, {name: name for name in given}, {name: name for name in expected}, given, "")
    if as_they_are.complete:
        return as_they_are
    plain = {name: _without_wrappers(name) for name in given}
    wanted = {name: _without_wrappers(name) for name in expected}
    needed = [wanted[name] for name in expected if not _is_counter(name)]
    behind = (name[: -len(key)] for key in needed[:1] for name in plain.values() if f".{name}".endswith(f".{key}"))
    prefixes = dict.fromkeys(("", *behind))  # in the order of the file
    fits = [_fit_behind(expected, plain, wanted, given, prefix) for prefix in sorted(prefixes, key=_rank)]
    best = min([*fits, as_they_are], key=lambda one: (not one.complete, len(one.missing) + len(one.shapes)))
    return best if best.complete or len(best.missing) < len(as_they_are.missing) else as_they_are


def _fit_behind(
    expected: Mapping[str, Tensor],
    plain: Mapping[str, str],
    wanted: Mapping[str, str],
    given: Mapping[str, Tensor],
    prefix: str,
) -> Fit:
    """The fit of the names behind one prefix; ``plain`` and ``wanted`` are names without wrappers."""
    inside = {short[len(prefix) :]: name for name, short in plain.items() if short.startswith(prefix)}
    names = {name: inside.pop(key) for name, key in wanted.items() if key in inside}
    shapes = [
        f"{name} is {list(given[source].shape)}, not {list(expected[name].shape)}"
        for name, source in names.items()
        if given[source].shape != expected[name].shape
    ]
    return Fit(
        {name: given[source] for name, source in names.items()},
        names,
        prefix,
        [name for name in expected if name not in names and not _is_counter(name)],
        [name for name in inside.values() if not _is_counter(name)],
        [name for name, short in plain.items() if not short.startswith(prefix) and not _is_counter(name)],
        shapes,
    )


def _rank(prefix: str) -> tuple[bool, int]:
    return not is_averaged(prefix), len(prefix)


def _without_wrappers(name: str) -> str:
    *parents, last = name.split(".")
    return ".".join([*(part for part in parents if part not in _WRAPPERS), last])


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in _COUNTERS
