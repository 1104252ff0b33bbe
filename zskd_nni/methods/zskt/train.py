"""ZSKT as published: generator and student play the whole game (Micaelli & Storkey 2019, algorithm 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zskd_nni.methods.zskt.source import ZsktSettings, ZsktSource, _is_finite, cosine
from zskd_nni.models.hooks import recording_outputs
from zskd_nni.models.memory_format import use_channels_last
from zskd_nni.models.teacher import Teacher, first_tensor
from zskd_nni.training.attention_transfer import attention_pairs
from zskd_nni.training.checkpoint import History
from zskd_nni.training.distillation import check_student
from zskd_nni.training.loop import DivergenceError, RunOptions, TrainingRun, fit
from zskd_nni.training.losses import attention_distance, attention_map, belief_divergence

if TYPE_CHECKING:
    from typing_extensions import Unpack


def train_zskt(
    student: nn.Module,
    teacher: Teacher,
    settings: ZsktSettings | None = None,
    **options: Unpack[RunOptions],
) -> History:
    """Teach ``student`` in place by ZSKT; it comes back in ``eval()`` mode, as its last step left it.

    Args:
        student: takes what the teacher takes, on the teacher's device; trained in ``train()`` mode throughout.
        teacher: in ``eval()``, as ever.
        settings: the preset ``paper`` by default.
        **options: ``seed``, ``checkpoint`` (of generator, student, both optimisers and schedules), ``quiet`` and the
            other :class:`~zskd_nni.training.loop.RunOptions`.

    Returns:
        The student's loss along its ``rounds * student_steps`` steps.

    Raises:
        UserError: networks or attention layers that do not fit, a checkpoint of another run, or divergence (names
            the step; the last good checkpoint is kept).
    """
    settings = settings or ZsktSettings()
    check_student(student, teacher)
    use_channels_last(student, teacher.example_input())
    pairs = attention_pairs(student, teacher, settings.attention if settings.attention_weight else "none")
    options.setdefault("label", "ZSKT")
    source = ZsktSource(teacher, settings, settings.batch, options.get("seed", 0))
    identity = [source.fingerprint, [list(pair) for pair in pairs]]
    run = TrainingRun(settings.rounds * settings.student_steps, identity=identity, extra=source, **options)
    optimizer = torch.optim.Adam(student.parameters(), settings.student_learning_rate, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step // settings.student_steps, settings.rounds)
    )

    def clip(*_: Any) -> None:
        norm = nn.utils.clip_grad_norm_(student.parameters(), settings.clip)
        if not _is_finite(norm):
            raise DivergenceError("ZSKT diverged: the student's gradient is not finite in step {step}.")

    answered: tuple[Tensor, Tensor, list[Tensor]] | None = None

    def answer(images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The teacher's logits and attention maps, asked for once a batch of images."""
        nonlocal answered
        if answered is None or answered[0] is not images:
            paths = [path for path, _ in pairs]
            with torch.no_grad(), source.precision(), recording_outputs(teacher.model, paths) as outputs:
                logits = teacher.output(teacher.model(images))
            answered = images, logits, [attention_map(outputs[path].float()) for path in paths]
        return answered[1], answered[2]

    current = 0

    def loss(step: int, random: torch.Generator) -> Tensor:
        nonlocal current
        current = step
        images = source.normalised(step, random, student)
        answers, attended = answer(images)
        with source.precision(), recording_outputs(student, [path for _, path in pairs]) as outputs:
            beliefs = first_tensor(student(images))
        # Equation 3.
        value = belief_divergence(beliefs.float(), answers.float(), settings.temperature, settings.divergence)
        for (_, path), theirs in zip(pairs, attended, strict=True):
            distance = attention_distance(attention_map(outputs[path].float()), theirs, settings.attention_distance)
            value = value + settings.attention_weight * distance
        if not _is_finite(value.detach()):
            raise DivergenceError("ZSKT diverged: the student's loss is not finite in step {step}.")
        return value

    hook = optimizer.register_step_pre_hook(clip)
    try:
        return fit(student, optimizer, scheduler, loss, run)
    except DivergenceError as error:
        raise DivergenceError(str(error).replace("{step}", str(current))) from error
    finally:
        hook.remove()
