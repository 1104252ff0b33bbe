"""The student on real labels: what it reaches without any teacher.

Cross-entropy on the labels, under the very optimiser, schedule, batches and augmentation of the distilled students, so
that a difference to real-data distillation is one of targets alone. This baseline reads real data.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.data.augmentation import augment
from zskd_nni.data.datasets import LabelledImages
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.memory_format import lay_out
from zskd_nni.models.teacher import first_tensor
from zskd_nni.research.baselines.labelled import LabelledBatches
from zskd_nni.runtime.device import to_device
from zskd_nni.runtime.files import fingerprint_of
from zskd_nni.training.checkpoint import Checkpoint, History
from zskd_nni.training.distillation import DistillationSettings, student_schedule
from zskd_nni.training.loop import fit, training_mode


def train_on_labels(
    student: nn.Module,
    data: LabelledImages,
    spec: InputSpec,
    settings: DistillationSettings,
    *,
    seed: int = 0,
    device: str = "cpu",
    checkpoint: Path | None = None,
    label: str = "real labels",
    quiet: bool = False,
) -> History:
    """Train ``student`` in place; it comes back in ``eval()`` mode, as its last step left it.

    Args:
        student: takes normalised images, gives logits.
        data: labelled images.
        spec: the student's input.
        settings: those of distillation; the temperature is of no meaning here.
        seed: names the random streams.
        device: cpu or cuda.
        checkpoint: a file to keep the state in; the same call again goes on from it.
        label: shown beside the progress.
        quiet: no progress.
    """
    lay_out(student.to(device), spec.example_input().to(device))
    optimizer, scheduler = student_schedule(student, settings)
    batches = LabelledBatches(data, spec, settings.batch, seed)

    def loss(step: int, random: torch.Generator) -> Tensor:
        images, labels = batches.batch(step)
        images, labels = to_device(images, device), to_device(labels, device)
        images = augment(images, settings.augmentation, random, spec.low, spec.high)
        return functional.cross_entropy(first_tensor(student(spec.normalise(images))), labels)

    kept = None
    if checkpoint is not None:
        shapes = [list(value.shape) for value in student.state_dict().values()]
        described = ["real labels", data.name, len(data), repr(asdict(settings)), seed, shapes]
        kept = Checkpoint(checkpoint, fingerprint_of(described))
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
            quiet=quiet,
        )
