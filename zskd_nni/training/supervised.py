"""Training a classifier on labelled images: how teachers are made, and the real-data ceilings.

Nothing that compresses a user's teacher comes here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.data.augmentation import Augmentation, augment
from zskd_nni.data.datasets import LabelledImages
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.runtime.device import to_device
from zskd_nni.runtime.rng import generator
from zskd_nni.training.checkpoint import Checkpoint, History
from zskd_nni.training.loop import cosine_schedule, fit, training_mode


@dataclass(frozen=True)
class SupervisedSettings:
    """How a classifier is trained on labels.

    Attributes:
        epochs: passes over the data.
        batch: images a step.
        optimizer: ``adamw`` or ``sgd`` (Nesterov momentum 0.9).
        learning_rate: at the top of the cosine.
        weight_decay: decoupled for AdamW.
        label_smoothing: in [0, 1).
        augmentation: what happens to each image.
        autocast: multiply in bfloat16; where processor or card can, up to twice as fast.
    """

    __pydantic_config__ = {"extra": "forbid"}

    epochs: int = 30
    batch: int = 128
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    label_smoothing: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    autocast: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer is adamw or sgd, not {self.optimizer!r}")
        if self.epochs < 1 or self.batch < 1 or not 0 < self.learning_rate < float("inf"):
            raise ValueError("epochs and batch must be at least 1 and learning_rate positive")


def train_supervised(
    model: nn.Module,
    data: LabelledImages,
    spec: InputSpec,
    settings: SupervisedSettings,
    *,
    seed: int = 0,
    device: str = "cpu",
    checkpoint: Path | None = None,
    fingerprint: str = "",
    label: str = "teacher",
    quiet: bool = False,
) -> History:
    """Train ``model`` in place on labels; the last epoch is the result."""
    model.to(device).to(memory_format=torch.channels_last)
    per_epoch = max(1, len(data) // settings.batch)
    steps = settings.epochs * per_epoch
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), settings.learning_rate, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
        )
    scheduler = cosine_schedule(optimizer, steps, warmup=min(per_epoch, steps // 10))
    order: dict[int, Tensor] = {}

    def loss(step: int, random: torch.Generator) -> Tensor:
        epoch, position = divmod(step, per_epoch)
        if epoch not in order:
            order.clear()
            order[epoch] = torch.randperm(len(data), generator=generator(seed, "order", epoch))
        index = order[epoch][position * settings.batch : (position + 1) * settings.batch]
        images = to_device(data.pixels(index, spec), device)
        images = augment(images, settings.augmentation, random, spec.low, spec.high)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=settings.autocast):
            logits = model(spec.normalise(images))
        labels = to_device(data.labels[index], device)
        return functional.cross_entropy(logits.float(), labels, label_smoothing=settings.label_smoothing)

    kept = None if checkpoint is None else Checkpoint(checkpoint, fingerprint)
    with training_mode(model):
        return fit(model, optimizer, scheduler, loss, steps=steps, seed=seed, label=label, checkpoint=kept, quiet=quiet)
