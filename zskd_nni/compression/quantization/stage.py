"""Quantization in a recipe: the check before the long work, and one training for pruning and quantization together."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from zskd_nni.compression.evaluator import DataFreeEvaluator, EvaluatorOptions, evaluator_of_run
from zskd_nni.compression.fuse import fused_distiller
from zskd_nni.compression.nni_messages import refusals_as_sentences
from zskd_nni.compression.pruning import nni_pruner
from zskd_nni.compression.pruning.dependency_config import PruningPlan
from zskd_nni.compression.pruning.prune import PrunedNetwork, prepare_pruner, shrink_to_masks
from zskd_nni.compression.quantization import nni_quantizer
from zskd_nni.compression.quantization.bn_folding import check_folds
from zskd_nni.compression.quantization.calibration import plain_calibration
from zskd_nni.compression.quantization.qdq_onnx import integer_model
from zskd_nni.compression.quantization.quantize import QuantizedNetwork, simulated, slice_quantization
from zskd_nni.data.sources import NoiseSource, TransferSource
from zskd_nni.models.input_spec import inference_batch
from zskd_nni.models.onnx_export import check_exportable
from zskd_nni.models.shared_modules import check_compressible
from zskd_nni.models.teacher import Teacher, first_tensor
from zskd_nni.recipes.compression_config import CompressionRun, PruningConfig, QuantizationConfig
from zskd_nni.runtime.errors import UserError, error_context
from zskd_nni.training.distillation import DistillationSettings
from zskd_nni.training.metrics import agreement

_LEAST_AGREEMENT_AFTER_SHRINKING = 0.98


def check_quantization(
    network: nn.Module, config: QuantizationConfig, teacher: Teacher, steps: int | None = None
) -> None:
    """Find out before the long work whether NNI takes the config for this network, and ONNX the result.

    Args:
        network: the student as it will be quantized, or before it is pruned; left as it is.
        config: quantizer, NNI's config list, steps.
        teacher: knows the input.
        steps: of a training that is fused with others; ``config.steps`` by default.

    Raises:
        UserError: an unknown quantizer, a config that selects nothing, or a config, fold or argument that NNI refuses;
            no steps to train in; types or scales that cannot be exported.
    """
    name = nni_quantizer.quantizer_class_name(config.quantizer)
    if config.fused and name == "PtqQuantizer":
        raise UserError(
            "compression.quantization.fused: PtqQuantizer does not train, so that there is nothing to fuse; "
            "leave fused out, or take QATQuantizer."
        )
    _check_steps(name, config, config.steps if steps is None else steps)
    with error_context("compression.quantization"):
        network = copy.deepcopy(network).to(teacher.device).requires_grad_(True)
        options = EvaluatorOptions(calibration_images=2)
        evaluator = DataFreeEvaluator(teacher, NoiseSource(teacher.spec, 2), quiet=True, options=options)
        check_compressible(network, evaluator.calibration_set())
        config_list = nni_quantizer.quantizer_config_list(network, config, teacher)
        check_folds(network, nni_quantizer.folds_of(config_list), teacher.spec)
        with refusals_as_sentences(f"NNI's {name}"):
            nni_quantizer.QUANTIZERS[name](network, config_list, evaluator, **config.arguments).unwrap_model()
        calibration = nni_quantizer.calibrate(network, name, config_list, evaluator)
        if name in nni_quantizer.ROUNDING_QUANTIZERS:
            quantized = QuantizedNetwork(network, name, config_list, calibration)
            check_exportable(integer_model(quantized), teacher.spec)


def _check_steps(name: str, config: QuantizationConfig, steps: int) -> None:
    if name == "PtqQuantizer":
        return
    if steps < 1:
        raise UserError(
            f"compression.quantization.steps: {name} quantizes while it trains and needs at least 1 step; "
            "PtqQuantizer needs none."
        )
    start = config.arguments.get("quant_start_step", 0)
    if isinstance(start, bool) or not isinstance(start, int):
        raise UserError(f"compression.quantization.arguments.quant_start_step must be a whole number, not {start!r}.")
    if start >= steps:
        raise UserError(
            f"compression.quantization.arguments.quant_start_step: at step {start} the training is over, which has "
            f"{steps} steps, so that nothing would be quantized; give less than that."
        )


def compress_in_one_training(
    student: nn.Module,
    pruning: PruningConfig,
    quantization: QuantizationConfig,
    teacher: Teacher,
    images: TransferSource,
    distillation: DistillationSettings | None = None,
    *,
    plan: PruningPlan | None = None,
    run: CompressionRun | None = None,
) -> tuple[PrunedNetwork, QuantizedNetwork]:
    """Prune, quantize and distil in one NNI training, then remove the masked channels and their scales.

    The training takes ``pruning.steps + distillation.steps + quantization.steps`` steps.

    Args:
        student: such as ``teacher.student()``; moved to the teacher's device and changed.
        pruning: pruner, schedule, NNI's config list.
        quantization: quantizer, NNI's config list.
        teacher: labels every image.
        images: to score the channels, to learn and to calibrate on.
        distillation: temperature, learning rate, batch, augmentation.
        plan: of this student and ``pruning``, if it was made before.
        run: seed, checkpoint, distiller, progress.

    Raises:
        UserError: NNI refuses a config, or the smaller network does not compute what the trained one does.
    """
    run, distillation = run or CompressionRun(), distillation or DistillationSettings()
    plan = plan or nni_pruner.pruning_plan(student, pruning, teacher)
    student.to(teacher.device)
    name = nni_quantizer.quantizer_class_name(quantization.quantizer)
    steps = pruning.steps + distillation.steps + quantization.steps
    settings, labels = dataclasses.replace(distillation, steps=steps), nni_pruner.needs_pseudo_labels(pruning)
    options: dict[str, Any] = {
        "calibration_images": quantization.calibration_images,
        "label": f"{pruning.pruner} and {name}",
    }
    evaluator = evaluator_of_run(run, teacher, images, settings, labels, **options)
    pruner = prepare_pruner(student, pruning, plan, evaluator, run)
    pruner.unwrap_model()  # the next compressor wraps it again
    config_list = nni_quantizer.quantizer_config_list(student, quantization, teacher, masked=pruner._module_wrappers)
    quantizer = nni_quantizer.make_quantizer(student, name, config_list, evaluator, quantization.arguments, pruner)
    top = fused_distiller(quantizer, run.distiller, evaluator)
    with nni_pruner.errors_as_sentences(pruning):
        top.compress(max_steps=steps, max_epochs=None)
    student.eval()
    probe = evaluator.calibration_set()
    before = _logits(student, probe).cpu()
    masks, calibration = pruner.get_masks(), plain_calibration(quantizer.get_calibration_config())
    top.unwrap_model()
    nni_pruner.fold_slim_factors(pruner)
    whole = QuantizedNetwork(student, name, config_list, calibration)
    pruned = shrink_to_masks(student, masks, pruning, plan, teacher, evaluator.histories[-1])
    quantized = slice_quantization(whole, pruned.network, pruned.kept)
    share = agreement(_logits(simulated(quantized), probe.cpu()), before)
    if not share >= _LEAST_AGREEMENT_AFTER_SHRINKING:
        raise UserError(
            f"The smaller quantized network predicts the class of the trained one on {share:.1%} of {len(probe)} "
            "images only: its calibration does not survive the removal of channels. Leave out "
            "compression.quantization.fused."
        )
    pruned.record.update(steps_under_masks=steps, agreement_after_shrinking=share)
    return pruned, quantized


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    # copies: a network may change its input in place, and the same images are used again
    return torch.cat([first_tensor(model(part.clone())) for part in images.split(inference_batch(images[0].numel()))])
