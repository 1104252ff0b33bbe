"""Pruning a student under NNI while it is distilled, and shrinking it to what the masks leave.

Pruners come in three kinds. Norm pruners read the weights. Scoring pruners (Taylor, Slim) read gradients: they are run
alone, on a copy whose weights rest, against the teacher's own choices, because a student that still equals its teacher
has no distillation gradient to read. Both make their masks once, and the student is then distilled under them.
Movement and everything under a schedule change their masks while the student learns, fused with the distiller.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nni
import torch
from nni.compression.base.config import default_config_schema
from torch import Tensor, nn

from zskd_nni.compression.evaluator import DataFreeEvaluator
from zskd_nni.compression.fuse import fused_distiller
from zskd_nni.compression.nni_config import modern_config_list
from zskd_nni.compression.pruning.dependency_config import plan_pruning
from zskd_nni.compression.pruning.masks import Masks, multiply_in, share_of_zeros
from zskd_nni.compression.pruning.speedup import CannotShrinkError, KeptChannels, ShrinkResult, is_fine_grained, shrink
from zskd_nni.data.sources import NoiseSource, TransferSource
from zskd_nni.models.shared_modules import check_layers
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError, error_context
from zskd_nni.training.distillation import DistillationSettings

if TYPE_CHECKING:
    from zskd_nni.recipes.compression_config import DistillerConfig, PruningConfig

NORM_PRUNERS = ("LevelPruner", "L1NormPruner", "L2NormPruner", "FPGMPruner")
SCORING_PRUNERS = ("TaylorPruner", "SlimPruner")
PRUNERS = (*NORM_PRUNERS, *SCORING_PRUNERS, "MovementPruner")
# How NNI refuses what it looks at in the middle of a run only. A full memory is no refusal.
OF_A_RUN = (AssertionError, AttributeError, KeyError, NotImplementedError, TypeError, ValueError)
_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class PrunedNetwork:
    """What pruning gave.

    Attributes:
        network: on the CPU, in ``eval()``; shrunken where the masks allow it.
        record: JSON-able: sparsity of every mask, widths of every layer, how it was checked.
        kept: which channels each module kept, for a quantizer's calibration; empty where nothing was removed.
        masks: of ``network``'s own weights: what is zero in it and must be held there by whoever trains it further
            (:func:`zskd_nni.compression.pruning.masks.held_at_zero`); empty where everything silenced was removed.
    """

    network: nn.Module
    record: dict[str, Any]
    kept: dict[str, KeptChannels]
    masks: Masks = field(default_factory=dict)


def is_data_driven(section: PruningConfig) -> bool:
    """Whether the masks come from images, not from the weights alone."""
    return section.pruner not in NORM_PRUNERS


def changes_masks_while_learning(section: PruningConfig) -> bool:
    """Whether the masks are only final at the end of the training."""
    return section.schedule is not None or section.pruner == "MovementPruner"


def check_pruning(network: nn.Module, section: PruningConfig, teacher: Teacher, steps: int | None = None) -> None:
    """Find out before the long work begins whether NNI takes this config for this network, and can shrink it.

    Args:
        network: the student as it will be pruned; left as it is.
        section: pruner and config.
        teacher: knows the input.
        steps: of the training under the pruner where it is fused with others; ``section.steps`` where absent.

    Raises:
        UserError: an unknown pruner, a config that NNI refuses, steps that end before the pruner does, a network that
            cannot be traced or shrunken or, for Slim, has no batch normalisation.
    """
    network = copy.deepcopy(network).to(teacher.device).requires_grad_(True)
    source = NoiseSource(teacher.spec, 2)
    _check_steps(section, section.steps if steps is None else steps)
    with error_context("compression.pruning"):
        check_layers(network, teacher.example_input())
    pruner, _ = make_pruner(network, section, DataFreeEvaluator(teacher, source, quiet=True), teacher)
    pruner.unwrap_model()
    if section.speedup:
        _try_to_shrink(network, section, teacher)


def _check_steps(section: PruningConfig, steps: int) -> None:
    """The numbers of steps that a pruner is told, or that follow from ``steps``, must fit into the training."""
    arguments = {**default_arguments(section), **section.arguments}
    where = "compression.pruning.arguments"
    if section.pruner in SCORING_PRUNERS:
        _check_number(arguments["training_steps"], 1, f"{where}.training_steps")
        if section.schedule is not None and arguments["training_steps"] > section.schedule.interval:
            raise UserError(
                f"{where}.training_steps: {section.pruner} scores on {arguments['training_steps']} steps, and "
                f"compression.pruning.schedule.interval leaves it {section.schedule.interval}; give it at most as many."
            )
    if section.pruner == "MovementPruner" and section.schedule is None:
        if 0 < steps < 2:
            raise UserError(f"compression.pruning.steps: MovementPruner needs at least 2 steps, not {steps}.")
        warmup, cooldown = arguments["warmup_step"], arguments["cooldown_begin_step"]
        _check_number(warmup, 0, f"{where}.warmup_step")
        _check_number(cooldown, 1, f"{where}.cooldown_begin_step")
        if warmup >= cooldown:
            raise UserError(
                f"{where}.warmup_step: {warmup} must be less than cooldown_begin_step, which is {cooldown}."
            )
        if 0 < steps < cooldown:
            raise UserError(
                f"{where}.cooldown_begin_step: MovementPruner reaches the sparsity at step {cooldown}, and trains for "
                f"{steps} steps; give a smaller one or more compression.pruning.steps."
            )


def _check_number(value: Any, least: int, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{where} must be a whole number of at least {least}, not {value!r}.")


def _try_to_shrink(network: nn.Module, section: PruningConfig, teacher: Teacher) -> None:
    """Shrink a copy to masks of the weights' norms: which channels go differs, whether they can go does not."""
    if section.pruner == "LevelPruner":
        return
    import nni.compression.pruning as nni_pruning

    with refusals(section):
        config_list, _ = _config_list(network, section, teacher)
        settings = [
            setting for config in config_list for setting in (config, *config.get("target_settings", {}).values())
        ]
        if any(setting.get("sparse_threshold") is not None for setting in settings):
            return  # it is meant for another measure than the norm
        for setting in settings:
            setting.pop("global_group_id", None)  # ranked together by this measure, a layer might be left with nothing
        pruner = nni_pruning.L1NormPruner(network, config_list)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        weights = [mask for targets in masks.values() if (mask := targets.get("weight")) is not None]
        if all(is_fine_grained(mask) for mask in weights if not mask.all()):
            return  # nobody asked for channels to go
        _shrunken(network, masks, teacher)


def _shrunken(network: nn.Module, masks: Masks, teacher: Teacher) -> ShrinkResult:
    try:
        return shrink(network, masks, teacher.example_input())
    except CannotShrinkError as error:
        # The config is from complete_config_list already, which the error itself would advise.
        raise UserError(
            f"compression.pruning: {error.reason}; exclude the layers in question from config_list "
            f"(exclude_op_names), or set speedup to false, which leaves them in the network as zeros."
        ) from error


def prune(
    network: nn.Module,
    section: PruningConfig,
    teacher: Teacher,
    source: TransferSource | None,
    distillation: DistillationSettings,
    *,
    scores: TransferSource | None = None,
    distiller: DistillerConfig | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    quiet: bool = False,
) -> PrunedNetwork:
    """Prune ``network``, distil it under the masks for ``section.steps`` steps, and shrink it.

    Args:
        network: the student, on the teacher's device; consumed.
        section: pruner, NNI's config list, steps.
        teacher: labels every image.
        source: what the student learns on; None prunes without training.
        distillation: temperature, batch, learning rate and augmentation of the training under the masks.
        scores: what a pruner that needs images is run on; ``source`` where absent.
        distiller: another than the logits' own.
        seed: names the random streams.
        checkpoint: where the training keeps its state, if anywhere.
        quiet: no progress.

    Raises:
        UserError: NNI refuses the config, or the shrunken network does not answer as the masked one.
    """
    history = None
    if source is not None and section.steps > 0:
        evaluator = DataFreeEvaluator(
            teacher,
            source,
            distillation,
            seed=seed,
            checkpoint=checkpoint,
            pseudo_labels=learns_from_choices(section),
            label="distillation under masks",
            quiet=quiet,
        )
        pruner, left_out = started_pruner(network, section, teacher, scores or source, evaluator, seed, quiet)
        top = fused_distiller(
            pruner, distiller, teacher, evaluator, distillation.temperature, float(learns_from_choices(section))
        )
        with refusals(section, OF_A_RUN):
            top.compress(max_steps=section.steps, max_epochs=None)
        masks = pruner.get_masks()
        top.unwrap_model()
        fold_slim_factors(pruner)
        history = evaluator.histories[-1]
    else:
        masks, left_out = one_shot_masks(network, section, teacher, scores or source, distillation, seed, quiet)
    return shrunken_to_masks(network, masks, section, teacher, left_out, history)


def started_pruner(
    network: nn.Module,
    section: PruningConfig,
    teacher: Teacher,
    scores: TransferSource,
    evaluator: DataFreeEvaluator,
    seed: int,
    quiet: bool = False,
) -> tuple[Any, dict[str, str]]:
    """A pruner around ``network``, ready to be fused: with its masks, or with a schedule to make them by.

    Returns:
        The pruner, and which layers keep all their channels and why.
    """
    if changes_masks_while_learning(section):
        return make_pruner(network, section, evaluator, teacher)
    masks, left_out = one_shot_masks(network, section, teacher, scores, evaluator.settings, seed, quiet)
    # Any pruner that nothing triggers holds the masks it is given.
    import nni.compression.pruning as nni_pruning

    holder = "LevelPruner" if section.pruner == "LevelPruner" else "L1NormPruner"
    with refusals(section):
        config_list, _ = _config_list(network, section, teacher)
        pruner = getattr(nni_pruning, holder)(network, config_list, evaluator)
    pruner.update_masks(masks)
    return pruner, left_out


def one_shot_masks(
    network: nn.Module,
    section: PruningConfig,
    teacher: Teacher,
    scores: TransferSource | None,
    distillation: DistillationSettings,
    seed: int,
    quiet: bool = False,
) -> tuple[Masks, dict[str, str]]:
    """The masks of ``network`` as it is; a schedule has no say in them.

    A pruner that needs images is run on a copy, so that the network's weights stay what they are.

    Args:
        network: on the teacher's device; left as it is.
        section: pruner and config.
        teacher: whose choices are the labels that NNI's gradients need.
        scores: the images; may be None for a pruner that reads the weights alone.
        distillation: batch and augmentation.
        seed: names the random streams.
        quiet: no progress.

    Returns:
        The masks, and which layers keep all their channels and why.
    """
    copied = copy.deepcopy(network).requires_grad_(True)
    unscheduled = dataclasses.replace(section, schedule=None)
    optimizer = None
    if section.pruner in SCORING_PRUNERS:
        # The scores are those of the weights as they are: they must not run away while they are scored.
        optimizer = nni.trace(torch.optim.SGD)(copied.parameters(), lr=0.0)
    if is_data_driven(section) and scores is None:
        raise UserError(f"{section.pruner} needs images to score the channels on.")
    evaluator = DataFreeEvaluator(
        teacher,
        scores or NoiseSource(teacher.spec, 2),
        distillation,
        seed=seed,
        pseudo_labels=True,
        optimizers=optimizer,
        label=f"scores of {section.pruner}",
        quiet=quiet,
    )
    pruner, left_out = make_pruner(copied, unscheduled, evaluator, teacher)
    with refusals(section, OF_A_RUN):
        if section.pruner == "MovementPruner":
            _, masks = pruner.compress(max(section.steps, pruner.cooldown_begin_step), None)
        else:
            _, masks = pruner.compress()
    pruner.unwrap_model()
    return masks, left_out


def shrunken_to_masks(
    network: nn.Module,
    masks: Masks,
    section: PruningConfig,
    teacher: Teacher,
    left_out: dict[str, str],
    history: Any = None,
) -> PrunedNetwork:
    """Remove what the masks zero; where that is no whole channel, or not wanted, multiply them into the weights."""
    network = network.cpu().eval()
    cpu_masks: Masks = {
        name: {target: None if mask is None else mask.cpu() for target, mask in targets.items()}
        for name, targets in masks.items()
    }
    record: dict[str, Any] = {
        "pruner": section.pruner,
        "schedule": None if section.schedule is None else section.schedule.name,
        "scored_on_images": is_data_driven(section),
        "steps_under_masks": 0 if history is None else section.steps,
        "sparsity": {
            f"{name}.{target}": round(1 - float(mask.double().mean()), 6)
            for name, targets in cpu_masks.items()
            for target, mask in targets.items()
            if mask is not None
        },
        "removed_channels": _removed_channels(cpu_masks),
        "left_out": left_out,
        "history": None if history is None else {"steps": history.steps, "losses": history.losses},
    }
    if not section.speedup:
        multiply_in(network, cpu_masks)
        record.update(
            shrunk=False, note="speedup is off: the masks are multiplied into the weights, nothing was removed"
        )
        record["zeros"] = share_of_zeros(network, record["sparsity"])
        return PrunedNetwork(network, record, {}, _held(network, cpu_masks))
    result = _shrunken(network, cpu_masks, teacher)
    note = result.note
    if not result.shrunken:
        note = f"{note}; the masks are multiplied into the weights, the network is as large as before"
    record.update(
        shrunk=result.shrunken,
        parameters_before=result.parameters_before,
        parameters_after=result.parameters_after,
        criterion=result.criterion,
        max_logit_difference=result.max_logit_difference,
        note=note,
        zeros=share_of_zeros(result.model, record["sparsity"]),
        layers=[asdict(layer) for layer in result.layers],
    )
    if result.shrunken:
        masks_left = _held_beside_channels(result.model, cpu_masks, result.kept)
    else:
        masks_left = _held(result.model, cpu_masks)
    return PrunedNetwork(result.model, record, result.kept, masks_left)


def learns_from_choices(section: PruningConfig) -> bool:
    """Whether the fused training needs the teacher's choices as labels beside its logits.

    Scores of gradients begin before the student differs from its teacher, where the logits' loss is flat.
    """
    return is_data_driven(section) and changes_masks_while_learning(section)


def make_pruner(
    network: nn.Module, section: PruningConfig, evaluator: DataFreeEvaluator, teacher: Teacher
) -> tuple[Any, dict[str, str]]:
    """NNI's pruner around ``network``, under its schedule where there is one.

    Returns:
        The pruner, and which layers keep all their channels and why.

    Raises:
        UserError: an unknown pruner, or a config or arguments that NNI refuses.
    """
    import nni.compression.pruning as nni_pruning

    if section.pruner not in PRUNERS:
        near = difflib.get_close_matches(section.pruner, PRUNERS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PRUNERS)}."
        raise UserError(f"compression.pruning.pruner: NNI has no pruner {section.pruner!r}; {hint}")
    if section.pruner == "MovementPruner" and section.schedule is not None:
        raise UserError(
            "compression.pruning.schedule: MovementPruner has a schedule of its own (arguments: warmup_step, "
            "cooldown_begin_step); leave schedule out."
        )
    if section.pruner == "SlimPruner" and not any(isinstance(m, _NORMALISATIONS) for m in network.modules()):
        raise UserError(
            f"compression.pruning.pruner: SlimPruner ranks channels by the scale of their batch normalisation, and "
            f"{type(network).__name__} has none; use TaylorPruner or L1NormPruner."
        )
    # NNI ranks single weights by a view of them, which channels_last does not allow.
    network.to(memory_format=torch.contiguous_format)
    with refusals(section):
        config_list, left_out = _config_list(network, section, teacher)
        arguments = {**default_arguments(section), **section.arguments}
        pruner = getattr(nni_pruning, section.pruner)(network, config_list, evaluator, **arguments)
        if section.schedule is not None:
            scheduled = getattr(nni_pruning, section.schedule.name)
            pruner = scheduled(pruner, section.schedule.interval, section.schedule.total_times)
    return pruner, left_out


def default_arguments(section: PruningConfig) -> dict[str, Any]:
    """What a pruner's constructor asks for beyond the config, derived from ``steps``; ``arguments`` go over it."""
    if section.pruner == "TaylorPruner":
        if section.schedule is not None:  # one score for each interval, or NNI refuses
            return {"training_steps": section.schedule.interval}
        return {"training_steps": max(20, min(100, section.steps))}
    if section.pruner == "SlimPruner":
        # NNI's penalty of 1 shrinks every scale alike where the teacher is sure of its images, as of impressions.
        steps = section.schedule.interval if section.schedule is not None else max(50, min(300, section.steps))
        return {"training_steps": steps, "regular_scale": 0.1}
    if section.pruner == "MovementPruner":
        steps = section.steps or 30  # without a training of its own it still needs one for its scores
        return {"warmup_step": steps // 10, "cooldown_begin_step": steps * 2 // 3}
    return {}


def fold_slim_factors(pruner: Any) -> None:
    """Multiply the scales that a fused Slim has trained into the weights, which NNI's unwrapping leaves without."""
    from nni.compression.pruning.slim_pruner import SLIM_SCALING_FACTOR_PNAME

    for spaces in pruner._target_spaces.values():
        for target, space in spaces.items():
            factor = getattr(space._wrapper, SLIM_SCALING_FACTOR_PNAME.format(target), None)
            if factor is None:
                continue
            if space._scaler is not None:
                factor = space._scaler.expand(factor, space.shape, keepdim=True, full_expand=False)
            with torch.no_grad():
                getattr(space._wrapper.module, target).mul_(factor)


def _config_list(
    network: nn.Module, section: PruningConfig, teacher: Teacher
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    schema = default_config_schema("pruning")
    config_list = modern_config_list(section.config_list, "pruning")
    for config in config_list:
        schema.validate(config)
    if section.pruner == "LevelPruner":
        return config_list, {}  # single weights, not channels: nothing is to be aligned
    dummy = teacher.example_input().to(next(network.parameters()).device)
    plan = plan_pruning(network, config_list, dummy)
    return plan.config_list, plan.left_out


@contextlib.contextmanager
def refusals(section: PruningConfig, kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """NNI's schema, assertions and key errors as one sentence; its remarks on schedules are not for the user."""
    logger = logging.getLogger("nni.compression.pruning.scheduled_pruner")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except UserError:
        raise
    except kinds as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"compression.pruning: NNI's {section.pruner} refuses the config ({text}).") from error
    finally:
        logger.setLevel(level)


def _held(network: nn.Module, masks: Masks) -> Masks:
    """Those of the masks that silence something in a parameter of ``network``, which is as large as before."""
    held: Masks = {}
    for name, targets in masks.items():
        parameters = dict(network.get_submodule(name).named_parameters(recurse=False))
        for target, mask in targets.items():
            if mask is not None and target in parameters and not bool(mask.all()):
                held.setdefault(name, {})[target] = mask.expand(parameters[target].shape).clone()
    return held


def _held_beside_channels(network: nn.Module, masks: Masks, kept: Mapping[str, KeptChannels]) -> Masks:
    """Of a network that lost whole channels: what was silenced beside them and is still there, by its own shape.

    Single weights, or channels that could not be removed. What a folded constant has taken from zero is free.
    """
    modules = dict(network.named_modules())
    held: Masks = {}
    for name, targets in masks.items():
        for target, mask in targets.items():
            parameter = getattr(modules.get(name), target, None)
            if mask is None or bool(mask.all()) or not isinstance(parameter, nn.Parameter):
                continue
            silenced = parameter.detach() == 0
            cut = _cut_as(mask, parameter, kept.get(name))
            if cut is not None:
                silenced &= cut == 0
            if bool(silenced.any()):
                held.setdefault(name, {})[target] = (~silenced).to(mask.dtype)
    return held


def _cut_as(mask: Tensor, parameter: Tensor, kept: KeptChannels | None) -> Tensor | None:
    """The mask of what is left of a parameter; None where it cannot be told, as of a grouped convolution's inputs."""
    for axis, positions in enumerate(() if kept is None else (kept.outputs, kept.inputs)):
        if axis < mask.ndim and mask.shape[axis] != parameter.shape[axis] and int(positions.max()) < mask.shape[axis]:
            mask = mask.index_select(axis, positions)
    return mask if mask.shape == parameter.shape else None


def _removed_channels(masks: Masks) -> dict[str, list[int]]:
    """By module: positions of the output channels whose whole weight is masked."""
    removed = {}
    for name, targets in masks.items():
        weight = targets.get("weight")
        if weight is not None and weight.ndim > 1:
            gone = (~weight.flatten(1).any(1)).nonzero().flatten().tolist()
            if gone:
                removed[name] = gone
    return removed
