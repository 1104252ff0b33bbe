"""Training a classifier on labelled images: the zoo's teachers and the real-data baselines.

The compression of a user's teacher never imports this.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.data.augmentation import Augmentation, augment
from zskd_nni.data.datasets import LabelledImages
from zskd_nni.data.sources import EpochOrder
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.runtime.device import to_device
from zskd_nni.runtime.validation import Count, Positive, Settings, one_of
from zskd_nni.training.checkpoint import History
from zskd_nni.training.loop import RunOptions, TrainingRun, cosine_schedule, fit

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class SupervisedSettings(Settings):
    """How a classifier is trained on labels.

    Attributes:
        epochs: passes over the data.
        batch: images per step.
        optimizer: ``adamw`` or ``sgd`` (Nesterov momentum 0.9).
        learning_rate: at the top of the cosine.
        weight_decay: decoupled for AdamW.
        label_smoothing: in [0, 1).
        augmentation: what happens to each image.
        autocast: multiply in bfloat16; up to twice as fast where the CPU or GPU supports it.
    """

    epochs: Count = 30
    batch: Count = 128
    optimizer: Annotated[str, one_of("adamw", "sgd")] = "adamw"
    learning_rate: Positive = 2e-3
    weight_decay: float = 1e-2
    label_smoothing: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    autocast: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augmentation.mixes:
            raise ValueError("augmentation.cutmix and augmentation.mixup need a teacher: mixed images have no label")


def train_supervised(
    model: nn.Module,
    data: LabelledImages,
    spec: InputSpec,
    settings: SupervisedSettings,
    *,
    device: str = "cpu",
    identity: Any = None,
    **options: Unpack[RunOptions],
) -> History:
    """Train ``model`` in place on labels; the last epoch is the result.

    Args:
        model: takes normalised images, gives logits.
        data: images and labels.
        spec: the model's input.
        settings: epochs, optimiser, augmentation.
        device: where to train.
        identity: JSON-able, what a checkpoint must match beside data, settings, seed and the model's shapes.
        **options: ``seed``, ``checkpoint``, ``quiet`` and the other :class:`~zskd_nni.training.loop.RunOptions`.
    """
    model.to(device).to(memory_format=torch.channels_last)
    options.setdefault("label", "teacher")
    order = EpochOrder(len(data), settings.batch, options.get("seed", 0))
    steps = settings.epochs * order.batches
    described = [identity, data.name, len(data), asdict(spec), asdict(settings)]
    run = TrainingRun(steps, identity=described, **options)
    rate, decay = settings.learning_rate, settings.weight_decay
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=decay)
    scheduler = cosine_schedule(optimizer, steps, warmup=min(order.batches, steps // 10))

    def loss(step: int, random: torch.Generator) -> Tensor:
        index = order.rows(step)
        images = to_device(data.pixels(index, spec), device)
        images = augment(images, settings.augmentation, random, spec.low, spec.high)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=settings.autocast):
            logits = model(spec.normalise(images))
        labels = to_device(data.labels[index], device)
        return functional.cross_entropy(logits.float(), labels, label_smoothing=settings.label_smoothing)

    return fit(model, optimizer, scheduler, loss, run)
