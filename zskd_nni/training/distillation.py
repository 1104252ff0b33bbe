"""Distillation: the student imitates the teacher on a transfer source."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zskd_nni.data.augmentation import Augmentation, augment
from zskd_nni.data.sources import TransferSource
from zskd_nni.models.hooks import recording_outputs
from zskd_nni.models.memory_format import use_channels_last
from zskd_nni.models.teacher import Teacher, first_tensor
from zskd_nni.runtime.device import has_fast_bfloat16, to_device
from zskd_nni.runtime.distributed import team
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.gradients import with_gradients
from zskd_nni.runtime.rng import derive_seed
from zskd_nni.runtime.validation import Count, CountOrZero, NotNegative, Positive, check_bounds
from zskd_nni.training.checkpoint import History
from zskd_nni.training.data_parallel import DataParallel
from zskd_nni.training.hints import Hint, Pairs, Regressors, find_hints
from zskd_nni.training.loop import RunOptions, TrainingRun, cosine_schedule, fit
from zskd_nni.training.losses import distillation_loss, feature_loss
from zskd_nni.training.views import MakeViews, RepeatedViews, Views

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class DistillationSettings:
    """How a student is distilled.

    Attributes:
        temperature: of both softmaxes (ZSKD: 20).
        steps: optimiser steps; the last state is the result.
        batch: images a step.
        learning_rate: of Adam, at the top of the cosine.
        weight_decay: decoupled.
        warmup: steps of linear warm-up.
        features: hidden layers whose outputs are matched with the teacher's, beside the logits: ``none``, ``auto``, or
            pairs ``[teacher path, student path]``; see :mod:`zskd_nni.training.hints`.
        feature_weight: of each pair's :func:`zskd_nni.training.losses.feature_loss`.
        regressors: compare layers of different width, too, each through a linear map of its own that is thrown away
            after the training (FitNets).
        augmentation: what happens to each image; the teacher labels the augmented image.
        dropout: let the student's dropout layers drop while it is trained, outside trainings under NNI. The teacher's
            answers regularise already; a fresh student learns faster without.
        repeats: how often each view is shown, outside trainings under NNI. If more than once, the teacher's outputs are
            kept on disk meanwhile, which saves its share of the time (:mod:`zskd_nni.training.views`).
        autocast: run both networks in bfloat16, with losses, weights and optimiser in float32; ``auto``: if the
            hardware is faster in it.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> DistillationSettings(steps=500, augmentation=Augmentation(flip=0.5)).temperature
        20.0
    """

    __pydantic_config__ = {"extra": "forbid"}

    temperature: Positive = 20.0
    steps: Count = 8000
    batch: Count = 128
    learning_rate: Positive = 2e-3
    weight_decay: NotNegative = 0.0
    warmup: CountOrZero = 100
    features: str | Pairs = "none"
    feature_weight: NotNegative = 1.0
    regressors: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)
    dropout: bool = True
    repeats: Count = 1
    autocast: bool | Literal["auto"] = False

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.autocast not in (True, False, "auto"):
            raise ValueError(f"autocast is true, false or auto, not {self.autocast!r}")
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
    """Refuse a student with another input or other classes than the teacher.

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
            f"The student has {logits.shape[-1]} classes, the teacher {teacher.num_classes}; they must be the same."
        )


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def student_schedule(student: nn.Module, settings: DistillationSettings) -> tuple[Optimizer, LRScheduler]:
    """The optimiser and the schedule that every student of these settings gets, whatever it learns from."""
    optimizer = torch.optim.AdamW(
        student.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    return optimizer, cosine_schedule(optimizer, settings.steps, min(settings.warmup, settings.steps // 2))


@with_gradients()
def distill(
    student: nn.Module,
    teacher: Teacher,
    source: TransferSource,
    settings: DistillationSettings,
    kept: Mapping[str, Tensor] | None = None,
    **options: Unpack[RunOptions],
) -> History:
    """Train ``student`` in place to give the teacher's logits; the state after the last step stays, in ``eval()`` mode.

    Processes that share a process group of ``torch.distributed`` share the work: all of them call this with the same
    arguments, each takes its part of every batch, and all end with the same student. Batch and schedule are those of
    the settings.

    Args:
        student: takes what the teacher takes, on the teacher's device.
        teacher: labels every augmented image anew.
        source: the images.
        settings: temperature, schedule, augmentation.
        kept: layer -> the teacher's channels that pruning kept in it, such as ``PrunedNetwork.kept_channels``; with
            ``features: auto`` these channels are matched with the teacher's.
        **options: ``seed``, ``checkpoint``, ``quiet`` and the other :class:`~zskd_nni.training.loop.RunOptions`.

    Raises:
        UserError: the student does not fit the teacher, or the source's batches the settings; training diverges; or
            the checkpoint is of another run.

    Example:
        >>> from zskd_nni import DistillationSettings, NoiseSource, distill, load_teacher
        >>> teacher = load_teacher("lenet5-digits")
        >>> settings = DistillationSettings(steps=2, batch=8)
        >>> history = distill(teacher.student(), teacher, NoiseSource(teacher.spec, 8), settings, quiet=True)
        >>> history.steps, len(history.losses)
        ([2], 1)
    """
    check_student(student, teacher)
    _check_batches(source, settings)
    use_channels_last(student, teacher.spec.example_input().to(_device_of(student)))
    hints = find_hints(student, teacher, settings.features, kept, settings.regressors)
    if not settings.feature_weight:
        hints = ()
    regressors, trained = with_regressors(student, hints, options.get("seed", 0))
    optimizer, scheduler = student_schedule(trained, settings)
    shared = DataParallel(team())
    settings = replace(settings, autocast=_autocast(settings, teacher.device))  # a checkpoint tells it apart

    def precision() -> torch.autocast:
        return torch.autocast(teacher.device.type, torch.bfloat16, enabled=settings.autocast is True)

    def make_views(step: int, random: torch.Generator) -> Views:
        whole = transfer_batch(source, teacher, settings, step, random, student)
        if source.size is None:
            whole = shared.same(whole)
        images = shared.part(whole)
        with torch.no_grad(), precision(), recording_outputs(teacher.model, [hint.teacher for hint in hints]) as theirs:
            logits = teacher(images)
        hidden = tuple(hint.teacher_part(theirs[hint.teacher]) for hint in hints)
        return Views(images, logits, hidden, len(whole))

    repeated = repeated_views(make_views, source, settings, options.get("seed", 0))

    def loss(step: int, random: torch.Generator) -> Tensor:
        views = make_views(step, random) if repeated is None else repeated.batch(step)
        with shared.forward(), precision(), recording_outputs(student, [hint.student for hint in hints]) as ours:
            logits = first_tensor(student(teacher.spec.normalise(views.images)))
        value = distillation_loss(logits.float(), views.logits.float(), settings.temperature)
        for index, hint in enumerate(hints):
            target, output = views.hidden[index].float(), regressors.outputs(index, ours[hint.student].float())
            value = value + settings.feature_weight * feature_loss(output, target, shared.variance(target))
        return shared.weighted(value, len(views.images), views.whole)

    options.setdefault("label", "distillation")
    identity = distillation_identity(teacher, source, settings)
    run = TrainingRun(settings.steps, identity=identity, extra=source, shared=shared, **options)
    with nullcontext() if settings.dropout else without_dropout(student):
        return fit(trained, optimizer, scheduler, loss, run)


@contextmanager
def without_dropout(student: nn.Module) -> Iterator[None]:
    """Within the block the student's dropout modules pass everything on, also in training mode.

    Example:
        >>> layer = nn.Dropout(0.5)
        >>> with without_dropout(layer):
        ...     layer(torch.ones(3))
        tensor([1., 1., 1.])
        >>> layer.p
        0.5
    """
    layers = [module for module in student.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    chances = [layer.p for layer in layers]
    for layer in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, chance in zip(layers, chances, strict=True):
            layer.p = chance


def _check_batches(source: TransferSource, settings: DistillationSettings) -> None:
    if source.batch_size != (settings.batch if source.size is None else min(settings.batch, source.size)):
        raise UserError(
            f"The transfer source gives batches of {source.batch_size} images, the settings ask for {settings.batch} "
            "(DistillationSettings.batch); make them the same."
        )


def repeated_views(
    make: MakeViews, source: TransferSource, settings: DistillationSettings, seed: int
) -> RepeatedViews | None:
    """What shows each view several times; None where each is shown once.

    Raises:
        UserError: the source learns along with the student, so that its images cannot be made again.
    """
    if settings.repeats == 1:
        return None
    if source.state_dict():
        raise UserError(
            "distillation.repeats: the images of this transfer method change while the student is trained, so that "
            "each can be shown only once; leave repeats out."
        )
    return RepeatedViews(make, settings.repeats, derive_seed(seed, "views"))


def with_regressors(student: nn.Module, hints: Sequence[Hint], seed: int) -> tuple[Regressors, nn.Module]:
    """The hints' regressors, and the network to train: the student, together with the regressors if there are any."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "regressors"))
        regressors = Regressors(hints, next(student.parameters()))
    if not any(True for _ in regressors.parameters()):
        return regressors, student
    return regressors, nn.ModuleDict({"student": student, "regressors": regressors})


def _autocast(settings: DistillationSettings, device: torch.device) -> bool:
    return has_fast_bfloat16(device) if settings.autocast == "auto" else bool(settings.autocast)


def distillation_identity(teacher: Teacher, source: TransferSource, settings: DistillationSettings) -> list[Any]:
    """What a checkpoint of a training by this teacher on these images must match, JSON-able."""
    images = [source.fingerprint, source.batch_size, getattr(source, "seed", None)]  # which, and in what order
    return [teacher.fingerprint, images, asdict(settings)]
