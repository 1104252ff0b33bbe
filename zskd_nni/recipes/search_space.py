"""Search spaces over a recipe, in NNI's form: key paths of the recipe, each with ``_type`` and ``_value``.

A choice may be nested, as in NNI. Its values are then mappings with a ``_name``, the value for the key path, and with
further key paths that are searched only together with this choice.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from zskd_nni.recipes.key_paths import apply_changes

# NNI's types; those of numbers take two, and those that begin with q a step besides.
_OF_NUMBERS = ("uniform", "quniform", "loguniform", "qloguniform", "normal", "qnormal", "lognormal", "qlognormal")
TYPES = ("choice", "randint", *_OF_NUMBERS)
_LARGEST_LOGARITHM = 700  # the largest number is about exp(709)


def check_space(space: Any, where: str = "") -> None:
    """Check a search space.

    Args:
        space: as read from YAML.
        where: key path of the choice in which it is nested, for messages.

    Raises:
        ValueError: one sentence that names the key path and what would be right.

    Example:
        >>> check_space({"distillation.temperature": {"_type": "loguniform", "_value": [1.0, 20.0]}})
        >>> check_space({"distillation.temperature": {"_type": "uniform", "_value": [5]}})
        Traceback (most recent call last):
        ValueError: distillation.temperature: uniform takes 2 numbers, not 1
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
    for value in values if is_nested(values) else ():
        if inner := _without_name(value):
            check_space(inner, f"{here}.{value['_name']}")


def _check_numbers(kind: str, values: list[Any], here: str) -> None:
    count = 3 if kind.startswith("q") else 2
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
            raise ValueError(f"{here}: {kind} takes the logarithm of the median, at most {_LARGEST_LOGARITHM}")
    elif values[0] >= values[1]:
        raise ValueError(f"{here}: the lower bound must be less than the upper one, not {values}")
    elif "log" in kind and values[0] <= 0:
        raise ValueError(f"{here}: {kind} needs a positive lower bound, not {values[0]}")
    if kind.startswith("q") and values[2] <= 0:
        raise ValueError(f"{here}: the step must be positive, not {values[2]}")


def is_nested(values: list[Any]) -> bool:
    """Whether NNI takes a choice's values as nested spaces."""
    return all(isinstance(value, Mapping) and "_name" in value for value in values)


def flat_parameters(space: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """NNI's parameters as key paths and values; a nested choice becomes its name and the parameters below it."""
    flat: dict[str, Any] = {}
    for path, value in parameters.items():
        if _is_nested_choice(space[path]):
            flat[path] = value["_name"]
            flat.update(flat_parameters(_inner_space(space[path], value["_name"]), _without_name(value)))
        else:
            # NNI multiplies steps, 3 * 0.1 = 0.30000000000000004
            flat[path] = float(f"{value:.12g}") if isinstance(value, float) else value
    return flat


def with_parameters(source: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a recipe's plain mapping with the values of :func:`flat_parameters` at their key paths.

    Raises:
        ValueError: a path leads nowhere.
    """
    changed = copy.deepcopy(dict(source))
    apply_changes(changed, flat)
    return changed


@dataclass(frozen=True)
class Dimension:
    """One key path that is searched, with values to check before the search.

    Attributes:
        path: of the recipe.
        within: the choices in which it is nested, outermost first, as key paths and values.
        kind: NNI's ``_type``.
        values: every choice, both ends of a range, the median of a normal distribution.
    """

    path: str
    within: tuple[tuple[str, Any], ...]
    kind: str
    values: tuple[Any, ...]


def dimensions(space: Mapping[str, Any], within: tuple[tuple[str, Any], ...] = ()) -> Iterator[Dimension]:
    """All dimensions of a space; nested ones after the choice in which they are nested."""
    for path, spec in space.items():
        values = tuple(_values(spec))
        yield Dimension(path, within, spec["_type"], values)
        for value in values if _is_nested_choice(spec) else ():
            yield from dimensions(_inner_space(spec, value), (*within, (path, value)))


def corners(space: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Every choice and both ends of every range, each alone.

    Yields:
        The key path, the value, and the flat parameters that hold it: those of the choices in which it is nested, and
        the first of all that are nested in it.
    """
    for one in dimensions(space):
        for value in one.values:
            yield one.path, value, next(_assignments(space, {**dict(one.within), one.path: value}))


def pairs(space: Mapping[str, Any]) -> Iterator[tuple[Dimension, Any, Dimension, Iterator[dict[str, Any]]]]:
    """Every value of one dimension with all values of another, for any two that can meet in a trial.

    A normal distribution is never the other one: only its median is tried, from which nothing follows for other values.
    A nested dimension is not paired with the choice in which it is nested; :func:`corners` has them together.

    Yields:
        A dimension, its value, the other dimension, and flat parameters with each value of the other and each of those
        nested in the two.
    """
    for one, other in permutations(dimensions(space), 2):
        if "normal" not in other.kind and _can_meet(one, other):
            outer = {**dict(one.within), **dict(other.within)}
            for value in one.values:
                yield one, value, other, _with_each(space, {**outer, one.path: value}, other)


def _with_each(space: Mapping[str, Any], chosen: Mapping[str, Any], other: Dimension) -> Iterator[dict[str, Any]]:
    for value in other.values:
        yield from _assignments(space, {**chosen, other.path: value})


def _can_meet(one: Dimension, other: Dimension) -> bool:
    """Whether one trial can have both, and neither is nested in the other."""
    outer, others = dict(one.within), dict(other.within)
    nested = one.path in (other.path, *others) or other.path in outer
    return not nested and all(outer[path] == others[path] for path in outer.keys() & others.keys())


def _is_nested_choice(spec: Mapping[str, Any]) -> bool:
    return spec["_type"] == "choice" and is_nested(spec["_value"])


def _inner_space(spec: Mapping[str, Any], name: Any) -> dict[str, Any]:
    """The space below the nested choice of a name."""
    return _without_name(next(value for value in spec["_value"] if value["_name"] == name))


def _without_name(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: spec for key, spec in value.items() if key != "_name"}


def _assignments(space: Mapping[str, Any], chosen: Mapping[str, Any], every: bool = False) -> Iterator[dict[str, Any]]:
    """Flat parameters in the order of the space: the chosen values, with all that the nested choices among them bring.

    Args:
        space: a search space.
        chosen: values by key path; other key paths are left out.
        every: leave no key path out, and vary those that are not chosen.
    """
    if not space:
        yield {}
        return
    path, spec = next(iter(space.items()))
    rest = {key: space[key] for key in list(space)[1:]}
    if path not in chosen and not every:
        yield from _assignments(rest, chosen)
        return
    for value in (chosen[path],) if path in chosen else _values(spec):
        inner = _inner_space(spec, value) if _is_nested_choice(spec) else {}
        for below in _assignments(inner, chosen, every=True):
            for after in _assignments(rest, chosen, every):
                yield {path: value, **below, **after}


def _values(spec: Mapping[str, Any]) -> Iterator[Any]:
    kind, values = spec["_type"], spec["_value"]
    if kind == "choice":
        yield from ([value["_name"] for value in values] if is_nested(values) else values)
    elif kind == "randint":
        yield from (values[0], values[1] - 1)
    elif "normal" in kind:
        yield _on_grid(math.exp(values[0]) if "log" in kind else values[0], values)
    else:
        yield from (_on_grid(value, values) for value in values[:2])


def _on_grid(value: float, values: list[Any]) -> float:
    """Rounded as NNI rounds: to a multiple of the step, within the bounds."""
    if len(values) < 3:
        return value
    rounded = round(value / values[2]) * values[2]
    return min(max(rounded, values[0]), values[1]) if values[0] < values[1] else rounded
