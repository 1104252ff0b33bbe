"""Quantizing a student with NNI on a transfer source, and the network that computes as the quantized one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from nni.compression.base.compressor import Quantizer
from nni.compression.base.target_space import TargetType
from torch import Tensor, nn

from zskd_nni.compression.evaluator import evaluator_of_run
from zskd_nni.compression.fuse import fused_distiller
from zskd_nni.compression.nni_messages import refusals_as_sentences
from zskd_nni.compression.pruning.masks import Masks
from zskd_nni.compression.quantization import nni_quantizer, refinement
from zskd_nni.compression.quantization.bn_folding import check_folds
from zskd_nni.compression.quantization.calibration import Calibration, plain_calibration, slice_calibration
from zskd_nni.data.sources import TransferSource
from zskd_nni.models.local_response_norm import fast_response_norms
from zskd_nni.models.teacher import Teacher, first_tensor
from zskd_nni.recipes.compression_config import CompressionRun, QuantizationConfig
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.distillation import DistillationSettings

_REFINED_ON = 256  # images that ranges and biases are refined on, at most


@dataclass(frozen=True)
class QuantizedNetwork:
    """A network and how NNI quantizes it.

    Attributes:
        network: unwrapped, on the CPU, in ``eval()``. It computes with float weights; :func:`simulated` gives the
            network that computes as the quantized one.
        quantizer: NNI's class name.
        config_list: NNI's, as it was used.
        calibration: NNI's calibration config ``{module: {target: {scale, zero_point, quant_dtype, ...}}}``.
    """

    network: nn.Module
    quantizer: str
    config_list: list[dict]
    calibration: Calibration

    @property
    def folds(self) -> list[tuple[str, ...]]:
        """Modules that act as one: a convolution or linear layer, its BatchNorm, its ReLU."""
        return nni_quantizer.folds_of(self.config_list)


def quantize(
    student: nn.Module,
    config: QuantizationConfig,
    teacher: Teacher,
    images: TransferSource,
    distillation: DistillationSettings | None = None,
    *,
    train: bool = True,
    masks: Masks | None = None,
    run: CompressionRun | None = None,
) -> QuantizedNetwork:
    """Quantize a copy of a finished student with one of NNI's quantizers.

    ``PtqQuantizer`` reads the ranges from the calibration set and takes no step. The others train under quantization
    for ``config.steps`` steps of distillation.

    Args:
        student: such as ``pruned.network``; left as it is.
        config: quantizer, NNI's config list, steps.
        teacher: labels every image; its device is used.
        images: to calibrate and to train on.
        distillation: temperature, batch and augmentation of the training. Steps and learning rate are the config's.
        train: whether the quantizer may train; otherwise its config is calibrated, as PTQ does.
        masks: weights that pruning set to zero (``pruned.masks``). They stay zero.
        run: seed, checkpoint, distiller, progress.

    Raises:
        UserError: an unknown quantizer, a config that NNI refuses, modules that cannot act as one, a quantized network
            whose logits are not finite, or a quantizer that needs training (DoReFa, BNN) and may not train.

    Example:
        >>> from zskd_nni import NoiseSource, load_teacher
        >>> teacher = load_teacher("lenet5-digits")
        >>> images = NoiseSource(teacher.spec, 32)  # transfer_source(teacher, "impressions") makes better ones
        >>> layers = {"op_types": ["Conv2d", "Linear"], "target_names": ["_input_", "weight"], "quant_dtype": "int8"}
        >>> config = QuantizationConfig([layers], calibration_images=64)
        >>> quantized = quantize(teacher.student(), config, teacher, images)
        >>> sorted(quantized.calibration["conv1"])
        ['_input_0', 'weight']
    """
    run, distillation = run or CompressionRun(), distillation or DistillationSettings()
    name = nni_quantizer.quantizer_class_name(config.quantizer)
    if not train:
        if name not in nni_quantizer.ROUNDING_QUANTIZERS:
            raise UserError(f"{name} cannot be calibrated without training.")
        name, config = "PtqQuantizer", replace(config, arguments={})
    student = copy.deepcopy(student).to(teacher.device)
    # By default a tenth of the distillation's rate: the student is trained, and only has to recover from rounding.
    rate = config.learning_rate or distillation.learning_rate / 10
    settings = replace(distillation, steps=max(1, config.steps), learning_rate=rate)
    options: dict[str, Any] = {"calibration_images": config.calibration_images, "masks": masks or {}, "label": name}
    evaluator = evaluator_of_run(run, teacher, images, settings, **options)
    config_list = nni_quantizer.quantizer_config_list(student, config, teacher)
    check_folds(student, nni_quantizer.folds_of(config_list), teacher.spec)
    quantizer = nni_quantizer.make_quantizer(student, name, config_list, evaluator, config.arguments)
    ptq = name == "PtqQuantizer"
    top: Any = quantizer if ptq else fused_distiller(quantizer, run.distiller, evaluator)
    with refusals_as_sentences(f"compression.quantization: NNI's {name}"):
        top.compress(0 if ptq else config.steps, None)
    calibration = plain_calibration(quantizer.get_calibration_config())
    student.eval()
    with torch.no_grad():
        logits = first_tensor(student(teacher.example_input()))
    top.unwrap_model()
    if not torch.isfinite(logits).all():
        raise UserError(
            f"The logits of the network quantized by {name} are not finite; "
            "train it for fewer steps or with a smaller learning rate."
        )
    quantized = QuantizedNetwork(student.cpu(), name, config_list, calibration)
    few = min(_REFINED_ON, teacher.spec.inference_batch)  # they go through the network at once
    return _refined(quantized, config, evaluator.calibration_set()[:few].cpu()) if config.refines else quantized


def _refined(quantized: QuantizedNetwork, config: QuantizationConfig, images: Tensor) -> QuantizedNetwork:
    """The quantized network after what the config asks for beyond calibration, changed in place.

    Raises:
        UserError: the config list names folds, whose weights are not those of single layers.
    """
    if quantized.folds:
        raise UserError(
            "compression.quantization: ranges, rounding and correct_biases change single layers; leave fuse_names out."
        )
    network, calibration = quantized.network, quantized.calibration
    original = copy.deepcopy(network)
    with fast_response_norms(network), fast_response_norms(original):
        if config.ranges == "least_error":
            refinement.narrow_ranges(network, calibration, images)
        if config.rounding == "joint":
            refinement.round_jointly(network, calibration)
        if config.correct_biases:
            refinement.correct_biases(network, original, simulated(quantized), images)
    return quantized


def simulated(quantized: QuantizedNetwork) -> nn.Module:
    """A copy of the network that computes as the quantized one, by a new NNI quantizer with the same calibration.

    Raises:
        UserError: the calibration does not fit the network, as that of one with more channels: see
            :func:`slice_quantization`.
    """
    model = copy.deepcopy(quantized.network).eval()
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    quantizer = Quantizer(model, quantized.config_list)
    for path, targets in quantized.calibration.items():
        for target, entry in targets.items():
            space = quantizer._target_spaces.get(path, {}).get(target)
            if space is None:
                raise UserError(f"The calibration names {path}.{target}, which the config list does not quantize.")
            for key in ("scale", "zero_point"):
                value = entry[key]
                _check_channels(space, value, f"{path}.{target}")
                setattr(space, key, None if value is None else value.to(device))
            space.apply_method = _apply_method(quantized.quantizer, space.type)
    return model


def _apply_method(quantizer: str, kind: TargetType) -> str:
    # In evaluation QAT, LSQ and LSQ+ compute what clamp_round does; DoReFa and BNN also change the weights.
    if quantizer == "BNNQuantizer":
        return "bnn_clamp_round"
    if quantizer == "DoReFaQuantizer" and kind is not TargetType.INPUT:
        return "dorefa_clamp_round_weight" if kind is TargetType.PARAMETER else "dorefa_clamp_round_output"
    return "clamp_round"


def _check_channels(space: Any, value: Tensor | None, where: str) -> None:
    if value is None or value.numel() == 1 or space.type is not TargetType.PARAMETER:
        return
    for granularity, channels in zip(("out_channel", "in_channel"), space.target.shape, strict=False):
        if space.granularity == granularity and value.numel() != channels:
            raise UserError(
                f"The calibration of {where} holds {value.numel()} scales, the tensor {channels} channels; "
                "slice the calibration by the channels that were kept."
            )


def slice_quantization(
    quantized: QuantizedNetwork, network: nn.Module, masks_or_kept_channels: Mapping[str, Any]
) -> QuantizedNetwork:
    """The quantization of ``network``, which is the quantized one with channels removed.

    Args:
        quantized: before channels were removed.
        network: after, unwrapped.
        masks_or_kept_channels: see :func:`~zskd_nni.compression.quantization.calibration.slice_calibration`.

    Raises:
        UserError: the calibration that is left does not fit ``network``.
    """
    sliced, paths = slice_calibration(quantized.calibration, masks_or_kept_channels), dict(network.named_modules())
    calibration = {path: targets for path, targets in sliced.items() if path in paths}
    result = replace(quantized, network=network, calibration=calibration)
    simulated(result)
    return result
