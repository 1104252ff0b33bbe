"""Distillation: the student imitates the teacher on a transfer source."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zskd_nni.data.augmentation import Augmentation, augment
from zskd_nni.data.sources import TransferSource
from zskd_nni.models.memory_format import lay_out
from zskd_nni.models.teacher import Teacher, first_tensor, record_features
from zskd_nni.runtime.device import to_device
from zskd_nni.runtime.distributed import team
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import fingerprint_of
from zskd_nni.training.checkpoint import Checkpoint, History
from zskd_nni.training.data_parallel import DataParallel
from zskd_nni.training.hints import Pairs, feature_pairs
from zskd_nni.training.loop import cosine_schedule, fit, training_mode
from zskd_nni.training.losses import distillation_loss, feature_loss


@dataclass(frozen=True)
class DistillationSettings:
    """How the student is taught.

    Attributes:
        temperature: of both softmaxes (ZSKD: 20).
        steps: optimiser steps; the last state is the result.
        batch: images a step.
        learning_rate: of Adam, at the top of the cosine.
        weight_decay: decoupled.
        warmup: steps of linear warm-up.
        features: hidden layers that shall answer as the teacher's do, beside the logits: ``none``, ``auto``, or pairs
            ``[teacher path, student path]``; see :mod:`zskd_nni.training.hints`.
        feature_weight: of each pair's :func:`zskd_nni.training.losses.feature_loss`.
        augmentation: what happens to each image; the teacher labels what comes out.

    Raises:
        ValueError: a value outside its range.
    """

    __pydantic_config__ = {"extra": "forbid"}

    temperature: float = 20.0
    steps: int = 8000
    batch: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    warmup: int = 100
    features: str | Pairs = "none"
    feature_weight: float = 1.0
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        for name in ("temperature", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.steps < 1 or self.batch < 1:
            raise ValueError(f"steps and batch must be at least 1, not {self.steps} and {self.batch}")
        if not 0 <= self.weight_decay < float("inf") or self.warmup < 0:
            raise ValueError(f"weight_decay and warmup must not be negative: {self.weight_decay} and {self.warmup}")
        if not 0 <= self.feature_weight < float("inf"):
            raise ValueError(f"feature_weight must not be negative, not {self.feature_weight}")
        if isinstance(self.features, str) and self.features not in ("none", "auto"):
            raise ValueError(f"features is none, auto, or pairs of [teacher path, student path], not {self.features!r}")


def transfer_batch(
    source: TransferSource,
    teacher: Teacher,
    settings: DistillationSettings,
    step: int,
    random: torch.Generator,
    student: nn.Module | None = None,
) -> Tensor:
    """The augmented images ``(N, C, H, W)`` of a step, on the teacher's device, in its value range."""
    images = to_device(source.batch(step, random, student), teacher.device)
    return augment(images, settings.augmentation, random, teacher.spec.low, teacher.spec.high)


def check_student(student: nn.Module, teacher: Teacher) -> None:
    """Refuse a student that cannot answer the teacher's questions.

    Raises:
        UserError: it cannot take the teacher's input, or has another number of classes.
    """
    probe = copy.deepcopy(student).eval()
    try:
        with torch.no_grad():
            logits = first_tensor(probe(teacher.example_input().to(_device_of(student))))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"The student cannot take the teacher's input of shape {list(teacher.spec.shape)} ({error})."
        ) from error
    if logits.ndim != 2 or logits.shape[1] != teacher.num_classes:
        raise UserError(
            f"The student answers with {logits.shape[-1]} classes, the teacher with {teacher.num_classes}; "
            "they must be the same."
        )


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def student_schedule(student: nn.Module, settings: DistillationSettings) -> tuple[Optimizer, LRScheduler]:
    """The optimiser and the schedule that every student of these settings gets, whatever it learns from."""
    optimizer = torch.optim.AdamW(
        student.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    return optimizer, cosine_schedule(optimizer, settings.steps, min(settings.warmup, settings.steps // 2))


def distill(
    student: nn.Module,
    teacher: Teacher,
    source: TransferSource,
    settings: DistillationSettings,
    *,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    label: str = "distillation",
    after_step: Callable[[int], None] | None = None,
    quiet: bool = False,
) -> History:
    """Teach ``student`` in place; it comes back in ``eval()`` mode, as its last step left it.

    Processes that share a process group of ``torch.distributed`` share the work: all of them call this with the same
    arguments, each takes its part of every batch, and all end with the same student. Batch and schedule stay what the
    settings say.

    Args:
        student: takes what the teacher takes, on the teacher's device.
        teacher: answers every augmented image anew.
        source: the images.
        settings: temperature, schedule, augmentation.
        seed: names the random streams.
        checkpoint: a file to keep the state in; the same call again goes on from it.
        label: shown beside the progress.
        after_step: called with the number of finished steps; what it changes in the student is in the checkpoint.
        quiet: no progress.

    Raises:
        UserError: the student does not fit the teacher, or the source's batches the settings; training diverges; or
            the checkpoint is of another run.
    """
    check_student(student, teacher)
    wanted_batch = settings.batch if source.size is None else min(settings.batch, source.size)
    if source.batch_size != wanted_batch:
        raise UserError(
            f"The transfer source gives batches of {source.batch_size} images, the settings ask for {settings.batch} "
            "(DistillationSettings.batch); make them the same."
        )
    lay_out(student, teacher.example_input().to(_device_of(student)))
    optimizer, scheduler = student_schedule(student, settings)
    pairs = feature_pairs(student, teacher, settings.features) if settings.feature_weight else ()
    asked, answering = [path for path, _ in pairs], [path for _, path in pairs]

    shared = DataParallel(team())

    def loss(step: int, random: torch.Generator) -> Tensor:
        whole = transfer_batch(source, teacher, settings, step, random, student)
        if source.size is None:
            whole = shared.same(whole)
        images = shared.part(whole)
        with torch.no_grad(), record_features(teacher.model, asked) as wanted:
            answers = teacher(images)
        with shared.forward(), record_features(student, answering) as seen:
            logits = first_tensor(student(teacher.spec.normalise(images)))
        value = distillation_loss(logits, answers, settings.temperature)
        for theirs, ours in pairs:
            spread = shared.variance(wanted[theirs])
            value = value + settings.feature_weight * feature_loss(seen[ours], wanted[theirs], spread)
        return shared.weighed(value, len(images), len(whole))

    kept = None
    if checkpoint is not None:
        fingerprint = run_fingerprint(teacher, source, settings, seed, student)
        kept = Checkpoint(Path(checkpoint), fingerprint)
    with training_mode(student):
        return fit(
            student,
            optimizer,
            scheduler,
            loss,
            steps=settings.steps,
            seed=seed,
            label=label,
            checkpoint=kept,
            after_step=after_step,
            extra=source,
            shared=shared,
            quiet=quiet,
        )


def run_fingerprint(
    teacher: Teacher, source: TransferSource, settings: DistillationSettings, seed: int, student: nn.Module
) -> str:
    """What a checkpoint of this run must match."""
    shapes = {name: list(value.shape) for name, value in student.state_dict().items()}
    images = [source.fingerprint, source.batch_size, getattr(source, "seed", None)]  # which, and in what order
    return fingerprint_of([teacher.fingerprint, images, asdict(settings), seed, shapes])
