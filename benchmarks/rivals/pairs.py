"""The networks on which rivals are compared, and what their rivals must know of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from torch import nn

from zskd_nni.data.datasets import LabelledImages, load_images
from zskd_nni.models.teacher import Teacher, load_teacher
from zskd_nni.models.zoo import AlexNet, LeNet5

# Between two layers, and between a layer and its normalisation, these networks have ReLU, dropout, max pooling and a
# response normalisation that hardly changes anything, so that a channel can be scaled before as well as after them.
Links = tuple[tuple[str, str | None, str], ...]


@dataclass(frozen=True, eq=False)
class Pair:
    """A teacher, and recipes of ours for it.

    Attributes:
        teacher: its name in the zoo.
        data: the test set.
        links: a layer, the BatchNorm that its outputs go through (after their ReLU), the layer that reads them.
        half: the network with half of the channels of its convolutions.
        pruned: our recipe of the same size, and its scale; read from ``results/``.
        quantized: by task, our recipe and the ``--set`` changes that make it one of this teacher.
    """

    teacher: str
    data: str
    links: Links
    half: Callable[[], nn.Module]
    pruned: tuple[str, str | None]
    quantized: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[str, ...]:
        """All convolutions and linear layers, in order."""
        return (self.links[0][0], *(after for _, _, after in self.links))

    @property
    def convolutions(self) -> tuple[str, ...]:
        """Those that lose half of their channels."""
        return tuple(name for name in self.layers if name.startswith("conv"))


def chain(layers: str, norms: str = "") -> Links:
    """Links of a network whose layers follow each other, in words separated by blanks."""
    names = layers.split()
    between = norms.split() or [None] * (len(names) - 1)
    return tuple(zip(names[:-1], between, names[1:], strict=True))


_FASHION = ("teacher.weights=zoo:lenet5-fashion-mnist", "evaluation.data=fashion-mnist")
# A residual network joins as one more entry: its links are those inside its blocks.
PAIRS = {
    "alexnet": Pair(
        "alexnet-cifar10",
        "cifar10",
        chain("conv1 conv2 conv3 conv4 conv5 fc6 fc7 fc8", "bn1 bn2 bn3 bn4 bn5 bn6 bn7"),
        lambda: AlexNet((24, 64, 96, 96, 64), bn_momentum=0.01),
        ("cifar10-prune50", "quick"),
        {"W8A8": ("cifar10-ptq8", ()), "W4A8": ("cifar10-ptq-w4a8", ()), "W4A4": ("cifar10-ptq-w4a4", ())},
    ),
    "lenet5": Pair(
        "lenet5-fashion-mnist",
        "fashion-mnist",
        chain("conv1 conv2 fc1 fc2 fc3"),
        lambda: LeNet5((3, 8)),
        ("fashion-mnist-taylor50", None),
        {
            "W8A8": ("mnist-ptq8", _FASHION),
            "W4A8": ("mnist-ptq-w4a8", _FASHION),
            "W4A4": ("mnist-ptq-w4a8", (*_FASHION, "compression.quantization.config_list.0.quant_dtype=int4")),
        },
    ),
}


@cache
def teacher_of(pair: Pair) -> Teacher:
    """The trained teacher."""
    return load_teacher(pair.teacher)


@cache
def test_images(pair: Pair) -> LabelledImages:
    """The test split: read once, for the last figure of each row."""
    return load_images(pair.data, "test")
