"""ZSKT as published: the whole training of generator and student (Micaelli & Storkey 2019, algorithm 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zskd_nni.methods.zskt.settings import ZsktSettings
from zskd_nni.methods.zskt.source import ZsktSource, finite_if_known
from zskd_nni.models.hooks import recording_outputs
from zskd_nni.models.memory_format import use_channels_last
from zskd_nni.models.teacher import Teacher, first_tensor
from zskd_nni.training.attention_transfer import attention_pairs
from zskd_nni.training.checkpoint import History
from zskd_nni.training.distillation import check_student
from zskd_nni.training.hints import Pairs
from zskd_nni.training.loop import DivergenceError, RunOptions, TrainingRun, cosine_factor, fit
from zskd_nni.training.losses import attention_distance, attention_map, belief_divergence

if TYPE_CHECKING:
    from typing_extensions import Unpack


def train_zskt(
    student: nn.Module,
    teacher: Teacher,
    settings: ZsktSettings | None = None,
    **options: Unpack[RunOptions],
) -> History:
    """Train ``student`` in place by ZSKT; it is in ``eval()`` mode afterwards, as its last step left it.

    Args:
        student: takes what the teacher takes, on the teacher's device; trained in ``train()`` mode throughout.
        teacher: stays in ``eval()`` mode.
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
        optimizer, lambda step: cosine_factor(step // settings.student_steps, settings.rounds)
    )
    objective = _StudentObjective(student, source, pairs)
    optimizer.register_step_pre_hook(objective.clip_gradients)
    return fit(student, optimizer, scheduler, objective.loss, run)


class _StudentObjective:
    """The student's loss on the source's images (equation 3), and the clipping of its gradient.

    Args:
        student: the network.
        source: the generator's side.
        pairs: paths ``(teacher's, student's)`` of the layers whose attention maps are compared.
    """

    def __init__(self, student: nn.Module, source: ZsktSource, pairs: Pairs) -> None:
        self.student, self.source, self.settings, self.teacher = student, source, source.settings, source.teacher
        self.of_teacher, self.of_student = [path for path, _ in pairs], [path for _, path in pairs]
        self.step = 0
        self._teacher_cache: tuple[Tensor, Tensor, list[Tensor]] | None = None  # images, logits, maps

    def loss(self, step: int, random: torch.Generator) -> Tensor:
        """``L_S``, a scalar; the generator takes its steps first where a round begins."""
        self.step, settings = step, self.settings
        x = self.source.normalised(step, random, self.student)
        answers, maps = self._teacher_output(x)
        with self.source.precision(), recording_outputs(self.student, self.of_student) as outputs:
            beliefs = first_tensor(self.student(x))
        loss = belief_divergence(beliefs.float(), answers.float(), settings.temperature, settings.divergence)
        for path, theirs in zip(self.of_student, maps, strict=True):
            distance = attention_distance(attention_map(outputs[path].float()), theirs, settings.attention_distance)
            loss = loss + settings.attention_weight * distance
        self._require_finite(loss.detach(), "loss")
        return loss

    def clip_gradients(self, *_: Any) -> None:
        """Called before each step of the student's optimiser."""
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.clip)
        self._require_finite(norm, "gradient")

    def _teacher_output(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The teacher's logits and attention maps; kept while the images stay the same."""
        if self._teacher_cache is None or self._teacher_cache[0] is not x:
            model = self.teacher.model
            with torch.no_grad(), self.source.precision(), recording_outputs(model, self.of_teacher) as outputs:
                logits = self.teacher.output(model(x))
            self._teacher_cache = x, logits, [attention_map(outputs[path].float()) for path in self.of_teacher]
        return self._teacher_cache[1], self._teacher_cache[2]

    def _require_finite(self, value: Tensor, what: str) -> None:
        if not finite_if_known(value):
            raise DivergenceError(f"ZSKT diverged: the student's {what} is not finite in step {self.step}.")
