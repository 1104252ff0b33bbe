"""The student on real labels: what it reaches without any teacher.

Cross-entropy on the labels, under the very optimiser, schedule, batches and augmentation of the distilled students, so
that a difference to real-data distillation is one of targets alone. This baseline reads real data.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.data.augmentation import augment
from zskd_nni.data.datasets import LabelledImages
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.memory_format import use_channels_last
from zskd_nni.models.teacher import first_tensor
from zskd_nni.research.baselines.labelled import LabelledBatches
from zskd_nni.runtime.device import to_device
from zskd_nni.training.checkpoint import History
from zskd_nni.training.distillation import DistillationSettings, student_schedule
from zskd_nni.training.loop import RunOptions, TrainingRun, fit

if TYPE_CHECKING:
    from typing_extensions import Unpack


def train_on_labels(
    student: nn.Module,
    data: LabelledImages,
    spec: InputSpec,
    settings: DistillationSettings,
    *,
    device: str = "cpu",
    **options: Unpack[RunOptions],
) -> History:
    """Train ``student`` in place; it comes back in ``eval()`` mode, as its last step left it.

    Args:
        student: takes normalised images, gives logits.
        data: labelled images.
        spec: the student's input.
        settings: those of distillation; the temperature is of no meaning here.
        device: cpu or cuda.
        **options: ``seed``, ``checkpoint``, ``quiet`` and the other :class:`~zskd_nni.training.loop.RunOptions`.
    """
    use_channels_last(student.to(device), spec.example_input().to(device))
    optimizer, scheduler = student_schedule(student, settings)
    options.setdefault("label", "real labels")
    identity = ["real labels", data.name, len(data), asdict(settings)]
    run = TrainingRun(settings.steps, identity=identity, **options)
    batches = LabelledBatches(data, spec, settings.batch, run.seed)

    def loss(step: int, random: torch.Generator) -> Tensor:
        images, labels = batches.batch(step)
        images, labels = to_device(images, device), to_device(labels, device)
        images = augment(images, settings.augmentation, random, spec.low, spec.high)
        return functional.cross_entropy(first_tensor(student(spec.normalise(images))), labels)

    return fit(student, optimizer, scheduler, loss, run)
