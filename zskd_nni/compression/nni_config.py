"""NNI's config lists, in the keys of NNI 2 or NNI 3, translated to those of NNI 3.

NNI 3.0 translates the keys of NNI 2 itself, with gaps: its schema refuses the translation of ``total_sparsity`` and
``quant_types``, an entry with ``exclude`` selects nothing, and the schemes of NNI 2's quantizers are unknown. Here all
keys have the meaning of NNI's documentation of their version.
"""

from __future__ import annotations

import difflib
import re
from copy import deepcopy
from typing import Any, Literal

from zskd_nni.runtime.errors import UserError

Kind = Literal["pruning", "quantization"]

SELECTION_KEYS = ("op_types", "op_names", "op_names_re", "exclude_op_types", "exclude_op_names", "exclude_op_names_re")
_TARGETS = ("target_names", "target_settings")
_SETTINGS: dict[Kind, tuple[str, ...]] = {
    "pruning": ("sparse_ratio", "sparse_threshold", "max_sparse_ratio", "min_sparse_ratio", "global_group_id",
                "dependency_group_id", "internal_metric_block", "granularity", "apply_method", "align"),
    "quantization": ("quant_dtype", "quant_scheme", "granularity", "apply_method", "fuse_names"),
}  # fmt: skip
_LEGACY: dict[Kind, tuple[str, ...]] = {
    "pruning": ("sparsity", "sparsity_per_layer", "total_sparsity", "max_sparsity_per_layer"),
    "quantization": ("quant_types", "quant_bits"),
}
_RATIOS = ("sparsity", "sparsity_per_layer", "total_sparsity")
_TARGET_OF = {"input": "_input_", "weight": "weight", "output": "_output_"}
_SCHEME = re.compile(r"(?:(per_tensor|per_channel)_)?(affine|symmetric)")
_TYPE = re.compile(r"(u?int)\d*")


def modern_config_list(config_list: list[dict[str, Any]], kind: Kind) -> list[dict[str, Any]]:
    """A copy of a config list in the keys of NNI 3.

    These keys of NNI 2 are translated, in any entry: ``sparsity``, ``sparsity_per_layer``, ``total_sparsity`` (the
    entry's modules are ranked together), ``max_sparsity_per_layer``, ``op_partial_names``, ``exclude``, ``quant_types``
    with ``quant_bits``, and with them ``quant_dtype: int`` or ``uint`` and ``quant_scheme: per_tensor_affine``,
    ``per_tensor_symmetric``, ``per_channel_affine`` or ``per_channel_symmetric``. As in NNI 3, an ``exclude`` entry
    excludes every module that it names by type or by name.

    Args:
        config_list: NNI's, for a pruner or a quantizer.
        kind: which of the two.

    Raises:
        UserError: a key that neither version knows, or an invalid value of a key of NNI 2.

    Example:
        >>> modern_config_list([{"op_types": ["Conv2d"], "sparsity": 0.5}], "pruning")
        [{'op_types': ['Conv2d'], 'sparse_ratio': 0.5}]
    """
    if not isinstance(config_list, list) or not all(isinstance(config, dict) for config in config_list):
        keys = "'sparse_ratio': 0.5" if kind == "pruning" else "'target_names': ['weight'], 'quant_dtype': 'int8'"
        example = f"[{{'op_types': ['Conv2d'], {keys}}}]"
        raise UserError(f"a {kind} config is a list of dicts such as {example}, not {type(config_list).__name__}")
    kept: list[dict[str, Any]] = []
    excluded: dict[str, list[str]] = {}
    for number, given in enumerate(config_list):
        where = f"entry {number} of the {kind} config"
        _check_keys(given, kind, where)
        config = deepcopy(given)
        if "op_partial_names" in config:
            parts = _strings(config.pop("op_partial_names"), f"{where}: op_partial_names")
            config["op_names_re"] = [*config.get("op_names_re", []), *(f".*{part}.*" for part in parts)]
        if config.pop("exclude", False):
            for key in ("op_types", "op_names", "op_names_re"):
                if names := _strings(config.get(key, []), f"{where}: {key}"):
                    excluded.setdefault(f"exclude_{key}", []).extend(names)
        elif kind == "pruning":
            config = _first_of_each_side(_pruning_entry(config, where, number))
            settings = config.get("target_settings")
            _check_pruning_values(config, where)
            for name, setting in settings.items() if isinstance(settings, dict) else ():
                if isinstance(setting, dict):
                    _check_pruning_values(setting, f"{where}, target_settings.{name}")
            kept.append(config)
        else:
            kept.append(_quantization_entry(config, where))
    if config_list and not kept:
        raise UserError(f"the {kind} config only excludes modules; add an entry that names some")
    for config in kept:
        for key, names in excluded.items():
            config[key] = list(dict.fromkeys([*config.get(key, []), *names]))
    return kept


def _check_keys(config: dict[str, Any], kind: Kind, where: str) -> None:
    known = (*SELECTION_KEYS, *_TARGETS, *_SETTINGS[kind], "op_partial_names", "exclude", *_LEGACY[kind])
    settings = config.get("target_settings")
    places = [(config, known, where)]
    for name, setting in settings.items() if isinstance(settings, dict) else ():
        if isinstance(setting, dict):
            places.append((setting, _SETTINGS[kind], f"{where}, target_settings.{name}"))
    for found, keys, place in places:
        for unknown in (key for key in found if key not in keys):
            modern = [name for name in keys if name not in _LEGACY[kind]]
            near = [match for names in (modern, keys) for match in difflib.get_close_matches(str(unknown), names, 1)]
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(keys)}"
            raise UserError(f"{place}: unknown key {unknown!r}; {hint}")


def _pruning_entry(config: dict[str, Any], where: str, number: int) -> dict[str, Any]:
    given = [key for key in (*_RATIOS, "sparse_ratio", "sparse_threshold") if key in config]
    if len(given) > 1:
        raise UserError(f"{where} gives both {given[0]} and {given[1]}; give one of them")
    if given and given[0] in _RATIOS:
        config["sparse_ratio"] = _ratio(config.pop(given[0]), f"{where}: {given[0]}")
        if given[0] == "total_sparsity":
            config["global_group_id"] = f"total_sparsity of entry {number}"
    if (key := "max_sparsity_per_layer") in config:
        config["max_sparse_ratio"] = _ratio(config.pop(key), f"{where}: {key}", least=1e-9)
    return config


def _first_of_each_side(config: dict[str, Any]) -> dict[str, Any]:
    """``_input_0`` as ``_input_``, which NNI's pruners know it by."""
    short = {"_input_0": "_input_", "_output_0": "_output_"}
    if isinstance(names := config.get("target_names"), list | tuple):
        config["target_names"] = [short.get(name, name) if isinstance(name, str) else name for name in names]
    if isinstance(settings := config.get("target_settings"), dict):
        config["target_settings"] = {short.get(name, name): setting for name, setting in settings.items()}
    return config


def _check_pruning_values(setting: dict[str, Any], where: str) -> None:
    """Refuse values that NNI refuses without naming the entry; whole numbers become floats."""
    for key in ("sparse_ratio", "max_sparse_ratio", "min_sparse_ratio"):
        if setting.get(key) is not None:
            setting[key] = _ratio(setting[key], f"{where}: {key}", least=1e-9 if key == "max_sparse_ratio" else 0.0)
    least, most = setting.get("min_sparse_ratio"), setting.get("max_sparse_ratio")
    if least is not None and most is not None and least > most:
        raise UserError(f"{where}: min_sparse_ratio {least} is larger than max_sparse_ratio {most}")
    threshold = setting.get("sparse_threshold")
    if isinstance(threshold, int) and not isinstance(threshold, bool):
        setting["sparse_threshold"] = float(threshold)
    elif threshold is not None and not isinstance(threshold, float):
        raise UserError(f"{where}: sparse_threshold must be a number, not {threshold!r}")
    block = setting.get("internal_metric_block")
    if block is not None and (isinstance(block, bool) or not isinstance(block, int) or block < 1):
        raise UserError(f"{where}: internal_metric_block must be a whole number of blocks, not {block!r}")
    for key in ("global_group_id", "dependency_group_id"):
        if not isinstance(setting.get(key, ""), int | str | type(None)):
            raise UserError(f"{where}: {key} must be a number or a word, not {setting[key]!r}")
    if setting.get("apply_method") == "add":
        raise UserError(
            f"{where}: apply_method 'add' adds -1000 to what is masked, which is meant for attention scores; to prune "
            f"weights write 'mul', or leave it out"
        )


def _quantization_entry(config: dict[str, Any], where: str) -> dict[str, Any]:
    nested = config.get("target_settings")
    named = nested.items() if isinstance(nested, dict) else ()
    for place, given in ((where, config), *((f"{where}, target_settings.{name}", own) for name, own in named)):
        if isinstance(given, dict) and given.get("apply_method") == "bypass":
            raise UserError(
                f"{place}: apply_method 'bypass' has no effect in NNI, whose quantizers set their own; leave the "
                f"target out of target_names if it must not be quantized"
            )
    if "quant_types" not in config:
        if "quant_bits" in config:
            raise UserError(f"{where} has quant_bits without quant_types; name them, such as quant_types: [weight]")
        return config
    types = _strings(config.pop("quant_types"), f"{where}: quant_types")
    unknown = next((name for name in types if name not in _TARGET_OF), None)
    if unknown is not None or not types:
        raise UserError(f"{where}: quant_types are {', '.join(_TARGET_OF)}, not {unknown or 'none'}")
    bits, dtype, scheme = (config.pop(key, None) for key in ("quant_bits", "quant_dtype", "quant_scheme"))
    settings = dict(config.get("target_settings", {}))
    for name in types:
        width = _of_type(bits, name)
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= 32:
            raise UserError(f"{where}: quant_bits must give {name} a number of bits from 1 to 32, not {width!r}")
        kind = _TYPE.fullmatch(str(_of_type(dtype, name) or "int"))
        if kind is None:
            raise UserError(f"{where}: quant_dtype is int or uint, not {_of_type(dtype, name)!r}")
        setting: dict[str, Any] = {"quant_dtype": f"{kind[1]}{width}"}
        wanted = _of_type(scheme, name)
        if wanted is not None:
            parts = _SCHEME.fullmatch(str(wanted))
            if parts is None:
                raise UserError(
                    f"{where}: quant_scheme is affine or symmetric, with per_tensor_ or per_channel_ in front of it if "
                    f"you like, not {wanted!r}"
                )
            setting["quant_scheme"] = parts[2]
            if parts[1] == "per_channel":
                setting["granularity"] = "out_channel" if name == "weight" else "per_channel"
        settings[_TARGET_OF[name]] = {**setting, **settings.get(_TARGET_OF[name], {})}
    # NNI's schema wants the type beside the targets too, where it is a default that they override.
    config.update(quant_dtype=None, target_names=[_TARGET_OF[name] for name in types], target_settings=settings)
    return config


def _of_type(value: Any, name: str) -> Any:
    """One value for all types, or a mapping by type."""
    return value.get(name) if isinstance(value, dict) else value


def _ratio(value: Any, where: str, least: float = 0.0) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 1:
        raise UserError(f"{where} must be a number from 0 to 1, not {value!r}")
    return float(value)


def _strings(value: Any, where: str) -> list[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
        raise UserError(f"{where} must be a list of words, not {value!r}")
    return list(value)
