"""NNI's quantizers without data: calibration and training on a transfer source, and the network they simulate."""

from __future__ import annotations

import contextlib
import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from nni.compression.base.compressor import Compressor, Quantizer
from nni.compression.base.config import select_modules_by_config
from nni.compression.base.target_space import TargetType
from nni.compression.quantization import (
    BNNQuantizer,
    DoReFaQuantizer,
    LsqPlusQuantizer,
    LsqQuantizer,
    PtqQuantizer,
    QATQuantizer,
)
from schema import SchemaError
from torch import Tensor, nn

from zskd_nni.compression.evaluator import DataFreeEvaluator
from zskd_nni.compression.fuse import fused_distiller
from zskd_nni.compression.nni_config import modern_config_list
from zskd_nni.compression.quantization.bn_folding import check_folds
from zskd_nni.models.teacher import first_tensor
from zskd_nni.runtime.errors import UserError

if TYPE_CHECKING:
    from zskd_nni.recipes.compression_config import DistillerConfig

Calibration = dict[str, dict[str, dict[str, Any]]]

QUANTIZERS: dict[str, type[Quantizer]] = {
    "PtqQuantizer": PtqQuantizer,
    "QATQuantizer": QATQuantizer,
    "LsqQuantizer": LsqQuantizer,
    "LsqPlusQuantizer": LsqPlusQuantizer,
    "DoReFaQuantizer": DoReFaQuantizer,
    "BNNQuantizer": BNNQuantizer,
}
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
_SELECTION_KEYS = ("op_types", "op_names", "op_names_re", "exclude_op_types", "exclude_op_names", "exclude_op_names_re")
_PER_TENSOR_KEYS = ("scale", "zero_point", "tracked_max", "tracked_min")


@dataclass(frozen=True)
class Quantization:
    """A student, and how NNI quantizes it.

    Attributes:
        student: the unwrapped student with float weights, in ``eval()``. It computes in floating point;
            :func:`simulated` gives the network that computes as the quantized one.
        quantizer: NNI's class name.
        config_list: NNI's, as it was used.
        calibration: NNI's calibration config ``{module: {target: {scale, zero_point, quant_dtype, ...}}}``.
    """

    student: nn.Module
    quantizer: str
    config_list: list[dict]
    calibration: Calibration

    @property
    def folds(self) -> list[tuple[str, ...]]:
        """Which modules act as one: a convolution or linear layer, its BatchNorm, its ReLU."""
        return folds_of(self.config_list)


class Kept(Protocol):
    """Positions of the channels that a module keeps, in the order of the original."""

    @property
    def inputs(self) -> Tensor:
        """Of what it reads."""
        ...

    @property
    def outputs(self) -> Tensor:
        """Of what it gives."""
        ...


def quantize(
    student: nn.Module,
    quantizer_name: str,
    config_list: list[dict],
    evaluator: DataFreeEvaluator,
    dummy_input: Tensor | None = None,
    fuse_names: Sequence[Sequence[str]] | None = None,
    *,
    max_steps: int | None = None,
    max_epochs: int | None = None,
    temperature: float = 20.0,
    ranges_first: bool = True,
    distiller: DistillerConfig | None = None,
    **options: Any,
) -> Quantization:
    """Quantize ``student`` with one of NNI's quantizers, on the evaluator's images, taught by its teacher.

    ``PtqQuantizer`` takes no step: it reads the ranges off the calibration set. The others train under quantization,
    distilled, for ``max_steps`` or ``max_epochs`` (the evaluator's own steps without either).

    Args:
        student: quantized in place; it comes back unwrapped.
        quantizer_name: NNI's class name, or ``ptq``, ``qat``, ``lsq``, ``lsq_plus``, ``dorefa``, ``bnn``.
        config_list: NNI's quantization config.
        evaluator: images, optimiser, teacher.
        dummy_input: one input, on which the quantized network must answer finitely; the evaluator's by default.
        fuse_names: modules that act as one, such as ``("conv1", "bn1", "relu1")``, for NNI to fold; the same as
            ``fuse_names`` in the config of the first of them.
        max_steps: length of the training.
        max_epochs: the same, in passes over the images.
        temperature: of the distillation.
        ranges_first: LSQ and LSQ+ begin with the scales that fit the calibration set. NNI begins with 0.01 for
            everything, and with a zero point for LSQ+ that leaves a signed type its negative numbers only.
        distiller: another than the logits' own.
        **options: for the quantizer: ``quant_start_step`` (QAT), ``is_bias_correction`` (PTQ).

    Raises:
        UserError: an unknown quantizer, a config that NNI refuses, modules that cannot act as one, a quantized network
            whose answers are not finite.
    """
    name = quantizer_class_name(quantizer_name)
    config_list = with_fuse_names(student, config_list, fuse_names)
    check_folds(student, folds_of(config_list), evaluator.teacher.spec)
    ranges = starting_ranges(student, name, config_list, evaluator) if ranges_first else None
    quantizer = made_quantizer(student, name, config_list, evaluator, options)
    if ranges is not None:
        begin_with(quantizer, ranges)
    if name == "PtqQuantizer":
        top: Any = quantizer
        quantizer.compress(0, None)
    else:
        top = fused_distiller(quantizer, distiller, evaluator.teacher, evaluator, temperature)
        if max_steps is None and max_epochs is None:
            max_steps = evaluator.settings.steps
        top.compress(max_steps, max_epochs)
    calibration = plain_calibration(quantizer.get_calibration_config())
    student.eval()
    probe_input = evaluator.get_dummy_input() if dummy_input is None else dummy_input
    with torch.no_grad():
        answer = first_tensor(student(probe_input.clone()))  # it may change its input in place
    top.unwrap_model()
    if not torch.isfinite(answer).all():
        raise UserError(f"The network quantized by {name} answers with values that are not finite; train it with less.")
    return Quantization(student, name, config_list, calibration)


def simulated(quantization: Quantization) -> nn.Module:
    """A copy of the student that computes as the quantized network, by a fresh quantizer with that calibration.

    Raises:
        UserError: the calibration does not fit the student (shrunken without its calibration: see :func:`sliced`).
    """
    model = copy.deepcopy(quantization.student).eval()
    quantizer = Quantizer(model, quantization.config_list)
    for path, targets in quantization.calibration.items():
        for target, entry in targets.items():
            space = quantizer._target_spaces.get(path, {}).get(target)
            if space is None:
                raise UserError(f"The calibration names {path}.{target}, which the config list does not quantize.")
            device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
            for key in ("scale", "zero_point"):
                value = entry[key]
                _check_channels(space, value, f"{path}.{target}")
                setattr(space, key, None if value is None else value.to(device))
            space.apply_method = _apply_method(quantization.quantizer, space.type)
    return model


def slice_calibration(calibration: Calibration, masks_or_kept_channels: Mapping[str, Any]) -> Calibration:
    """The calibration of the network that is left when channels are removed.

    A scale of a whole tensor stays; of the scales by channel those of the removed channels go.

    Args:
        calibration: NNI's, of the network before it shrank.
        masks_or_kept_channels: by module, either NNI's masks ``{target: mask}``, or the kept positions ``inputs``
            and ``outputs``. What a module is not named for is kept whole.

    Raises:
        UserError: a channel that the calibration does not have.
    """
    result: Calibration = {}
    for path, targets in calibration.items():
        inputs, outputs = _kept_by(masks_or_kept_channels.get(path))
        result[path] = {}
        for target, entry in targets.items():
            axes: dict[int, Tensor | None] = {0: outputs, 1: inputs}
            if target.startswith("_input_"):
                axes = {1: inputs}
            elif target.startswith("_output_"):
                axes = {1: outputs}
            cut = dict(entry)
            for key in _PER_TENSOR_KEYS:
                if isinstance(entry.get(key), Tensor):
                    cut[key] = _cut(entry[key], axes, f"{path}.{target}.{key}")
            result[path][target] = cut
    return result


def sliced(quantization: Quantization, student: nn.Module, masks_or_kept_channels: Mapping[str, Any]) -> Quantization:
    """The quantization of ``student``, which is the quantized one with channels removed.

    The scales stay what they were: shrinking changes no value that is left.

    Args:
        quantization: of the network before it shrank.
        student: what it shrank to, unwrapped.
        masks_or_kept_channels: see :func:`slice_calibration`.

    Raises:
        UserError: the calibration that is left does not fit ``student``.
    """
    left = set(dict(student.named_modules()))
    calibration = slice_calibration(quantization.calibration, masks_or_kept_channels)
    calibration = {path: targets for path, targets in calibration.items() if path in left}
    result = replace(quantization, student=student, calibration=calibration)
    simulated(result)
    return result


def folds_of(config_list: list[dict]) -> list[tuple[str, ...]]:
    """The folds that a config list names."""
    return [tuple(names) for config in config_list for names in config.get("fuse_names", ())]


def quantizer_class_name(name: str) -> str:
    """NNI's class name for ``name``.

    Raises:
        UserError: names the nearest.
    """
    name = _SHORT_NAMES.get(name, name)
    if name not in QUANTIZERS:
        near = (
            _SHORT_NAMES.get(name.lower()) or difflib.get_close_matches(name, [*QUANTIZERS, *_SHORT_NAMES], 1, 0.0)[0]
        )
        raise UserError(
            f"compression.quantization.quantizer: NNI has no quantizer {name!r}; the nearest is {near!r}. "
            f"There are {', '.join(QUANTIZERS)}."
        )
    return name


def with_fuse_names(
    model: nn.Module, config_list: list[dict], fuse_names: Sequence[Sequence[str]] | None = None
) -> list[dict]:
    """The config list, in the keys of NNI 3, with each of ``fuse_names`` as a tuple in its first module's config.

    Raises:
        UserError: no config selects the first module of a fold, or a key is unknown or not what it must be.
    """
    result = modern_config_list(config_list, "quantization")
    for number, config in enumerate(result):
        _check_selection(config, f"compression.quantization.config_list.{number}")
        if "fuse_names" in config:
            config["fuse_names"] = _checked_folds(config["fuse_names"], f"config_list.{number}.fuse_names")
    for names in _checked_folds(fuse_names or [], "fuse_names"):
        homes = [config for config in result if names[0] in select_modules_by_config(model, config)[0]]
        if not homes:
            raise UserError(f"fuse_names: no config of config_list selects {names[0]!r}, the first of {list(names)}.")
        # Of several entries for one module NNI wants a ReLU folded by the one that names the output.
        naming = [config for config in homes if "_output_" in config.get("target_names", ())]
        home = (naming or homes)[0] if len(names) > 2 else homes[0]
        home["fuse_names"] = [*home.get("fuse_names", []), names]
    return result


def _check_selection(config: dict, where: str) -> None:
    for key in (*_SELECTION_KEYS, "target_names"):
        value = config.get(key, [])
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
            raise UserError(f"{where}.{key} must be a list of words, not {value!r}.")
        for pattern in value if key.endswith("_re") else ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{where}.{key}: {pattern!r} is no regular expression ({error}).") from error
    settings = config.get("target_settings", {})
    if not isinstance(settings, dict) or not all(isinstance(setting, dict) for setting in settings.values()):
        raise UserError(f"{where}.target_settings must map targets such as weight to settings, not {settings!r}.")


def _checked_folds(folds: Any, key: str) -> list[tuple[str, ...]]:
    listed = isinstance(folds, list | tuple)
    for names in folds if listed else [folds]:
        known = listed and isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        if not known or not 2 <= len(names) <= 3:
            raise UserError(
                f"compression.quantization.{key} must list folds of 2 or 3 modules such as [conv1, bn1, relu1], not "
                f"{names!r}."
            )
    return [tuple(names) for names in folds]


def made_quantizer(
    model: nn.Module,
    name: str,
    config_list: list[dict],
    evaluator: DataFreeEvaluator,
    options: dict[str, Any],
    on_top_of: Compressor | None = None,
) -> Quantizer:
    """NNI's quantizer around ``model``, or on top of the pruner that is around it.

    Raises:
        UserError: NNI refuses the config or the options.
    """
    with refused_by(name):
        if on_top_of is not None:
            return QUANTIZERS[name].from_compressor(on_top_of, config_list, **options)
        return QUANTIZERS[name](model, config_list, evaluator, **options)


@contextlib.contextmanager
def refused_by(name: str) -> Iterator[None]:
    """What NNI's schema, assertions and look-ups refuse, as one sentence."""
    try:
        yield
    except UserError:
        raise
    except (SchemaError, AssertionError, ValueError, TypeError, KeyError, AttributeError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"NNI's {name} refuses the config ({text}).") from error


def tried_calibration(
    model: nn.Module, name: str, config_list: list[dict], evaluator: DataFreeEvaluator, scheme: str = "affine"
) -> Calibration:
    """The ranges of a copy of ``model`` on the evaluator's calibration set, whatever quantizer is to begin with them.

    Raises:
        UserError: NNI cannot calibrate what the config asks for: granularities that fit no tensor, for one.
    """
    probe = made_quantizer(copy.deepcopy(model), "PtqQuantizer", _with_scheme(config_list, scheme), evaluator, {})
    with refused_by(name):
        probe.compress(0, None)
    probe.unwrap_model()
    return plain_calibration(probe.get_calibration_config())


def starting_ranges(
    model: nn.Module, name: str, config_list: list[dict], evaluator: DataFreeEvaluator
) -> Calibration | None:
    """What LSQ and LSQ+ had best begin with: the ranges of ``model`` on the calibration set. None for the others."""
    if name not in ("LsqQuantizer", "LsqPlusQuantizer"):
        return None
    return tried_calibration(model, name, config_list, evaluator, "symmetric" if name == "LsqQuantizer" else "affine")


def _with_scheme(config_list: list[dict], scheme: str) -> list[dict]:
    result = []
    for config in copy.deepcopy(config_list):
        config["quant_scheme"] = scheme
        for setting in config.get("target_settings", {}).values():
            setting["quant_scheme"] = scheme
        config.setdefault("quant_dtype", "int8")
        result.append(config)
    return result


def begin_with(quantizer: Any, ranges: Calibration) -> None:
    """Give LSQ or LSQ+ the scales that fit ``ranges``."""
    device = next(weight.device for weight in quantizer.bound_model.parameters() if weight.numel())
    for path, targets in quantizer._target_spaces.items():
        wrapper = quantizer._module_wrappers[path]
        for target, space in targets.items():
            entry = ranges[path][target]
            scale, zero = entry["scale"].to(device), entry["zero_point"].to(device)
            if isinstance(quantizer, LsqQuantizer):
                # LSQ has no zero point: an unsigned type reaches from 0 to its largest number.
                scale = torch.maximum(entry["tracked_max"].abs(), entry["tracked_min"].abs()).to(device) / space.qmax
                scale = scale.clamp_min(torch.finfo(torch.float32).eps)
                space.zero_point = torch.zeros_like(scale) if space._scaler else torch.tensor(0.0, device=device)
            else:
                learned = nn.Parameter(zero if space._scaler else zero.view(1))
                setattr(wrapper, f"{target}_zero_point", learned)
            # Parameters of their own: those that NNI registers for LSQ+ lie on the CPU, wherever the network is.
            setattr(wrapper, f"{target}_scale", nn.Parameter(scale if space._scaler else scale.view(1)))
    quantizer.is_init = True


def _apply_method(quantizer: str, kind: TargetType) -> str:
    # In evaluation QAT, LSQ and LSQ+ compute what clamp_round does; DoReFa and BNN change the weights besides.
    if quantizer == "BNNQuantizer":
        return "bnn_clamp_round"
    if quantizer == "DoReFaQuantizer" and kind is not TargetType.INPUT:
        return "dorefa_clamp_round_weight" if kind is TargetType.PARAMETER else "dorefa_clamp_round_output"
    return "clamp_round"


def plain_calibration(calibration: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Calibration:
    """NNI's calibration config as plain dicts of tensors on the CPU."""
    return {
        path: {
            target: {
                key: value.detach().clone().cpu() if isinstance(value, Tensor) else value
                for key, value in entry.items()
            }
            for target, entry in targets.items()
        }
        for path, targets in calibration.items()
    }


def _check_channels(space: Any, value: Tensor | None, where: str) -> None:
    if value is None or value.numel() == 1 or space.type is not TargetType.PARAMETER:
        return
    shape = space.target.shape
    granularity = space.granularity
    axis = {"out_channel": 0, "in_channel": 1}.get(granularity) if isinstance(granularity, str) else None
    if axis is not None and value.numel() != shape[axis]:
        raise UserError(
            f"The calibration of {where} holds {value.numel()} scales, the tensor {shape[axis]} channels; "
            "slice the calibration by the channels that were kept."
        )


def _kept_by(kept: Any) -> tuple[Tensor | None, Tensor | None]:
    if kept is None:
        return None, None
    if not isinstance(kept, Mapping):
        return kept.inputs, kept.outputs
    weight = kept.get("weight")
    if weight is None:
        return None, None
    outputs = weight.flatten(1).any(1) if weight.ndim > 1 else weight.bool()
    inputs = weight.transpose(0, 1).flatten(1).any(1).nonzero().flatten() if weight.ndim > 1 else None
    return inputs, outputs.nonzero().flatten()


def _cut(value: Tensor, axes: dict[int, Tensor | None], where: str) -> Tensor:
    for axis, positions in axes.items():
        if positions is None or value.ndim <= axis or value.shape[axis] == 1:
            continue
        if len(positions) and int(positions.max()) >= value.shape[axis]:
            raise UserError(
                f"{where} has {value.shape[axis]} channels, but channel {int(positions.max())} is to be kept; "
                "only scales of whole tensors and of single channels can be cut."
            )
        value = value.index_select(axis, positions.to(value.device))
    return value
