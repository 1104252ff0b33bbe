"""Search spaces over a recipe, in NNI's form: key paths of the recipe, each with ``_type`` and ``_value``.

A choice may be nested as NNI's are: its values are mappings with a ``_name``, which is put at the path, and further key
paths of the recipe that are searched only with that choice.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from zskd_nni.key_paths import set_at

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
        inner = {key: spec for key, spec in value.items() if key != "_name"}
        if inner:
            check_space(inner, f"{here}.{value['_name']}")


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


def corners(space: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """What can be tried beforehand: every choice, and both ends of every range, each alone.

    Yields:
        The key path, the value, and the flat parameters it comes with (those of the choice it is nested in).
    """
    for path, spec in space.items():
        values = spec["_value"]
        if spec["_type"] == "choice" and is_nested(values):
            for value in values:
                inner = {key: one for key, one in value.items() if key != "_name"}
                first = {key: next(_values(one)) for key, one in inner.items()}
                yield path, value["_name"], {path: value["_name"], **first}
                for nested, corner, flat in corners(inner):
                    yield nested, corner, {path: value["_name"], **first, **flat}
        else:
            for value in _values(spec):
                yield path, value, {path: value}


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
