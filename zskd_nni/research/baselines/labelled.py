"""Training on real labels: batches of labelled images, a few of each class, and the student without a teacher."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.data.augmentation import Augmentation, augment
from zskd_nni.data.datasets import LabelledImages
from zskd_nni.data.sources import EpochOrder
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.memory_format import use_channels_last
from zskd_nni.models.teacher import first_tensor
from zskd_nni.runtime.device import to_device
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.rng import generator
from zskd_nni.training.checkpoint import History
from zskd_nni.training.distillation import DistillationSettings, student_schedule
from zskd_nni.training.loop import RunOptions, TrainingRun, fit

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LabelledBatches:
    """Batches of a labelled set in a new order every epoch, as those of a stored transfer set.

    Args:
        data: images and labels.
        spec: the network's input.
        batch_size: images in a batch; a smaller set is one batch.
        seed: names the orders.
    """

    def __init__(self, data: LabelledImages, spec: InputSpec, batch_size: int, seed: int) -> None:
        self.data, self.spec = data, spec
        self._order = EpochOrder(len(data), batch_size, seed)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images ``(batch_size, C, H, W)`` in the value range and labels ``(batch_size,)`` of a step."""
        index = self._order.rows(step)
        return self.data.pixels(index, self.spec), self.data.labels[index]

    def augmented(
        self, step: int, augmentation: Augmentation, random: torch.Generator, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        """The same on a device, with the images augmented."""
        images, labels = (to_device(part, device) for part in self.batch(step))
        return augment(images, augmentation.unmixed, random, self.spec.low, self.spec.high), labels


def few_of_each(data: LabelledImages, count: int, classes: int, seed: int) -> LabelledImages:
    """``count`` images of each class, drawn by the seed; a smaller count draws the first of a larger one's.

    Raises:
        UserError: a class has fewer.
    """
    order = torch.randperm(len(data), generator=generator(seed, "few", len(data)))
    labels = data.labels[order]
    chosen = []
    for k in range(classes):
        found = order[labels == k][:count]
        if len(found) < count:
            raise UserError(f"{data.name} has {len(found)} images of class {k}, not {count}.")
        chosen.append(found)
    return data.subset(torch.cat(chosen))


def train_on_labels(
    student: nn.Module,
    data: LabelledImages,
    spec: InputSpec,
    settings: DistillationSettings,
    *,
    device: str = "cpu",
    **options: Unpack[RunOptions],
) -> History:
    """Train ``student`` in place with cross-entropy on labels; it comes back in ``eval()`` mode after its last step.

    Optimiser, schedule, batches and augmentation are those of the distilled students, so that a difference to
    distillation on real data is one of targets alone. This baseline reads real data.

    Args:
        student: takes normalised images, gives logits.
        data: labelled images.
        spec: the student's input.
        settings: those of distillation; temperature and features are ignored.
        device: cpu or cuda.
        **options: ``seed``, ``checkpoint``, ``quiet`` and the other :class:`~zskd_nni.training.loop.RunOptions`.
    """
    use_channels_last(student.to(device), spec.example_input().to(device))
    optimizer, scheduler = student_schedule(student, settings)
    options.setdefault("label", "real labels")
    run = TrainingRun(settings.steps, identity=["real labels", data.name, len(data), asdict(settings)], **options)
    batches = LabelledBatches(data, spec, settings.batch, run.seed)

    def loss(step: int, random: torch.Generator) -> Tensor:
        images, labels = batches.augmented(step, settings.augmentation, random, device)
        return functional.cross_entropy(first_tensor(student(spec.normalise(images))), labels)

    return fit(student, optimizer, scheduler, loss, run)
