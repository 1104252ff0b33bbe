"""Pruning a student under NNI while it is distilled, and removing the channels that the masks zero.

There are three kinds of pruners. Norm pruners read the weights. Scoring pruners (Taylor, Slim) read gradients. A
student that still equals its teacher has no distillation gradient, so they are run first, on a copy of the student that
does not move, with the teacher's choices as labels. Both kinds make their masks once, and the student is then distilled
under them. Movement, and any pruner under a schedule, change their masks during the distillation.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nni.compression.base.compressor import Pruner
from torch import Tensor, nn

from zskd_nni.compression.evaluator import DataFreeEvaluator, evaluator_of_run
from zskd_nni.compression.fuse import fused_distiller
from zskd_nni.compression.pruning import nni_pruner
from zskd_nni.compression.pruning.dependency_config import PruningPlan
from zskd_nni.compression.pruning.masks import (
    Masks,
    describe_masks,
    masks_on_cpu,
    multiply_in,
    remaining_masks,
    share_of_zeros,
)
from zskd_nni.compression.pruning.sparsity import missed_sparsity, sentence_about
from zskd_nni.compression.pruning.speedup import (
    CannotShrinkError,
    KeptChannels,
    ShrinkResult,
    as_parameter_masks,
    is_fine_grained,
    shrink,
)
from zskd_nni.data.sources import NoiseSource, TransferSource
from zskd_nni.models.teacher import Teacher
from zskd_nni.recipes.compression_config import CompressionRun, PruningConfig
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.checkpoint import History
from zskd_nni.training.distillation import DistillationSettings

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrunedNetwork:
    """A pruned network and how it was made.

    Attributes:
        network: on the CPU, in ``eval()``; smaller where the masks zero whole channels.
        record: JSON-able: sparsity of every mask, widths of every layer, how the network was checked.
        kept: which channels each module kept, for a quantizer's calibration; empty where nothing was removed.
        masks: of ``network``'s own weights: what is zero in it and must stay so in further training
            (:func:`zskd_nni.compression.pruning.masks.held_at_zero`); empty where all masked weights were removed.
    """

    network: nn.Module
    record: dict[str, Any]
    kept: dict[str, KeptChannels]
    masks: Masks = field(default_factory=dict)

    @property
    def kept_channels(self) -> dict[str, Tensor]:
        """Layer -> the output channels that it kept, each in the order of the original; for ``distill(kept=...)``."""
        return {path: channels.outputs for path, channels in self.kept.items()}


def prune(
    student: nn.Module,
    config: PruningConfig,
    teacher: Teacher,
    images: TransferSource | None,
    distillation: DistillationSettings | None = None,
    *,
    train: bool = True,
    plan: PruningPlan | None = None,
    run: CompressionRun | None = None,
) -> PrunedNetwork:
    """Prune a student, distil it under the masks for ``config.steps`` steps, and remove the masked channels.

    Channels are scored on a copy of the student, so that scoring moves no weight.

    Args:
        student: such as ``teacher.student()``; moved to the teacher's device and changed.
        config: pruner, NNI's config list, steps.
        teacher: labels every image.
        images: to score the channels and to learn on; may be None for a pruner that reads the weights alone, and the
            student is not trained then.
        distillation: temperature, batch, learning rate and augmentation of the training under the masks.
        train: whether to distil; without, the masks are made on the same images and applied.
        plan: from :func:`~zskd_nni.compression.pruning.nni_pruner.pruning_plan` of this student and config, if it
            was made before.
        run: seed, checkpoint, distiller, progress.

    Raises:
        UserError: NNI refuses the config, or the smaller network does not compute what the masked one does.

    Example:
        >>> from zskd_nni.data.sources import NoiseSource
        >>> from zskd_nni.models.teacher import load_teacher
        >>> teacher = load_teacher("lenet5-digits")
        >>> config = PruningConfig([{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], steps=2)
        >>> images = NoiseSource(teacher.spec, 8)  # transfer_source(teacher, "impressions") makes better ones
        >>> pruned = prune(teacher.student(), config, teacher, images, run=CompressionRun(quiet=True))
        >>> pruned.network.conv1.out_channels, pruned.network.conv2.out_channels
        (3, 8)
    """
    run, distillation = run or CompressionRun(), distillation or DistillationSettings()
    plan = plan or nni_pruner.pruning_plan(student, config, teacher)
    student.to(teacher.device)
    if images is None or not train or config.steps == 0:
        masks = one_shot_masks(student, config, plan, teacher, images, distillation, run)
        return shrink_to_masks(student, masks, config, plan, teacher)
    labels = nni_pruner.needs_pseudo_labels(config)
    evaluator = evaluator_of_run(run, teacher, images, distillation, labels, label="distillation under masks")
    pruner = prepare_pruner(student, config, plan, evaluator, run)
    top = fused_distiller(pruner, run.distiller, evaluator)
    with nni_pruner.errors_as_sentences(config):
        top.compress(max_steps=config.steps, max_epochs=None)
    masks = pruner.get_masks()
    top.unwrap_model()
    nni_pruner.fold_slim_factors(pruner)
    return shrink_to_masks(student, masks, config, plan, teacher, evaluator.histories[-1])


def prepare_pruner(
    student: nn.Module, config: PruningConfig, plan: PruningPlan, evaluator: DataFreeEvaluator, run: CompressionRun
) -> Pruner:
    """A pruner around the student, ready to be fused: with its masks, or with a schedule by which to make them.

    Args:
        student: on the teacher's device; wrapped.
        config: pruner and NNI's config list.
        plan: of this student and config.
        evaluator: of the training under the masks. Its images are scored on as well.
        run: seed and progress.
    """
    if nni_pruner.masks_change_in_training(config):
        return nni_pruner.make_pruner(student, config, plan, evaluator)
    masks = one_shot_masks(student, config, plan, evaluator.teacher, evaluator.source, evaluator.settings, run)
    # A pruner that is not asked for masks keeps those that it is given. Norm pruners take no further arguments.
    holder = "LevelPruner" if config.pruner == "LevelPruner" else "L1NormPruner"
    pruner = nni_pruner.make_pruner(student, replace(config, pruner=holder, arguments={}), plan, evaluator)
    pruner.update_masks(masks)
    return pruner


def one_shot_masks(
    student: nn.Module,
    config: PruningConfig,
    plan: PruningPlan,
    teacher: Teacher,
    images: TransferSource | None,
    distillation: DistillationSettings,
    run: CompressionRun,
) -> Masks:
    """The masks of the student as it is, regardless of any schedule.

    A pruner that needs images is run on a copy, with the teacher's choices as labels.

    Args:
        student: on the teacher's device; left as it is.
        config: pruner and NNI's config list.
        plan: of this student and config.
        teacher: chooses the labels.
        images: to score on; may be None for a pruner that reads the weights alone.
        distillation: augmentation of the images.
        run: seed and progress.

    Raises:
        UserError: NNI refuses the config, or images are missing.
    """
    if nni_pruner.is_data_driven(config) and images is None:
        raise UserError(f"{config.pruner} needs images to score the channels on.")
    copied = copy.deepcopy(student).requires_grad_(True)
    images, run = images or NoiseSource(teacher.spec, 2), replace(run, checkpoint=None)
    evaluator = evaluator_of_run(run, teacher, images, distillation, True, label=f"scores of {config.pruner}")
    pruner = nni_pruner.make_pruner(copied, replace(config, schedule=None), plan, evaluator)
    limits = (max(config.steps, pruner.cooldown_begin_step), None) if config.pruner == "MovementPruner" else ()
    with nni_pruner.errors_as_sentences(config):
        _, masks = pruner.compress(*limits)
    pruner.unwrap_model()
    return masks


def shrink_to_masks(
    network: nn.Module,
    masks: Masks,
    config: PruningConfig,
    plan: PruningPlan,
    teacher: Teacher,
    history: History | None = None,
) -> PrunedNetwork:
    """Remove the channels that the masks zero; other masks, or all with ``speedup`` off, are multiplied in.

    Args:
        network: unwrapped; changed.
        masks: of the pruner.
        config: pruner and whether to shrink.
        plan: of this network and config.
        teacher: knows the input.
        history: of the training under the masks.

    Raises:
        UserError: the smaller network does not compute what the masked one does.
    """
    network = network.cpu().eval()
    on_cpu = masks_on_cpu(network, masks)
    record: dict[str, Any] = {
        "pruner": config.pruner,
        "schedule": None if config.schedule is None else config.schedule.name,
        "scored_on_images": nni_pruner.is_data_driven(config),
        "steps_under_masks": 0 if history is None else config.steps,
        **describe_masks(on_cpu),
        "left_out": plan.left_out,
        "history": None if history is None else {"steps": history.steps, "losses": history.losses},
    }
    kept: dict[str, KeptChannels] = {}
    missed = missed_sparsity(network, plan.config_list, on_cpu)
    if config.speedup:
        result = _shrink(network, on_cpu, plan, teacher)
        network, kept, note = result.model, result.kept, result.note
        if not result.shrunken:
            note = f"{note}; the masks are multiplied into the weights, the network is as large as before"
        figures = ("parameters_before", "parameters_after", "criterion", "max_logit_difference")
        record |= {"shrunk": result.shrunken, **{name: getattr(result, name) for name in figures}}
        record["layers"] = [asdict(layer) for layer in result.layers]
    else:
        multiply_in(network, as_parameter_masks(network, on_cpu))
        note = "speedup is off: the masks are multiplied into the weights, nothing was removed"
        record["shrunk"] = False
    if missed:
        record["missed_sparsity"], told = missed, sentence_about(missed)
        _logger.warning("compression.pruning: %s.", told)
        note = f"{note}; {told}" if note else told
    record.update(note=note, zeros=share_of_zeros(network, record["sparsity"]))
    positions = {name: (channels.outputs, channels.inputs) for name, channels in kept.items()}
    return PrunedNetwork(network, record, kept, remaining_masks(network, on_cpu, positions))


def _shrink(network: nn.Module, masks: Masks, plan: PruningPlan, teacher: Teacher) -> ShrinkResult:
    try:
        return shrink(network, masks, teacher.example_input(), graph=plan.graph)
    except CannotShrinkError as error:
        # The error itself advises complete_config_list, which has made the plan already.
        raise UserError(
            f"compression.pruning: {error.reason}; exclude the layers in question from config_list "
            f"(exclude_op_names), or set speedup to false, which leaves them in the network as zeros."
        ) from error


def check_pruning(
    network: nn.Module, config: PruningConfig, plan: PruningPlan, teacher: Teacher, steps: int | None = None
) -> None:
    """Find out before the long work whether NNI takes the config for this network, and can shrink it.

    Args:
        network: the student as it will be pruned; left as it is.
        config: pruner and NNI's config list.
        plan: of this network and config.
        teacher: knows the input.
        steps: of a training that is fused with others; ``config.steps`` by default.

    Raises:
        UserError: arguments that NNI refuses, steps that end before the pruner does, a network that cannot be shrunk.
    """
    nni_pruner.check_arguments(config, config.steps if steps is None else steps)
    network = copy.deepcopy(network).to(teacher.device).requires_grad_(True)
    evaluator = DataFreeEvaluator(teacher, NoiseSource(teacher.spec, 2), quiet=True)
    nni_pruner.make_pruner(network, config, plan, evaluator).unwrap_model()
    if config.speedup and config.pruner != "LevelPruner":
        _try_to_shrink(network, config, plan, teacher)


def _try_to_shrink(network: nn.Module, config: PruningConfig, plan: PruningPlan, teacher: Teacher) -> None:
    """Shrink to masks of the weights' norms: which channels go differs, whether they can go does not."""
    from nni.compression.pruning import L1NormPruner

    config_list = copy.deepcopy(plan.config_list)
    settings = [setting for entry in config_list for setting in (entry, *entry.get("target_settings", {}).values())]
    if any(setting.get("sparse_threshold") is not None for setting in settings):
        return  # a threshold is meant for another measure than the norm
    for setting in settings:
        setting.pop("global_group_id", None)  # ranked together by norm, a layer might be left with nothing
    with nni_pruner.errors_as_sentences(config, (Exception,)):
        pruner = L1NormPruner(network, config_list)
        nni_pruner.track_activations(pruner, teacher.example_input())
        _, masks = pruner.compress()
        pruner.unwrap_model()
        weights = [mask for targets in masks.values() if (mask := targets.get("weight")) is not None]
        if not all(is_fine_grained(mask) for mask in weights if not mask.all()):
            _shrink(network, masks, plan, teacher)
