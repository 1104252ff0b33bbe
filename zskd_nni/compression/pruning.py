"""Pruning a student under NNI while it is distilled, and shrinking it to what the masks leave."""

from __future__ import annotations

import copy
import difflib
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from zskd_nni.compression.pruning_config import plan_pruning
from zskd_nni.compression.speedup import shrink
from zskd_nni.distillation import DistillationSettings
from zskd_nni.errors import UserError
from zskd_nni.teacher import Teacher
from zskd_nni.transfer import TransferSource

if TYPE_CHECKING:
    from zskd_nni.recipe import PruningSection

NORM_PRUNERS = ("L1NormPruner", "L2NormPruner", "FPGMPruner")
PRUNERS = (*NORM_PRUNERS, "LevelPruner", "SlimPruner", "TaylorPruner", "MovementPruner")


def check_pruning(network: nn.Module, section: PruningSection, teacher: Teacher) -> None:
    """Find out before the long work begins whether NNI takes this config for this network.

    Raises:
        UserError: an unknown pruner, a config that NNI refuses, a network that cannot be traced.
    """
    network = copy.deepcopy(network).cpu()
    pruner, _ = _make_pruner(network, section, teacher, None)
    pruner.unwrap_model()


def prune(
    network: nn.Module,
    section: PruningSection,
    teacher: Teacher,
    source: TransferSource | None,
    distillation: DistillationSettings,
    *,
    seed: int,
    checkpoint: Path,
    quiet: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """Prune ``network``, distil it under the masks for ``section.steps`` steps, and shrink it.

    Args:
        network: the student, on the teacher's device; consumed.
        section: pruner, NNI's config list, steps.
        teacher: labels every image.
        source: what the student learns on; None prunes without training.
        distillation: temperature, batch, learning rate and augmentation of the training under the masks.
        seed: names the random streams.
        checkpoint: where the training keeps its state.
        quiet: no progress.

    Returns:
        The network and a JSON-able record: sparsity of every mask, widths of every layer, how it was checked.

    Raises:
        UserError: NNI refuses the config, or the shrunken network does not answer as the masked one.
    """
    from zskd_nni.compression.distiller import ZeroShotDistiller
    from zskd_nni.compression.evaluator import DataFreeEvaluator

    pruner, left_out = _make_pruner(network, section, teacher, source)
    if source is not None and section.steps > 0:
        evaluator = DataFreeEvaluator(teacher, source, distillation, seed=seed, checkpoint=checkpoint, quiet=quiet)
        if section.schedule is None:
            pruner.compress(None, None)  # NNI makes no masks of its own in a fused run
        distiller = ZeroShotDistiller.from_compressor(
            pruner, [], teacher, evaluator=evaluator, temperature=distillation.temperature
        )
        distiller.compress(max_steps=section.steps, max_epochs=None)
        masks = pruner.get_masks()
        distiller.unwrap_model()
        history = evaluator.histories[-1]
    else:
        history = None
        _, masks = pruner.compress(None, None) if section.schedule is None else (None, pruner.generate_masks())
        pruner.unwrap_model()
    network = network.cpu().eval()
    record: dict[str, Any] = {
        "pruner": section.pruner,
        "steps_under_masks": section.steps if source is not None else 0,
        "sparsity": {
            f"{name}.{target}": round(1 - float(mask.double().mean()), 6)
            for name, targets in masks.items()
            for target, mask in targets.items()
            if mask is not None
        },
        "left_out": left_out,
        "history": None if history is None else {"steps": history.steps, "losses": history.losses},
    }
    cpu_masks = {
        name: {target: None if mask is None else mask.cpu() for target, mask in targets.items()}
        for name, targets in masks.items()
    }
    if not section.speedup:
        record["shrunk"] = False
        return network, record
    result = shrink(network, cpu_masks, teacher.spec.normalise(teacher.spec.midpoint(2)))
    record.update(
        shrunk=result.shrunken,
        parameters_before=result.parameters_before,
        parameters_after=result.parameters_after,
        criterion=result.criterion,
        max_logit_difference=result.max_logit_difference,
        note=result.note,
        layers=[asdict(layer) for layer in result.layers],
    )
    return result.model, record


def _make_pruner(
    network: nn.Module, section: PruningSection, teacher: Teacher, source: TransferSource | None
) -> tuple[Any, dict[str, str]]:
    import nni.compression.pruning as nni_pruning

    if section.pruner not in PRUNERS:
        near = difflib.get_close_matches(section.pruner, PRUNERS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PRUNERS)}."
        raise UserError(f"compression.pruning.pruner: NNI has no pruner {section.pruner!r}; {hint}")
    if section.pruner not in NORM_PRUNERS:
        raise UserError(
            f"compression.pruning.pruner: {section.pruner} is not available in recipes yet; "
            f"use one of {', '.join(NORM_PRUNERS)}."
        )
    plan = plan_pruning(network, section.config_list, teacher.spec.normalise(teacher.spec.midpoint(2)).to(teacher.device))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            pruner = getattr(nni_pruning, section.pruner)(network, plan.config_list, **section.arguments)
            if section.schedule is not None:
                scheduled = getattr(nni_pruning, section.schedule.name)
                pruner = scheduled(pruner, section.schedule.interval, section.schedule.total_times)
    except UserError:
        raise
    except Exception as error:  # NNI's schema, assertions and key errors
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"compression.pruning: NNI's {section.pruner} refuses the config ({text}).") from error
    return pruner, plan.left_out

