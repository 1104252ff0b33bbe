"""The quantization stage of a recipe: check, calibrate or train, and the fusion of pruning with it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nni.compression.base.config import select_modules_by_config
from torch import Tensor, nn

from zskd_nni.compression.evaluator import DataFreeEvaluator
from zskd_nni.compression.fuse import fused_distiller
from zskd_nni.compression.pruning.masks import Masks
from zskd_nni.compression.pruning.prune import (
    OF_A_RUN,
    PrunedNetwork,
    fold_slim_factors,
    learns_from_choices,
    refusals,
    shrunken_to_masks,
    started_pruner,
)
from zskd_nni.compression.quantization.bn_folding import batch_norm_folds, check_folds
from zskd_nni.compression.quantization.qdq_onnx import integer_model
from zskd_nni.compression.quantization.quantize import (
    Quantization,
    begin_with,
    folds_of,
    made_quantizer,
    plain_calibration,
    quantize,
    quantizer_class_name,
    refused_by,
    simulated,
    sliced,
    starting_ranges,
    tried_calibration,
    with_fuse_names,
)
from zskd_nni.data.sources import NoiseSource, TransferSource
from zskd_nni.models.input_spec import images_at_once
from zskd_nni.models.onnx_export import check_exportable
from zskd_nni.models.shared_modules import called_names, check_layers
from zskd_nni.models.teacher import Teacher, first_tensor
from zskd_nni.runtime.errors import UserError, error_context
from zskd_nni.training.distillation import DistillationSettings
from zskd_nni.training.metrics import agreement

if TYPE_CHECKING:
    from zskd_nni.recipes.compression_config import DistillerConfig, PruningConfig, QuantizationConfig

EXPORTED = ("PtqQuantizer", "QATQuantizer", "LsqQuantizer", "LsqPlusQuantizer")
_LEAST_AGREEMENT_AFTER_SHRINKING = 0.98


def check_quantization(
    network: nn.Module, section: QuantizationConfig, teacher: Teacher, steps: int | None = None
) -> None:
    """Find out before the long work begins whether NNI takes this config for this network, and ONNX what comes of it.

    Args:
        network: the student as it will be quantized, or before it shrinks; left as it is.
        section: quantizer, config, steps.
        teacher: knows the input.
        steps: of the training under the quantizer where it is fused with others; ``section.steps`` where absent.

    Raises:
        UserError: an unknown quantizer, a config that selects nothing, or a config, fold or argument that NNI refuses;
            no step to train in; types or scales that cannot be exported.
    """
    name = quantizer_class_name(section.quantizer)
    if section.fused and name == "PtqQuantizer":
        raise UserError(
            "compression.quantization.fused: PtqQuantizer does not train, so that there is nothing to fuse; "
            "leave fused out, or take QATQuantizer."
        )
    _check_steps(name, section, section.steps if steps is None else steps)
    with error_context("compression.quantization"):
        network = copy.deepcopy(network).to(teacher.device).requires_grad_(True)
        evaluator = DataFreeEvaluator(teacher, NoiseSource(teacher.spec, 2), calibration_images=2, quiet=True)
        check_layers(network, evaluator.calibration_set())
        config_list = quantization_config(network, section, teacher)
        check_folds(network, folds_of(config_list), teacher.spec)
        for config in config_list:
            if not select_modules_by_config(network, config)[0]:
                shown = {key: value for key, value in config.items() if "op_" in key}
                raise UserError(f"the quantization config selects no module of the model by {shown}; name others")
        quantizer = made_quantizer(network, name, config_list, evaluator, section.arguments)
        quantizer.unwrap_model()
        calibration = tried_calibration(network, name, config_list, evaluator)
        if name in EXPORTED:
            check_exportable(integer_model(Quantization(network, name, config_list, calibration)), teacher.spec)


def _check_steps(name: str, section: QuantizationConfig, steps: int) -> None:
    if name == "PtqQuantizer":
        return
    if steps < 1:
        raise UserError(
            f"compression.quantization.steps: {name} quantizes while it trains and needs at least 1 step; "
            "PtqQuantizer needs none."
        )
    begin = section.arguments.get("quant_start_step", 0)
    if isinstance(begin, bool) or not isinstance(begin, int):
        raise UserError(f"compression.quantization.arguments.quant_start_step must be a whole number, not {begin!r}.")
    if begin >= steps:
        raise UserError(
            f"compression.quantization.arguments.quant_start_step: at step {begin} the training is over, which has "
            f"{steps} steps, so that nothing would be quantized; give less than that."
        )


def quantization_config(
    network: nn.Module, section: QuantizationConfig, teacher: Teacher, masked: Container[str] = ()
) -> list[dict]:
    """NNI's config list of the section with its folds, named or found.

    Args:
        network: what is quantized, unwrapped.
        section: config list and folds.
        teacher: knows the input.
        masked: modules under a pruner's masks in the same training. NNI folds no normalisation that is masked, so
            that such folds are not looked for.
    """
    folds = [tuple(names) for names in section.fuse_names]
    dummy = teacher.example_input().to(next(network.parameters()).device)
    called = called_names(network, dummy)
    if section.fuse_batch_norm:
        with refused_by(section.quantizer):
            found = batch_norm_folds(network, with_fuse_names(network, section.config_list, folds), dummy)
        folds.extend(names for names in found if _can_fold(network, names, masked))
    return [_of_called(network, config, called) for config in with_fuse_names(network, section.config_list, folds)]


def _can_fold(network: nn.Module, names: tuple[str, ...], masked: Container[str]) -> bool:
    # A pruner that masks a layer without a bias leaves NNI nothing to fold the normalisation's shift into.
    without_bias = names[0] in masked and getattr(network.get_submodule(names[0]), "bias", None) is None
    return not without_bias and not any(name in masked for name in names[1:])


def _of_called(network: nn.Module, config: dict, called: set[str]) -> dict:
    """The config without layers that ``forward`` never calls in ``eval()``, over which NNI stumbles.

    Such as an auxiliary head, which only runs in training.
    """
    idle = [
        name
        for name in select_modules_by_config(network, config)[0]
        if name not in called and next(network.get_submodule(name).parameters(recurse=False), None) is not None
    ]
    named = [name for name in idle if name in config.get("op_names", ())]
    if named:
        raise UserError(
            f"the quantization config names {named[0]!r}, which forward never calls when the network is evaluated: "
            "there is nothing to calibrate it on; leave it out"
        )
    return {**config, "exclude_op_names": [*config.get("exclude_op_names", ()), *idle]} if idle else config


def quantize_student(
    network: nn.Module,
    section: QuantizationConfig,
    teacher: Teacher,
    source: TransferSource,
    distillation: DistillationSettings,
    *,
    train: bool,
    distiller: DistillerConfig | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    masks: Masks | None = None,
    quiet: bool = False,
) -> Quantization | None:
    """Quantize a copy of a finished student.

    Args:
        network: the student, on the teacher's device; left as it is.
        section: quantizer, NNI's config list, steps.
        teacher: teaches, where the quantizer trains.
        source: the images to calibrate and train on.
        distillation: temperature, batch and augmentation; the learning rate is the section's.
        train: whether the quantizer may train. Without, its config is calibrated alone, as PTQ does.
        distiller: another than the logits' own.
        seed: names the random streams.
        checkpoint: where the training keeps its state, if anywhere.
        masks: what pruning set to zero in ``network`` and the training leaves there.
        quiet: no progress.

    Returns:
        The quantization; None where the quantizer cannot do without training (DoReFa, BNN) and may not train.
    """
    name = quantizer_class_name(section.quantizer)
    if not train and name not in EXPORTED:
        return None
    student = copy.deepcopy(network)
    config_list = quantization_config(student, section, teacher)
    evaluator = DataFreeEvaluator(
        teacher,
        source,
        quantization_settings(section, distillation),
        seed=seed,
        checkpoint=checkpoint,
        calibration_images=section.calibration_images,
        masks=masks,
        label=f"{name}",
        quiet=quiet,
    )
    trains = train and name != "PtqQuantizer"
    result = quantize(
        student,
        name if train else "PtqQuantizer",
        config_list,
        evaluator,
        max_steps=section.steps if trains else None,
        temperature=distillation.temperature,
        distiller=distiller,
        **(section.arguments if train else {}),
    )
    return dataclasses.replace(result, student=result.student.cpu().eval())


def quantization_settings(section: QuantizationConfig, distillation: DistillationSettings) -> DistillationSettings:
    """The distillation's settings with the section's steps and learning rate.

    A tenth of the distillation's rate by default: the student is taught already, and only mends what rounding breaks.
    """
    rate = section.learning_rate or distillation.learning_rate / 10
    return dataclasses.replace(distillation, steps=max(1, section.steps), learning_rate=rate)


def compress_in_one_training(
    network: nn.Module,
    pruning: PruningConfig,
    section: QuantizationConfig,
    teacher: Teacher,
    source: TransferSource,
    distillation: DistillationSettings,
    *,
    distiller: DistillerConfig | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    quiet: bool = False,
) -> tuple[PrunedNetwork, Quantization]:
    """Prune, quantize and distil in one NNI training, shrink, and cut the calibration the same way.

    The training is as long as its parts would be one after the other: ``pruning.steps``, ``distillation.steps`` and
    ``quantization.steps``.

    Args:
        network: the student, on the teacher's device; consumed.
        pruning: pruner, schedule, NNI's config list.
        section: quantizer, NNI's config list.
        teacher: labels every image.
        source: what is scored, learnt and calibrated on.
        distillation: temperature, learning rate, batch, augmentation.
        distiller: another than the logits' own.
        seed: names the random streams.
        checkpoint: where the training keeps its state, if anywhere.
        quiet: no progress.

    Raises:
        UserError: NNI refuses a config; the shrunken network, or its quantization, does not answer as before.
    """
    name = quantizer_class_name(section.quantizer)
    steps = pruning.steps + distillation.steps + section.steps
    evaluator = DataFreeEvaluator(
        teacher,
        source,
        dataclasses.replace(distillation, steps=steps),
        seed=seed,
        checkpoint=checkpoint,
        pseudo_labels=learns_from_choices(pruning),
        calibration_images=section.calibration_images,
        label=f"{pruning.pruner} and {name}",
        quiet=quiet,
    )
    pruner, left_out = started_pruner(network, pruning, teacher, source, evaluator, seed, quiet)
    pruner.unwrap_model()  # the next compressor wraps it again
    config_list = quantization_config(network, section, teacher, masked=pruner._module_wrappers)
    ranges = starting_ranges(network, name, config_list, evaluator)
    quantizer: Any = made_quantizer(network, name, config_list, evaluator, section.arguments, on_top_of=pruner)
    if ranges is not None:
        begin_with(quantizer, ranges)
    top = fused_distiller(
        quantizer,
        distiller,
        teacher,
        evaluator,
        distillation.temperature,
        float(learns_from_choices(pruning)),
    )
    with refusals(pruning, OF_A_RUN):
        top.compress(max_steps=steps, max_epochs=None)
    network.eval()
    probe = evaluator.calibration_set()
    before = _answers(network, probe).cpu()
    masks, calibration = pruner.get_masks(), plain_calibration(quantizer.get_calibration_config())
    top.unwrap_model()
    fold_slim_factors(pruner)
    whole = Quantization(network, name, config_list, calibration)
    pruned = shrunken_to_masks(network, masks, pruning, teacher, left_out, evaluator.histories[-1])
    pruned.record["steps_under_masks"] = steps
    result = sliced(whole, pruned.network, pruned.kept)
    share = agreement(_answers(simulated(result), probe.cpu()), before)
    if not share >= _LEAST_AGREEMENT_AFTER_SHRINKING:
        raise UserError(
            f"The shrunken, quantized network agrees with the one that was trained on {share:.1%} of {len(probe)} "
            "images only: its calibration does not survive the shrinking. Leave compression.quantization.fused out."
        )
    pruned.record["agreement_after_shrinking"] = share
    return pruned, result


@torch.no_grad()
def _answers(model: nn.Module, images: Tensor) -> Tensor:
    at_once = images_at_once(images[0].numel())
    # copies: a network may change its input in place, and the same images are asked about again
    return torch.cat([first_tensor(model(part.clone())) for part in images.split(at_once)])
