"""NNI's pruners: checks of their configs, their default arguments, and their refusals as one sentence."""

from __future__ import annotations

import contextlib
import difflib
import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from nni.compression.base.config import default_config_schema
from torch import nn

from zskd_nni.compression.config_names import checked_config_list
from zskd_nni.compression.evaluator import DataFreeEvaluator
from zskd_nni.compression.nni_messages import REFUSALS, quiet, refusals_as_sentences
from zskd_nni.compression.pruning.dependency_config import PruningPlan, plan_pruning
from zskd_nni.compression.pruning.pruner_kinds import PRUNERS, WEIGHT_PRUNERS
from zskd_nni.compression.pruning.sparsity import with_exact_sparsity
from zskd_nni.models.hooks import evaluating
from zskd_nni.models.shared_modules import check_compressible
from zskd_nni.models.teacher import Teacher
from zskd_nni.recipes.compression_config import PruningConfig
from zskd_nni.runtime.errors import UserError, error_context


def is_data_driven(config: PruningConfig) -> bool:
    """Whether the masks depend on images, not on the weights alone."""
    return config.pruner not in WEIGHT_PRUNERS


def masks_change_in_training(config: PruningConfig) -> bool:
    """Whether the masks are only final at the end of the training."""
    return config.schedule is not None or config.pruner == "MovementPruner"


def needs_pseudo_labels(config: PruningConfig) -> bool:
    """Whether the training under the masks needs the teacher's choices as labels beside its logits.

    Gradients are scored before the student differs from its teacher, where the loss of the logits is flat.
    """
    return is_data_driven(config) and masks_change_in_training(config)


def pruning_plan(network: nn.Module, config: PruningConfig, teacher: Teacher) -> PruningPlan:
    """Trace the network once and complete the config so that the masks of connected layers agree.

    Args:
        network: the student as it will be pruned; left as it is.
        config: pruner and NNI's config list.
        teacher: knows the input.

    Raises:
        UserError: an unknown pruner, a config that NNI refuses, a network that cannot be traced or that the pruner
            cannot prune.
    """
    _check_pruner(network, config)
    network, example = deepcopy(network).cpu(), teacher.example_input().cpu()  # shrinking is done on the CPU as well
    with error_context("compression.pruning"):
        check_compressible(network, example)
    with error_context("compression.pruning.config_list"):
        config_list = checked_config_list(network, config.config_list, "pruning")
    with errors_as_sentences(config, (Exception,)):
        schema = default_config_schema("pruning")
        for entry in config_list:
            schema.validate(entry)
        if config.pruner == "LevelPruner":
            return PruningPlan(config_list)  # it prunes single weights, so no channels need to agree
        return plan_pruning(network, config_list, example)


def _check_pruner(network: nn.Module, config: PruningConfig) -> None:
    if config.pruner not in PRUNERS:
        near = difflib.get_close_matches(config.pruner, PRUNERS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PRUNERS)}."
        raise UserError(f"compression.pruning.pruner: NNI has no pruner {config.pruner!r}; {hint}")
    if config.pruner == "MovementPruner" and config.schedule is not None:
        raise UserError(
            "compression.pruning.schedule: MovementPruner has a schedule of its own (arguments: warmup_step, "
            "cooldown_begin_step); leave schedule out."
        )
    normalisations = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if config.pruner == "SlimPruner" and not any(isinstance(module, normalisations) for module in network.modules()):
        raise UserError(
            f"compression.pruning.pruner: SlimPruner ranks channels by the scale of their batch normalisation, and "
            f"{type(network).__name__} has none; use TaylorPruner or L1NormPruner."
        )


def make_pruner(network: nn.Module, config: PruningConfig, plan: PruningPlan, evaluator: DataFreeEvaluator) -> Any:
    """NNI's pruner around ``network``, under its schedule if there is one.

    Raises:
        UserError: NNI refuses the config or the arguments.
    """
    import nni.compression.pruning as nni_pruning

    # NNI ranks single weights by a view of them, which channels_last does not allow.
    network.to(memory_format=torch.contiguous_format)
    with errors_as_sentences(config, (Exception,)):
        arguments = {**default_arguments(config), **config.arguments}
        pruner = getattr(nni_pruning, config.pruner)(network, plan.config_list, evaluator, **arguments)
        with_exact_sparsity(pruner)
        track_activations(pruner, evaluator.get_dummy_input())
        if config.schedule is None:
            return pruner
        scheduled = getattr(nni_pruning, config.schedule.name)
        return scheduled(pruner, config.schedule.interval, config.schedule.total_times)


def track_activations(pruner: Any, dummy_input: Any) -> None:
    """Let a pruner know the shapes of the inputs and outputs that it masks, as ``track_forward`` does for NNI.

    Args:
        pruner: around its network.
        dummy_input: normalised images.
    """
    if any(target.startswith("_") for targets in pruner._target_spaces.values() for target in targets):
        with evaluating(pruner.bound_model):  # one pass with a mid-grey image must not move any statistic
            pruner.track_forward(dummy_input)


def default_arguments(config: PruningConfig) -> dict[str, Any]:
    """Arguments of the pruner's constructor that follow from ``steps``; ``config.arguments`` override them."""
    if config.pruner == "TaylorPruner":
        # Under a schedule NNI wants one score for each interval.
        return {"training_steps": config.schedule.interval if config.schedule else max(20, min(100, config.steps))}
    if config.pruner == "SlimPruner":
        # NNI's penalty of 1 shrinks all scales alike where the teacher is sure of its images, as of impressions.
        steps = config.schedule.interval if config.schedule else max(50, min(300, config.steps))
        return {"training_steps": steps, "regular_scale": 0.1}
    if config.pruner == "MovementPruner":
        steps = config.steps or 30  # its scores need a training even if the config asks for none
        return {"warmup_step": steps // 10, "cooldown_begin_step": steps * 2 // 3}
    return {}


def check_arguments(config: PruningConfig, steps: int) -> None:
    """Check that the steps a pruner is given, or that follow from ``steps``, fit into the training.

    Raises:
        UserError: names the argument.
    """
    if config.pruner == "MovementPruner" and 0 < steps < 2:
        raise UserError(f"compression.pruning.steps: MovementPruner needs at least 2 steps, not {steps}.")
    arguments = {**default_arguments(config), **config.arguments}
    where = "compression.pruning.arguments"
    for name, least in (("training_steps", 1), ("warmup_step", 0), ("cooldown_begin_step", 1)):
        value = arguments.get(name, least)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{where}.{name} must be a whole number of at least {least}, not {value!r}.")
    if config.schedule is not None and arguments.get("training_steps", 0) > config.schedule.interval:
        raise UserError(
            f"{where}.training_steps: {config.pruner} scores on {arguments['training_steps']} steps, and "
            f"compression.pruning.schedule.interval leaves it {config.schedule.interval}; give it at most as many."
        )
    if config.pruner == "MovementPruner":
        warmup, cooldown = arguments["warmup_step"], arguments["cooldown_begin_step"]
        if warmup >= cooldown:
            raise UserError(
                f"{where}.warmup_step: {warmup} must be less than cooldown_begin_step, which is {cooldown}."
            )
        if 0 < steps < cooldown:
            raise UserError(
                f"{where}.cooldown_begin_step: MovementPruner reaches the sparsity at step {cooldown}, and trains for "
                f"{steps} steps; give a smaller one or more compression.pruning.steps."
            )


def fold_slim_factors(pruner: Any) -> None:
    """Multiply the scaling factors of a fused SlimPruner into the weights; NNI drops them when it unwraps."""
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


@contextlib.contextmanager
def errors_as_sentences(config: PruningConfig, kinds: tuple[type[Exception], ...] = REFUSALS) -> Iterator[None]:
    """Raise NNI's refusals as a :class:`UserError`; silence its remarks on schedules."""
    with refusals_as_sentences(f"compression.pruning: NNI's {config.pruner}", kinds), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with quiet("nni.compression.pruning.scheduled_pruner"):
            yield
