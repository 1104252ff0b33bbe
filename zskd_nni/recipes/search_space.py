"""Search spaces over a recipe, in NNI's form: key paths of the recipe, each with ``_type`` and ``_value``.

A choice may be nested as NNI's are: its values are mappings with a ``_name``, which is put at the path, and further key
paths of the recipe that are searched only with that choice.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from zskd_nni.recipes.key_paths import set_at

# NNI's types, and how many numbers each wants.
_NUMBERS = {
    "randint": 2,
    "uniform": 2,
    "quniform": 3,
    "loguniform": 2,
    "qloguniform": 3,
    "normal": 2,
    "qnormal": 3,
    "lognormal": 2,
    "qlognormal": 3,
}
TYPES = ("choice", *_NUMBERS)


def check_space(space: Any, where: str = "") -> None:
    """Refuse what is no search space.

    Raises:
        ValueError: one sentence that names the key path and what would be right.
    """
    if not isinstance(space, Mapping) or not space:
        raise ValueError(f"{where or 'space'} must name at least one key path of the recipe, with _type and _value")
    for path, spec in space.items():
        here = f"{where}.{path}" if where else str(path)
        if not isinstance(path, str):
            raise ValueError(f"{here}: a key path of the recipe is text")
        if not isinstance(spec, Mapping) or not {"_type", "_value"} <= set(spec):
            raise ValueError(f"{here} needs _type and _value, such as {{_type: uniform, _value: [0.3, 0.7]}}")
        extra = sorted(str(key) for key in set(spec) - {"_type", "_value"})
        if extra:
            raise ValueError(f"{here}: unknown key {extra[0]!r}; known here: _type, _value")
        kind, values = spec["_type"], spec["_value"]
        if kind not in TYPES:
            near = difflib.get_close_matches(str(kind), TYPES, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"NNI has {', '.join(TYPES)}"
            raise ValueError(f"{here}: there is no _type {kind!r}; {hint}")
        if not isinstance(values, list) or not values:
            raise ValueError(f"{here}: _value must be a list that is not empty, not {values!r}")
        if kind == "choice":
            _check_choices(values, here)
        else:
            _check_numbers(kind, values, here)


def _check_choices(values: list[Any], here: str) -> None:
    if len({repr(value) for value in values}) < len(values):
        raise ValueError(f"{here}: _value names a choice twice")
    try:
        json.dumps(values, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{here}: a choice must be plain text, numbers, lists and mappings ({error})") from error
    if not is_nested(values):
        return
    for value in values:
        inner = _inner(value)
        if inner:
            check_space(inner, f"{here}.{value['_name']}")


_LARGEST_LOGARITHM = 700  # e to this is what a number can be


def _check_numbers(kind: str, values: list[Any], here: str) -> None:
    count = _NUMBERS[kind]
    if len(values) != count:
        raise ValueError(f"{here}: {kind} takes {count} numbers, not {len(values)}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            hint = " (YAML reads 1e-3 as text; write 1.0e-3)" if isinstance(value, str) else ""
            raise ValueError(f"{here}: {kind} takes numbers, not {value!r}{hint}")
    if kind == "randint" and not all(isinstance(value, int) for value in values):
        raise ValueError(f"{here}: randint takes whole numbers, not {values}")
    if "normal" in kind:
        if values[1] <= 0:
            raise ValueError(f"{here}: the standard deviation must be positive, not {values[1]}")
        if "log" in kind and values[0] > _LARGEST_LOGARITHM:
            raise ValueError(f"{here}: {kind} takes the logarithm of the middle, at most {_LARGEST_LOGARITHM}")
    elif values[0] >= values[1]:
        raise ValueError(f"{here}: the lower bound must be less than the upper one, not {values}")
    elif "log" in kind and values[0] <= 0:
        raise ValueError(f"{here}: {kind} needs a positive lower bound, not {values[0]}")
    if count == 3 and values[2] <= 0:
        raise ValueError(f"{here}: the step must be positive, not {values[2]}")


def is_nested(values: list[Any]) -> bool:
    """Whether NNI takes a choice's values as nested spaces."""
    return all(isinstance(value, Mapping) and "_name" in value for value in values)


def flat_parameters(space: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """NNI's parameters as key paths and values; a nested choice gives its name and what belongs to it."""
    flat: dict[str, Any] = {}
    for path, value in parameters.items():
        spec = space[path]
        if spec["_type"] == "choice" and is_nested(spec["_value"]):
            chosen = next(one for one in spec["_value"] if one["_name"] == value["_name"])
            flat[path] = value["_name"]
            flat.update(flat_parameters(chosen, {key: one for key, one in value.items() if key != "_name"}))
        else:
            # NNI multiplies steps, 3 * 0.1 = 0.30000000000000004
            flat[path] = float(f"{value:.12g}") if isinstance(value, float) else value
    return flat


def with_parameters(source: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a recipe's plain mapping with the values of :func:`flat_parameters` in their places.

    Raises:
        ValueError: a path leads nowhere.
    """
    changed = copy.deepcopy(dict(source))
    for path, value in flat.items():
        set_at(changed, path, copy.deepcopy(value))
    return changed


@dataclass(frozen=True)
class Dimension:
    """A key path that is searched, and what of it can be tried beforehand.

    Attributes:
        path: of the recipe.
        within: the choices it is nested in, outermost first, each as key path and value.
        kind: NNI's ``_type``.
        values: every choice, both ends of a range, the middle of a normal distribution.
    """

    path: str
    within: tuple[tuple[str, Any], ...]
    kind: str
    values: tuple[Any, ...]


def dimensions(space: Mapping[str, Any], within: tuple[tuple[str, Any], ...] = ()) -> Iterator[Dimension]:
    """All that is searched, what is nested after what it is nested in."""
    for path, spec in space.items():
        yield Dimension(path, within, spec["_type"], tuple(_values(spec)))
        if spec["_type"] == "choice" and is_nested(spec["_value"]):
            for value in spec["_value"]:
                yield from dimensions(_inner(value), (*within, (path, value["_name"])))


def corners(space: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """What can be tried beforehand: every choice, and both ends of every range, each alone.

    Yields:
        The key path, the value, and the flat parameters it comes with (those of the choice it is nested in, and the
        first of all that it brings).
    """
    for one in dimensions(space):
        for value in one.values:
            yield one.path, value, next(_flats(list(space.items()), {**dict(one.within), one.path: value}))


def pairs(space: Mapping[str, Any]) -> Iterator[tuple[Dimension, Any, Dimension, Iterator[dict[str, Any]]]]:
    """A value of one dimension together with all that can be tried of another, for every two that may meet in a trial.

    Of a normal distribution the middle alone is tried, which says nothing of its other values: it is never the other.
    What is nested has been tried with the choice it is nested in by :func:`corners`.

    Yields:
        A dimension, its value, the other dimension, and the flat parameters with each value of the other and of all
        that the two bring.
    """
    for one, other in permutations(dimensions(space), 2):
        if "normal" in other.kind or not _meet(one, other):
            continue
        above = {**dict(one.within), **dict(other.within)}
        for value in one.values:
            yield one, value, other, _with_each(space, {**above, one.path: value}, other)


def _with_each(space: Mapping[str, Any], chosen: Mapping[str, Any], other: Dimension) -> Iterator[dict[str, Any]]:
    for value in other.values:
        yield from _flats(list(space.items()), {**chosen, other.path: value})


def _meet(one: Dimension, other: Dimension) -> bool:
    """Whether both can be in one trial, and neither is nested in the other."""
    above, others = dict(one.within), dict(other.within)
    apart = {one.path} & {other.path, *others} or other.path in above
    return not apart and all(above[path] == others[path] for path in above.keys() & others.keys())


def _inner(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: spec for key, spec in value.items() if key != "_name"}


def _flats(
    entries: Sequence[tuple[str, Any]], chosen: Mapping[str, Any], every: bool = False
) -> Iterator[dict[str, Any]]:
    """Flat parameters in the order of the space: what is chosen, with all that the nested choices among it may bring.

    Args:
        entries: of a space, key paths and what NNI is told of them.
        chosen: values by key path; others are left out.
        every: leave none out, and vary what is not chosen.
    """
    if not entries:
        yield {}
        return
    (path, spec), *rest = entries
    if path not in chosen and not every:
        yield from _flats(rest, chosen)
        return
    for value in (chosen[path],) if path in chosen else _values(spec):
        inner: dict[str, Any] = {}
        if spec["_type"] == "choice" and is_nested(spec["_value"]):
            inner = next(_inner(one) for one in spec["_value"] if one["_name"] == value)
        for below in _flats(list(inner.items()), chosen, every=True):
            for after in _flats(rest, chosen, every):
                yield {path: value, **below, **after}


def _values(spec: Mapping[str, Any]) -> Iterator[Any]:
    kind, values = spec["_type"], spec["_value"]
    if kind == "choice":
        yield from ([value["_name"] for value in values] if is_nested(values) else values)
    elif kind == "randint":
        yield from (values[0], values[1] - 1)
    elif "normal" in kind:
        middle = math.exp(values[0]) if "log" in kind else values[0]
        yield _on_grid(middle, values)
    else:
        yield from (_on_grid(value, values) for value in values[:2])


def _on_grid(value: float, values: list[Any]) -> float:
    """As NNI rounds: to a multiple of the step, within the bounds."""
    if len(values) < 3:
        return value
    rounded = round(value / values[2]) * values[2]
    return min(max(rounded, values[0]), values[1]) if values[0] < values[1] else rounded
