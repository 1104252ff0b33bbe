"""Checks of settings: plain values against settings classes, and fields against their bounds."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


@functools.lru_cache(maxsize=64)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)  # making one takes milliseconds


def build_settings(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """An instance of a settings dataclass or model from plain values.

    Args:
        kind: the class.
        values: as read from YAML.
        where: key path, for messages.

    Raises:
        ValueError: one sentence that names the key path, what is wrong and what would be right.
    """
    if problem := boolean_for_a_number(kind, values, where):
        raise ValueError(problem)
    try:
        return _adapter(cast(Any, kind)).validate_python(dict(values))
    except ValidationError as error:
        raise ValueError(describe_validation(error, kind, where)) from error


def boolean_for_a_number(kind: Any, values: Any, where: str = "") -> str | None:
    """One sentence about the first ``true`` or ``false`` in the place of a number; pydantic would read 1 or 0.

    Args:
        kind: a settings class, or the annotation of one of its fields.
        values: as read from YAML.
        where: key path, for the message.
    """
    options = _options(kind, through=(Annotated, Union, UnionType))
    if isinstance(values, bool):
        wanted = (int in options or float in options) and bool not in options
        return f"{where}: a number belongs here, not {str(values).lower()}" if wanted else None
    inner: list[tuple[str, Any, Any]] = []
    if isinstance(values, Mapping):
        for option in options:
            types = _field_types(option)
            inner += [(str(key), types[key], value) for key, value in values.items() if key in types]
    elif isinstance(values, Sequence) and not isinstance(values, str):
        kinds = [part for option in options if get_origin(option) in (list, tuple) for part in get_args(option)]
        inner = [(str(number), part, value) for number, value in enumerate(values) for part in kinds[:1]]
    for key, part, value in inner:
        if problem := boolean_for_a_number(part, value, f"{where}.{key}" if where else key):
            return problem
    return None


def describe_validation(error: ValidationError, kind: Any, where: str = "") -> str:
    """The first problem of a pydantic validation as one sentence."""
    problem = error.errors(include_url=False)[0]
    location = [str(part) for part in problem["loc"]]
    path = ".".join(part for part in ([where] if where else []) + location if not _is_type_tag(part))
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return unknown_key(path, location[-1], _keys_at(kind, location[:-1]))
    if problem["type"] in ("missing", "missing_argument"):
        if location[-1].isdigit():  # a list that is too short
            return f"{path.rpartition('.')[0]}: entry {int(location[-1]) + 1} is missing"
        return f"the key {path!r} is missing"
    if problem["type"] == "value_error":
        return ": ".join(filter(None, (path, str(problem["ctx"]["error"]))))
    text = problem["msg"].replace("valid tuple", "list").replace("valid dictionary", "mapping")  # as YAML calls them
    return f"{path}: {text[0].lower()}{text[1:]}, not {problem['input']!r}"


def unknown_key(path: str, key: str, known: Sequence[str]) -> str:
    """One sentence about an unknown key."""
    near = difflib.get_close_matches(key, known, 3, 0.5)
    near.sort(key=lambda each: not each.startswith(key))  # what goes on like it comes first
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
    return f"unknown key {path!r}; {hint}"


def _is_type_tag(part: str) -> bool:
    return "[" in part or part in ("function-after", "function-before")


def _keys_at(kind: Any, path: list[str]) -> list[str]:
    for part in path:
        if part.isdigit() or _is_type_tag(part):
            continue
        kind = _field_types(kind).get(part)
        kind = next((option for option in _options(kind) if _field_types(option)), None)
    return list(_field_types(kind))


def _options(kind: Any, through: tuple[Any, ...] = ()) -> list[Any]:
    """A type and the types in it, however deep; only those in generic types of ``through`` where there are any."""
    inner = get_args(kind) if not through or get_origin(kind) in through else ()
    return [kind, *(option for part in inner for option in _options(part, through))]


def _field_types(kind: Any) -> dict[str, Any]:
    if hasattr(kind, "model_fields"):
        return {(field.alias or name): field.annotation for name, field in kind.model_fields.items()}
    if hasattr(kind, "__dataclass_fields__"):
        hints = get_type_hints(kind)
        return {name: hints[name] for name, field in kind.__dataclass_fields__.items() if field.init}
    return {}


# Ranges of settings: annotations of a dataclass's fields, checked by its ``__post_init__``.


@dataclass(frozen=True)
class Bounds:
    """Which values a field may have: ``Annotated[float, Bounds("must be positive", lambda value: value > 0)]``.

    Attributes:
        sentence: what follows the field's name in the message.
        holds: whether a value is allowed.
    """

    sentence: str
    holds: Callable[[Any], bool]


def one_of(*names: str) -> Bounds:
    """The bounds of a string that is one of ``names``."""
    return Bounds(f"is one of {', '.join(names)}", lambda value: value in names)


def within(low: float, high: float) -> Bounds:
    """The bounds of a number in ``[low, high]``."""
    return Bounds(f"must lie in [{low}, {high}]", lambda value: low <= value <= high)


Positive = Annotated[float, Bounds("must be positive", lambda value: 0 < value < math.inf)]
NotNegative = Annotated[float, Bounds("must not be negative", lambda value: 0 <= value < math.inf)]
Fraction = Annotated[float, within(0, 1)]
Count = Annotated[int, Bounds("must be at least 1", lambda value: value >= 1)]
CountOrZero = Annotated[int, Bounds("must not be negative", lambda value: value >= 0)]


def check_bounds(settings: Any) -> None:
    """Check the fields of a settings dataclass against the :class:`Bounds` in their annotations.

    Raises:
        ValueError: one sentence about the first value that is outside.
    """
    for name, hint in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        for bounds in getattr(hint, "__metadata__", ()):
            if isinstance(bounds, Bounds) and not bounds.holds(value):
                raise ValueError(f"{name} {bounds.sentence}, not {value!r}")


class Settings:
    """Base of settings dataclasses: an unknown key is an error, and so is a value outside its :class:`Bounds`."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        check_bounds(self)
