"""Few-shot KD+AT: distillation and attention transfer on M real images a class. ZSKT compares itself with it.

With the attention map ``f(A) = 1 / N_c sum_c a_c^2`` of a layer (Zagoruyko & Komodakis, ICLR 2017, equation 2) and
``KL`` the mean over images *and classes*, the student's loss is

    L = (1 - alpha) CE(y, S(x)) + 2 alpha t^2 KL(softmax(T(x) / t) || softmax(S(x) / t))                            (1)
        + beta 3 / L sum_l mean (f(A_l^T) / |f(A_l^T)| - f(A_l^S) / |f(A_l^S)|)^2                                   (2)

as in the code that its authors released beside ZSKT (polo5/FewShotKnowledgeTransfer), with ``alpha = 0.9``,
``t = 4`` and ``beta = 1000`` for three layers; the paper does not give these values. The code trains by SGD at 0.1,
momentum 0.9, weight decay 5e-4, a fifth of the rate behind 30, 60 and 80 % of the steps, as many steps whatever M is
(``optimizer: sgd``). Networks without BatchNorm such as LeNet-5 diverge at that rate: ``optimizer: student`` takes the
optimiser and schedule of the pair's other students.

This baseline reads real data.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zskd_nni.data.datasets import LabelledImages
from zskd_nni.models.hooks import recording_outputs
from zskd_nni.models.memory_format import use_channels_last
from zskd_nni.models.teacher import Teacher, first_tensor
from zskd_nni.research.baselines.labelled import LabelledBatches
from zskd_nni.runtime.validation import Fraction, NotNegative, Positive, check_bounds, one_of
from zskd_nni.training.attention_transfer import attention_pairs
from zskd_nni.training.checkpoint import History
from zskd_nni.training.distillation import DistillationSettings, check_student, student_schedule
from zskd_nni.training.hints import Pairs
from zskd_nni.training.loop import RunOptions, TrainingRun, fit
from zskd_nni.training.losses import attention_loss, belief_divergence

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class KdAtSettings:
    """The three terms, and the optimiser.

    Attributes:
        alpha: weight of the teacher beside the labels, in [0, 1].
        temperature: t.
        attention: ``auto``, ``none``, or pairs ``[teacher path, student path]``, as for ZSKT.
        attention_weight: beta, for three layers.
        optimizer: ``sgd`` as published, or ``student``, that of the pair's other students.
        learning_rate: of SGD.
        momentum: of SGD.
        weight_decay: of SGD.

    Raises:
        ValueError: a value outside its range.
    """

    __pydantic_config__ = {"extra": "forbid"}

    alpha: Fraction = 0.9
    temperature: Positive = 4.0
    attention: str | Pairs = "auto"
    attention_weight: NotNegative = 1000.0
    optimizer: Annotated[str, one_of("sgd", "student")] = "sgd"
    learning_rate: Positive = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        check_bounds(self)


def stepped(done: int, steps: int) -> float:
    """Factor of the learning rate: a fifth after 30 %, again after 60 % and again after 80 % of the steps."""
    return 0.2 ** sum(done >= share * steps for share in (0.3, 0.6, 0.8))


def _optimizer(
    student: nn.Module, settings: KdAtSettings, schedule: DistillationSettings
) -> tuple[Optimizer, LRScheduler]:
    if settings.optimizer == "student":
        return student_schedule(student, schedule)
    optimizer = torch.optim.SGD(
        student.parameters(), settings.learning_rate, settings.momentum, weight_decay=settings.weight_decay
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: stepped(done, schedule.steps))


def train_kd_at(
    student: nn.Module,
    teacher: Teacher,
    data: LabelledImages,
    settings: KdAtSettings,
    schedule: DistillationSettings,
    **options: Unpack[RunOptions],
) -> History:
    """Train ``student`` in place; it comes back in ``eval()`` mode after its last step.

    Args:
        student: on the teacher's device.
        teacher: labels every augmented image.
        data: the few labelled images.
        settings: weights of the terms.
        schedule: steps, batch and augmentation; temperature and features are ignored.
        **options: ``seed``, ``checkpoint``, ``quiet`` and the other :class:`~zskd_nni.training.loop.RunOptions`.

    Raises:
        UserError: networks or attention layers that do not fit, divergence, a checkpoint of another run.
    """
    check_student(student, teacher)
    pairs = attention_pairs(student, teacher, settings.attention if settings.attention_weight else "none")
    use_channels_last(student, teacher.example_input())
    optimizer, scheduler = _optimizer(student, settings, schedule)
    options.setdefault("label", "KD+AT")
    identity = ["KD+AT", teacher.fingerprint, data.name, len(data), asdict(settings), asdict(schedule), pairs]
    run = TrainingRun(schedule.steps, identity=identity, **options)
    spec, batches = teacher.spec, LabelledBatches(data, teacher.spec, schedule.batch, run.seed)

    def loss(step: int, random: torch.Generator) -> Tensor:
        images, labels = batches.augmented(step, schedule.augmentation.unmixed, random, teacher.device)
        with torch.no_grad(), recording_outputs(teacher.model, [path for path, _ in pairs]) as attended:
            answers = teacher(images)
        with recording_outputs(student, [path for _, path in pairs]) as followed:
            logits = first_tensor(student(spec.normalise(images)))
        value = (1 - settings.alpha) * functional.cross_entropy(logits, labels)  # equation 1
        divergence = belief_divergence(logits, answers, settings.temperature, "elements")
        value = value + 2 * settings.alpha * settings.temperature**2 * divergence
        for ours, theirs in pairs:  # equation 2
            distance = attention_loss(followed[theirs], attended[ours])
            value = value + settings.attention_weight * 3 / len(pairs) * distance
        return value

    return fit(student, optimizer, scheduler, loss, run)
