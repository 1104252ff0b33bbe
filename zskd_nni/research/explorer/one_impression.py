"""One impression at a time: its target, the image during synthesis, and the teacher's predictions.

The method itself is elsewhere: targets come from :mod:`zskd_nni.methods.zskd`, images from :mod:`zskd_nni.synthesis`.
The explorer and the notebooks show what these functions return.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zskd_nni.data.procedural import start_images
from zskd_nni.methods.zskd import ZskdSettings, class_similarity, concentrations, sample_targets
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.rng import derive_seed, generator
from zskd_nni.synthesis import Impressions, ShardInputs, SynthesisSettings, synthesize_shard

GLIMPSES = 8


@dataclass(frozen=True)
class Question:
    """The settings of one impression.

    Attributes:
        label: class whose concentrations the target is drawn with.
        beta: scale of the concentrations, above 0; small ones give nearly one-hot targets.
        temperature: of the teacher's softmax during synthesis, above 0.
        total_variation: weight of the smoothness prior, 0 for none.
        steps: of the optimiser, at least 1.
        start: one of :data:`zskd_nni.data.procedural.KINDS`.
        seed: of target and start.
    """

    label: int = 0
    beta: float = 0.1
    temperature: float = 4.0
    total_variation: float = 1e-3
    steps: int = 60
    start: str = "uniform"
    seed: int = 0

    def settings(self) -> tuple[ZskdSettings, SynthesisSettings]:
        """The settings of target and synthesis.

        Raises:
            UserError: a value outside its range.
        """
        try:
            return ZskdSettings(betas=(self.beta,)), SynthesisSettings(
                temperature=self.temperature,
                # Two numbers, so that each image has a limit of its own.
                max_steps=(1, self.steps) if self.steps > 1 else self.steps,
                start=self.start,
                total_variation=(self.total_variation, self.total_variation),
            )
        except ValueError as error:
            raise UserError(f"That cannot be asked: {error}.") from error


@dataclass(frozen=True)
class Answer:
    """One impression at several steps of its synthesis.

    Attributes:
        similarity: ``(K, K)`` the teacher's class similarity.
        concentration: ``(K,)`` of the Dirichlet distribution that the target was drawn from.
        target: ``(K,)`` the soft target.
        steps: of the optimiser after which the image was looked at, from 0 on.
        images: ``(len(steps), C, H, W)`` the image at these steps, in the value range.
        fit: ``(len(steps),)`` ``KL(target || teacher)`` at the question's temperature.
        fitted: ``(len(steps), K)`` the teacher's probabilities at the question's temperature.
        seen: ``(len(steps), K)`` the same at temperature 1.
    """

    similarity: Tensor
    concentration: Tensor
    target: Tensor
    steps: list[int]
    images: Tensor
    fit: Tensor
    fitted: Tensor
    seen: Tensor


def explore_one(teacher: Teacher, question: Question, glimpses: int = GLIMPSES) -> Answer:
    """Draw a target, make one impression for it, and look at it during its synthesis.

    The image is made ``glimpses`` times with growing step limits, so that the engine itself is shown.

    Args:
        teacher: on the device to use.
        question: which impression.
        glimpses: number of looks, at least 2; the first is the start, the last the finished impression.

    Raises:
        UserError: a value of the question outside its range, or synthesis diverged.
    """
    limits = _steps_to_look_at(question.steps, glimpses)
    similarity, concentration, targets = _targets(teacher, question, 1)
    made = _synthesize(teacher, question, targets.expand(len(limits), -1), limits, same=True)
    return Answer(
        similarity=similarity,
        concentration=concentration,
        target=targets[0],
        steps=made.steps.tolist(),
        images=made.images,
        fit=made.fit,
        fitted=torch.softmax(made.logits / question.temperature, 1),
        seen=torch.softmax(made.logits, 1),
    )


def explore_class(teacher: Teacher, question: Question, count: int = 20) -> Impressions:
    """``count`` finished impressions of the question's class, each with a target and a start of its own.

    Raises:
        UserError: as :func:`explore_one`.
    """
    _, _, targets = _targets(teacher, question, count)
    return _synthesize(teacher, question, targets, [question.steps] * count, same=False)


def _targets(teacher: Teacher, question: Question, count: int) -> tuple[Tensor, Tensor, Tensor]:
    if not 0 <= question.label < teacher.num_classes:
        raise UserError(f"The teacher has classes 0 to {teacher.num_classes - 1}, not {question.label}.")
    settings, _ = question.settings()
    similarity = class_similarity(teacher.class_weights().cpu())
    concentration = concentrations(similarity, question.beta, settings)[question.label]
    drawn = sample_targets(
        concentration.expand(count, -1).double().numpy(), derive_seed(question.seed, "targets", question.label)
    )
    return similarity, concentration, torch.from_numpy(drawn).float()


def _synthesize(teacher: Teacher, question: Question, targets: Tensor, limits: list[int], same: bool) -> Impressions:
    _, settings = question.settings()
    count, drawn = len(limits), 1 if same else len(limits)
    starts, free = start_images(question.start, drawn, teacher.spec, generator(question.seed, "start"), settings.hold)
    copies = (count // drawn, 1, 1, 1)
    inputs = ShardInputs(
        targets=targets,
        starts=starts.repeat(copies),
        temperatures=torch.full((count, 1), question.temperature),
        prior=torch.full((count,), question.total_variation),
        limits=torch.tensor(limits, dtype=torch.float32),
        free=None if free is None else free.repeat(copies),
    )
    return synthesize_shard(teacher, inputs, settings)


def _steps_to_look_at(steps: int, count: int) -> list[int]:
    """0 to ``steps``, closer together at the start, where the image changes most; fewer if there are few steps."""
    spread = [round(steps * (place / (count - 1)) ** 2) for place in range(count)]
    return sorted({0, steps, *spread})
