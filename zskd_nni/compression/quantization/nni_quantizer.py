"""NNI's quantizers: which there are, their config lists completed for a network, and their refusals as one sentence."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Container, Sequence
from typing import Annotated, Any

import torch
from nni.compression import quantization as nni_quantization
from nni.compression.base.compressor import Pruner, Quantizer
from nni.compression.base.config import select_modules_by_config
from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

from zskd_nni.compression.config_names import checked_config_list
from zskd_nni.compression.evaluator import DataFreeEvaluator
from zskd_nni.compression.nni_messages import refusals_as_sentences
from zskd_nni.compression.quantization.bn_folding import batch_norm_folds
from zskd_nni.compression.quantization.calibration import Calibration, plain_calibration
from zskd_nni.models.shared_modules import called_paths
from zskd_nni.models.teacher import Teacher
from zskd_nni.recipes.compression_config import QuantizationConfig
from zskd_nni.runtime.errors import UserError

_SHORT_NAMES = {
    "ptq": "PtqQuantizer",
    "qat": "QATQuantizer",
    "lsq": "LsqQuantizer",
    "lsq_plus": "LsqPlusQuantizer",
    "dorefa": "DoReFaQuantizer",
    "bnn": "BNNQuantizer",
    "LSQQuantizer": "LsqQuantizer",
    "LSQPlusQuantizer": "LsqPlusQuantizer",
}
# They only round weights and activations, so that ONNX has operators for the result; PTQ can replace them.
ROUNDING_QUANTIZERS = ("PtqQuantizer", "QATQuantizer", "LsqQuantizer", "LsqPlusQuantizer")
QUANTIZERS: dict[str, type[Quantizer]] = {
    name: getattr(nni_quantization, name) for name in (*ROUNDING_QUANTIZERS, "DoReFaQuantizer", "BNNQuantizer")
}

_FOLDS = TypeAdapter(list[Annotated[tuple[str, ...], Field(min_length=2, max_length=3)]])


def quantizer_class_name(name: str) -> str:
    """NNI's class name for a class name or a short name.

    Raises:
        UserError: names the nearest.
    """
    name = _SHORT_NAMES.get(name, name)
    if name not in QUANTIZERS:
        names = [*QUANTIZERS, *_SHORT_NAMES]
        near = _SHORT_NAMES.get(name.lower()) or difflib.get_close_matches(name, names, 1, 0.0)[0]
        raise UserError(
            f"compression.quantization.quantizer: NNI has no quantizer {name!r}; the nearest is {near!r}. "
            f"There are {', '.join(QUANTIZERS)}."
        )
    return name


def folds_of(config_list: list[dict]) -> list[tuple[str, ...]]:
    """The folds that a config list names."""
    return [tuple(names) for config in config_list for names in config.get("fuse_names", ())]


def quantizer_config_list(
    network: nn.Module, config: QuantizationConfig, teacher: Teacher, masked: Container[str] = ()
) -> list[dict]:
    """NNI's config list, in the keys of NNI 3, with the folds that the config names or asks to find.

    Args:
        network: what is quantized, unwrapped.
        config: config list and folds.
        teacher: knows the input.
        masked: modules under a pruner's masks in the same training. NNI cannot fold a masked BatchNorm, so such folds
            are left out.
    """
    dummy = teacher.example_input().to(next(network.parameters()).device)
    called = called_paths(network, dummy)
    folds = [tuple(names) for names in config.fuse_names]
    if config.fuse_batch_norm:
        with refusals_as_sentences(f"NNI's {config.quantizer}"):
            found = batch_norm_folds(network, with_fuse_names(network, config.config_list, folds), dummy)
        folds.extend(names for names in found if _can_fold(network, names, masked))
    return [_without_uncalled(network, entry, called) for entry in with_fuse_names(network, config.config_list, folds)]


def _can_fold(network: nn.Module, names: tuple[str, ...], masked: Container[str]) -> bool:
    # NNI folds the shift of the normalisation into the layer's bias, which a masked layer without one does not get.
    without_bias = names[0] in masked and getattr(network.get_submodule(names[0]), "bias", None) is None
    return not without_bias and not any(name in masked for name in names[1:])


def _without_uncalled(network: nn.Module, config: dict, called: set[str]) -> dict:
    """The config without layers that ``forward`` never calls in ``eval()``, such as an auxiliary head.

    NNI fails over them.
    """
    selected = select_modules_by_config(network, config)[0]
    uncalled = [name for name in selected if name not in called and [*selected[name].parameters(recurse=False)]]
    for name in uncalled:
        if name in config.get("op_names", ()):
            raise UserError(
                f"the quantization config names {name!r}, which forward never calls when the network is evaluated: "
                "there is nothing to calibrate it on; leave it out"
            )
    return {**config, "exclude_op_names": [*config.get("exclude_op_names", ()), *uncalled]} if uncalled else config


def with_fuse_names(model: nn.Module, config_list: list[dict], fuse_names: Sequence[Sequence[str]] = ()) -> list[dict]:
    """The config list, in the keys of NNI 3, with each of ``fuse_names`` in the entry that selects its first module.

    Raises:
        UserError: no entry selects the first module of a fold, or a key is unknown or has a wrong value.
    """
    result = checked_config_list(model, config_list, "quantization")
    for number, config in enumerate(result):
        if "fuse_names" in config:
            config["fuse_names"] = _checked_folds(config["fuse_names"], f"config_list.{number}.fuse_names")
    for names in _checked_folds(fuse_names, "fuse_names"):
        homes = [config for config in result if names[0] in select_modules_by_config(model, config)[0]]
        if not homes:
            raise UserError(f"fuse_names: no config of config_list selects {names[0]!r}, the first of {list(names)}.")
        # Where several entries select a module, NNI folds a ReLU only by an entry that names the output.
        with_output = [config for config in homes if "_output_" in config.get("target_names", ())]
        home = (with_output or homes)[0] if len(names) > 2 else homes[0]
        home["fuse_names"] = [*home.get("fuse_names", []), names]
    return result


def _checked_folds(folds: Any, key: str) -> list[tuple[str, ...]]:
    try:
        return _FOLDS.validate_python(folds)
    except ValidationError as error:
        raise UserError(
            f"compression.quantization.{key} must list folds of 2 or 3 modules such as [conv1, bn1, relu1], not "
            f"{error.errors()[0]['input']!r}."
        ) from error


def make_quantizer(
    model: nn.Module,
    name: str,
    config_list: list[dict],
    evaluator: DataFreeEvaluator,
    arguments: dict[str, Any],
    pruner: Pruner | None = None,
) -> Quantizer:
    """NNI's quantizer around ``model``, or on top of the pruner that is around it.

    LSQ and LSQ+ start with the scales that fit the calibration set. NNI starts them with 0.01 for every tensor, and
    LSQ+ with a zero point that leaves a signed type only its negative numbers.

    Raises:
        UserError: NNI refuses the config or the arguments.
    """
    scheme = {"LsqQuantizer": "symmetric", "LsqPlusQuantizer": "affine"}.get(name)
    ranges = calibrate(model, name, config_list, evaluator, scheme) if scheme else None
    with refusals_as_sentences(f"NNI's {name}"):
        if pruner is None:
            quantizer = QUANTIZERS[name](model, config_list, evaluator, **arguments)
        else:
            quantizer = QUANTIZERS[name].from_compressor(pruner, config_list, **arguments)
    if ranges is not None:
        _start_with(quantizer, ranges)
    return quantizer


def calibrate(
    model: nn.Module, name: str, config_list: list[dict], evaluator: DataFreeEvaluator, scheme: str = "affine"
) -> Calibration:
    """The ranges of ``model`` on the evaluator's calibration set, read by PTQ on a copy.

    Raises:
        UserError: NNI cannot calibrate what the config asks for, such as a granularity that fits no tensor. The message
            names the quantizer ``name``.
    """
    config_list = copy.deepcopy(config_list)
    for config in config_list:
        config.setdefault("quant_dtype", "int8")
        for setting in (config, *config.get("target_settings", {}).values()):
            setting["quant_scheme"] = scheme
    quantizer = make_quantizer(copy.deepcopy(model), "PtqQuantizer", config_list, evaluator, {})
    with refusals_as_sentences(f"NNI's {name}"):
        quantizer.compress(0, None)
    quantizer.unwrap_model()
    return plain_calibration(quantizer.get_calibration_config())


def _start_with(quantizer: Any, ranges: Calibration) -> None:
    """Give LSQ or LSQ+ the scales that fit ``ranges``."""
    device = next(weight.device for weight in quantizer.bound_model.parameters() if weight.numel())
    for path, targets in quantizer._target_spaces.items():
        wrapper = quantizer._module_wrappers[path]
        for target, space in targets.items():
            entry = ranges[path][target]
            scale, zero = entry["scale"].to(device), entry["zero_point"].to(device)
            if isinstance(quantizer, nni_quantization.LsqQuantizer):
                # LSQ has no zero point: an unsigned type reaches from 0 to its largest number.
                scale = torch.maximum(entry["tracked_max"].abs(), entry["tracked_min"].abs()).to(device) / space.qmax
                scale = scale.clamp_min(torch.finfo(torch.float32).eps)
                space.zero_point = torch.zeros_like(scale) if space._scaler else torch.tensor(0.0, device=device)
            else:
                learned = nn.Parameter(zero if space._scaler else zero.view(1))
                setattr(wrapper, f"{target}_zero_point", learned)
            # New parameters: those that NNI registers for LSQ+ are on the CPU, wherever the network is.
            setattr(wrapper, f"{target}_scale", nn.Parameter(scale if space._scaler else scale.view(1)))
    quantizer.is_init = True
