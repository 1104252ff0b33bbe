"""Whether a network has what NNI's config lists name: modules, types, targets, granularities.

NNI passes over most names that it does not find, so that a layer with a typo in its name is pruned although the config
excludes it, or fails without a word on the entry.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from nni.compression.base.config import select_modules_by_config
from nni.compression.base.setting import PruningSetting, QuantizationSetting
from torch import Tensor, nn

from zskd_nni.compression.nni_config import SELECTION_KEYS, Kind, modern_config_list
from zskd_nni.models.shared_modules import check_not_wrapped
from zskd_nni.runtime.errors import UserError

_logger = logging.getLogger(__name__)
_OF_NAMES = ("op_names", "exclude_op_names")
_OF_TYPES = ("op_types", "exclude_op_types")
_OF_PATTERNS = ("op_names_re", "exclude_op_names_re")
_REGISTRIES = {"pruning": PruningSetting.registry, "quantization": QuantizationSetting.registry}
_TARGETS = ("weight", "bias", "_input_", "_output_")


def checked_config_list(network: nn.Module, config_list: list[dict[str, Any]], kind: Kind) -> list[dict[str, Any]]:
    """A config list in the keys of NNI 3, every name in it checked against the network.

    A type of ``torch.nn`` that the network has none of is only warned about: lists are often written for many networks.

    Args:
        network: not wrapped by a compressor.
        config_list: the user's, in the keys of NNI 2 or NNI 3.
        kind: for a pruner or a quantizer.

    Raises:
        UserError: an unknown name in any key that selects modules or targets, with the nearest one; a pattern that
            matches nothing; a granularity that fits no parameter; an entry that selects no module.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 2))
        >>> checked_config_list(network, [{"op_types": ["Linaer"], "sparse_ratio": 0.5}], "pruning")
        Traceback (most recent call last):
        zskd_nni.runtime.errors.UserError: entry 0 of the pruning config names 'Linaer' in op_types,
            which the model has not got; the nearest is 'Linear'
    """
    check_not_wrapped(network)
    modern = modern_config_list(config_list, kind)
    for number, entry in enumerate(config_list):
        check_words(entry, f"compression.{kind}.config_list.{number}")
    names = check_module_names(network, config_list, kind)
    places = [number for number, entry in enumerate(config_list) if not entry.get("exclude")]
    for number, entry in zip(places, modern, strict=True):
        _check_targets(network, entry, kind, f"entry {number} of the {kind} config", names)
    return modern


def check_module_names(network: nn.Module, config_list: list[dict[str, Any]], kind: str) -> list[str]:
    """Refuse names, types and patterns of modules that a network does not have.

    Args:
        network: not wrapped by a compressor.
        config_list: of any kind; its keys that select modules hold lists of words.
        kind: for messages.

    Returns:
        The names of the network's modules.

    Raises:
        UserError: an unknown name, with the nearest one.
    """
    names = [name for name, _ in network.named_modules(remove_duplicate=False) if name]
    # A head that is set to None, as after shrinking, is no module any more, but no typo either.
    removed = [
        f"{path}.{child}" if path else child
        for path, module in network.named_modules()
        for child, value in module._modules.items()
        if value is None
    ]
    types = {type(module).__name__: type(module) for module in network.modules()}
    for number, entry in enumerate(config_list):
        where = f"entry {number} of the {kind} config"
        for key, name in _words(entry, _OF_NAMES):
            if name not in names and not (name in removed and key.startswith("exclude")):
                raise UserError(_unknown(where, key, name, names))
        for key, name in _words(entry, _OF_TYPES):
            if name not in types:
                _check_type(where, key, name, types, entry)
        for key, pattern in _words(entry, _OF_PATTERNS):
            _check_pattern(where, key, pattern, [*names, *removed])
        for key, part in _words(entry, ("op_partial_names",)):
            if not any(part in name for name in names):
                raise UserError(_unknown(where, key, part, names))
        _check_fuse_names(where, entry.get("fuse_names"), names)
    return names


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The name among ``known`` that is most like ``name``; that without a wrapper's prefix if there is one."""
    known = list(known)
    for prefix in ("module.", "_orig_mod.", "model."):
        if name.removeprefix(prefix) in known:
            return name.removeprefix(prefix)
    lower = {each.lower(): each for each in reversed(known)}
    near = difflib.get_close_matches(name.lower(), lower, 1, 0.0)
    return lower[near[0]] if near else None


def check_words(entry: dict[str, Any], where: str) -> None:
    """The form of the keys that hold names; NNI iterates over whatever it gets."""
    for key in (*SELECTION_KEYS, "op_partial_names", "target_names"):
        value = entry.get(key, [])
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
            raise UserError(f"{where}.{key} must be a list of words, not {value!r}.")
        for pattern in value if key.endswith("_re") else ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{where}.{key}: {pattern!r} is no regular expression ({error}).") from error
    settings = entry.get("target_settings", {})
    if not isinstance(settings, dict) or not all(isinstance(setting, dict) for setting in settings.values()):
        raise UserError(f"{where}.target_settings must map targets such as weight to settings, not {settings!r}.")


def _words(entry: dict[str, Any], keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    for key in keys:
        value = entry.get(key) or ()
        for word in value:
            yield key, word


def _unknown(where: str, key: str, name: str, known: Iterable[str]) -> str:
    near = nearest(name, known)
    hint = f"; the nearest is {near!r}" if near is not None else ""
    return f"{where} names {name!r} in {key}, which the model has not got{hint}"


def _check_type(where: str, key: str, name: str, types: dict[str, type], entry: dict[str, Any]) -> None:
    found: Any = getattr(nn, name, None)
    real = inspect.isclass(found) and issubclass(found, nn.Module)
    # NNI asks for the very name of a class: a Conv2d does not stand for those that are derived from it.
    derived = sorted(each for each, kind in types.items() if real and issubclass(kind, found))
    message = _unknown(where, key, name, sorted(types))
    if name == "default":  # of NNI 2
        kinds = sorted(each for each, kind in types.items() if issubclass(kind, nn.Linear | nn.Conv1d | nn.Conv2d))
        message = f"{where} names 'default' in {key}, which NNI 3 does not know; name the types: {', '.join(kinds)}"
    if derived:
        message = f"{where} names {name!r} in {key}; the model has only classes derived from it: {', '.join(derived)}"
    others = [each for _, each in _words(entry, (key,)) if each in types]
    if not real or (not others and key == "op_types"):
        raise UserError(message)
    _logger.warning("%s, so that this type is passed over.", message)


def _check_pattern(where: str, key: str, pattern: str, names: list[str]) -> None:
    if not any(re.match(pattern, name) for name in names):
        near = nearest(re.sub(r"[\\^$.*+?()\[\]|]", "", pattern), names)
        raise UserError(
            f"{where}: {key} has the pattern {pattern!r}, which matches the start of no module's name; the nearest "
            f"name is {near!r}"
        )


def _check_fuse_names(where: str, folds: Any, names: list[str]) -> None:
    for fold in folds if isinstance(folds, list | tuple) else ():
        for name in fold if isinstance(fold, list | tuple) else ():
            if isinstance(name, str) and name not in names:
                raise UserError(_unknown(where, "fuse_names", name, names))


def _check_targets(network: nn.Module, modern: dict[str, Any], kind: Kind, where: str, names: list[str]) -> None:
    """The targets of one entry, for every module that it selects."""
    settings = modern.get("target_settings") or {}
    for setting in (modern, *settings.values()) if kind == "quantization" else ():
        dtype = setting.get("quant_dtype")
        if isinstance(dtype, str) and not re.fullmatch(r"u?int[1-9]\d?", dtype):
            raise UserError(f"{where}: quant_dtype is int or uint with a number of bits, such as int8, not {dtype!r}")
    targets = [name for _, name in _words(modern, ("target_names",))]
    selected = select_modules_by_config(network, modern)[0]
    if not selected:
        shown = {key: value for key, value in modern.items() if "op_" in key}
        raise UserError(f"{where} selects no module of the model by {shown}; name others")
    for path, module in selected.items():
        for target in (*targets, *settings):
            _check_target(f"{where} names {target!r} as a target", path, module, target, kind)
        defaults = _REGISTRIES[kind].get(type(module).__name__, {})
        for target in targets or defaults:
            own = settings.get(target, settings.get(_side(target), {}))
            # A shortcut reaches the targets that have such a setting by default: a pruned bias has none.
            shortcut = modern.get("granularity") if "granularity" in defaults.get(_side(target), {}) else None
            value = own.get("granularity", shortcut) if isinstance(own, dict) else None
            _check_granularity(where, path, module, target, value)
    for target, setting in settings.items():
        _check_align(network, where, setting, names)
        if targets and target not in targets and _side(target) not in map(_side, targets):
            near = nearest(str(target), targets)
            raise UserError(
                f"{where} has target_settings for {target!r}, which target_names does not list; the nearest there is "
                f"{near!r}"
            )
    _check_align(network, where, modern, names)


def _side(target: str) -> str:
    """``_input_`` of ``_input_0``: NNI's name for the first input, and of the settings of every input."""
    return re.sub(r"\d+$", "", target)


def _check_align(network: nn.Module, where: str, setting: Any, names: list[str]) -> None:
    align = setting.get("align") if isinstance(setting, dict) else None
    if not isinstance(align, dict):
        return
    name, target = align.get("module_name"), align.get("target_name")
    if isinstance(name, str):
        if name not in names:
            raise UserError(_unknown(where, "align.module_name", name, names))
        if isinstance(target, str) and not target.startswith("_"):
            own = [each for each, _ in network.get_submodule(name).named_parameters(recurse=False)]
            if target not in own:
                raise UserError(_unknown(where, f"align.target_name of {name}", target, own))


def _check_target(what: str, path: str, module: nn.Module, target: str, kind: Kind) -> None:
    """One target of one module."""
    shown = f"{path} ({type(module).__name__})"
    side = next((prefix for prefix in ("_input_", "_output_") if target.startswith(prefix)), None)
    if side is None:
        known = [name for name in ("weight", "bias") if hasattr(module, name)] + ["_input_", "_output_"]
        known += [name for name, _ in module.named_parameters(recurse=False) if name not in known]
        if target not in known:
            raise UserError(f"{what}, which {shown} has not got; the nearest is {nearest(target, known)!r}")
        return
    place = target.removeprefix(side)
    arguments = [*inspect.signature(type(module).forward).parameters][1:]
    if place in arguments and side == "_input_":
        right = f"{side}{arguments.index(place)}"
        raise UserError(f"{what}, but NNI counts the inputs of {shown}; write {right!r}")
    if not place:
        return
    # The modules that NNI knows by itself have one output.
    count = len(arguments) if side == "_input_" else 1 if type(module).__name__ in _REGISTRIES[kind] else None
    if not place.isdigit():
        right = side if count == 1 else f"{side}0"
        raise UserError(f"{what}, which {shown} has not got; the nearest is {right!r}")
    if count is not None and int(place) >= count:
        raise UserError(f"{what}, but {shown} has {count} {side.strip('_')}{'s' * (count > 1)}; write '{side}0'")


def _check_granularity(where: str, path: str, module: nn.Module, target: str, value: Any) -> None:
    """Whether a granularity divides a parameter; of activations only the form is known here."""
    if value is None or value == "default":
        return
    activation = target.startswith("_")
    words = ("per_channel",) if activation else ("out_channel", "in_channel")
    what = f"{target} of {path}"
    if isinstance(value, str) and value not in words:
        raise UserError(
            f"{where} gives {what} the granularity {value!r}; it may be {', '.join(words)}, default or a list of sizes "
            f"such as [1, -1, -1, -1]"
        )
    parameter = None if activation else getattr(module, target, None)
    shape = list(parameter.shape) if isinstance(parameter, Tensor) else None
    try:
        sizes = block_sizes(value, len(shape) if shape is not None else None)
    except ValueError as error:
        whole = "" if shape is None else f"; {[1, *[-1] * (len(shape) - 1)]} would be its output channels"
        of = "" if shape is None else f", which has the shape {shape}"
        raise UserError(f"{where}: the granularity {value!r} of {what}{of}, {error}{whole}") from None
    if shape is None:
        if not isinstance(value, str) and len(sizes) > 1 and sizes[0] not in (1, -1):
            raise UserError(
                f"{where}: the granularity {value!r} of {what} makes blocks along the batch, its first dimension; "
                f"write -1 or 1 there"
            )
        return
    for dim, (size, length) in enumerate(zip(sizes, shape, strict=True)):
        if size != -1 and length % size:
            near = min((each for each in range(1, length + 1) if length % each == 0), key=lambda each: abs(each - size))
            raise UserError(
                f"{where}: the granularity {value!r} makes blocks of {size} along dimension {dim} of {what}, which has "
                f"the shape {shape} and cannot be divided so; {near} would divide it"
            )


def block_sizes(granularity: Any, dimensions: int | None = None) -> list[int]:
    """NNI's block sizes of a granularity: one for each dimension, -1 where a block spans all of it.

    Args:
        granularity: a word, a list of sizes, or ``[sizes, "front" or "back", filling]``.
        dimensions: to fill up to, as NNI does: with 1 in front of a list, with -1 behind a word.

    Raises:
        ValueError: no granularity of NNI, or more sizes than dimensions.

    Example:
        >>> block_sizes([4, 4], 4), block_sizes("in_channel", 4)
        ([1, 1, 4, 4], [-1, 1, -1, -1])
    """
    side, filling, sizes = "front", 1, granularity
    if isinstance(granularity, str):
        sizes, side, filling = {"out_channel": [1]}.get(granularity, [-1, 1]), "back", -1
    elif isinstance(granularity, list | tuple) and granularity and isinstance(granularity[0], list | tuple):
        sizes = granularity[0]
        side = granularity[1] if len(granularity) > 1 else "front"
        filling = granularity[2] if len(granularity) > 2 else 1 if side == "front" else -1
    numbers: list[Any] = [*sizes, filling] if isinstance(sizes, list | tuple) and sizes else [None]
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in numbers)
    if not whole or side not in ("front", "back") or any(size != -1 and size < 1 for size in numbers):
        raise ValueError(
            "is neither a word nor a list of block sizes, one for each dimension, with -1 for a whole dimension"
        )
    if dimensions is not None and len(sizes) > dimensions:
        raise ValueError(f"has {len(sizes)} sizes for {dimensions} dimensions")
    padding = [filling] * (0 if dimensions is None else dimensions - len(sizes))
    return [*padding, *sizes] if side == "front" else [*sizes, *padding]
