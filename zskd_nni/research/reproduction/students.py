"""The student of a cell: built and trained with the cell's settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from zskd_nni.data.sources import TransferSource
from zskd_nni.methods.zskt.source import ZsktSource
from zskd_nni.methods.zskt.train import train_zskt
from zskd_nni.models.build import build_network
from zskd_nni.research.baselines.kd_at import train_kd_at
from zskd_nni.research.baselines.labelled import few_of_each, train_on_labels
from zskd_nni.research.reproduction.cells import Plan
from zskd_nni.research.reproduction.context import PairContext
from zskd_nni.runtime.rng import derive_seed
from zskd_nni.training.checkpoint import History
from zskd_nni.training.distillation import distill
from zskd_nni.training.loop import RunOptions


@dataclass(frozen=True)
class TrainedStudent:
    """A student after its training.

    Attributes:
        network: in ``eval()`` mode.
        history: its loss, and the seconds.
        images: number of distinct images it was trained on; None for a stream, or for no training at all.
    """

    network: nn.Module
    history: History
    images: int | None


def new_student(plan: Plan, seed: int) -> nn.Module:
    """The untrained student, with the weights that a recipe of that seed starts with."""
    reference, arguments = plan.network
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "student"))
        return build_network(reference, arguments).float()


def train_student(
    plan: Plan, context: PairContext, seed: int, source: TransferSource | None, checkpoint: Path
) -> TrainedStudent:
    """Train a new student with the cell's settings; its last step is the result.

    Raises:
        UserError: divergence, layers that do not match, a checkpoint of another run.
    """
    cell, teacher = plan.cell, context.teacher
    student = new_student(plan, seed).to(teacher.device)
    options: RunOptions = {
        "seed": derive_seed(seed, "distillation") % 2**31,
        "checkpoint": checkpoint,
        "label": f"{plan.name} seed {seed}",
        "quiet": context.workspace.quiet,
    }
    if cell.method == "none":
        return TrainedStudent(student.eval(), History(), None)
    if plan.zskt_trains_student:
        return TrainedStudent(student, train_zskt(student, teacher, plan.options, **options), None)
    if cell.method in ("real-labels", "kd-at"):
        data = context.training_images(plan.scale.training_images)
        if cell.shots is None:
            history = train_on_labels(student, data, teacher.spec, plan.student, **options)
        else:
            data = few_of_each(data, cell.shots, teacher.num_classes, seed)
            history = train_kd_at(student, teacher, data, plan.options, plan.student, **options)
        return TrainedStudent(student, history, len(data))
    if cell.method == "zskt":  # with a memory the student is trained as on any other source
        source = ZsktSource(teacher, plan.options, plan.student.batch, options["seed"])
    assert source is not None
    return TrainedStudent(student, distill(student, teacher, source, plan.student, **options), source.size)
