"""The networks on which rivals are compared, and what their rivals must know of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from torch import nn

from zskd_nni.data.datasets import LabelledImages, load_images
from zskd_nni.models.teacher import Teacher, load_teacher
from zskd_nni.models.zoo import AlexNet, LeNet5, ResNet

Maker = tuple[str, str | None]  # a layer, and the BatchNorm that its outputs go through


@dataclass(frozen=True)
class Link:
    """Channels that are the same: those who make them, and those who read them.

    Attributes:
        sums: the makers, in order. Those of one tuple are added before a ReLU, in a residual network also to what the
            tuple before them gave.
        readers: the layers behind them.
    """

    sums: tuple[tuple[Maker, ...], ...]
    readers: tuple[str, ...]

    @property
    def makers(self) -> tuple[Maker, ...]:
        """All of them."""
        return tuple(maker for added in self.sums for maker in added)

    @property
    def only(self) -> tuple[str, str | None, str] | None:
        """Layer, BatchNorm and reader, where there is one of each."""
        return (*self.makers[0], self.readers[0]) if len(self.makers) == len(self.readers) == 1 else None


Links = tuple[Link, ...]


@dataclass(frozen=True, eq=False)
class Pair:
    """A teacher, and recipes of ours for it.

    Attributes:
        teacher: its name in the zoo.
        data: the test set.
        links: of its layers, in the order of its forward pass.
        half: the network with half of the channels of its convolutions.
        pruned: our recipe of the same size, and its scale; read from ``results/``.
        quantized: by task, our recipe and the ``--set`` changes that make it one of this teacher.
        norm_first: whether a BatchNorm stands before its ReLU, and not behind it.
    """

    teacher: str
    data: str
    links: Links
    half: Callable[[], nn.Module]
    pruned: tuple[str, str | None]
    quantized: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    norm_first: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        """All convolutions and linear layers, in order."""
        modules = teacher_of(self).model.named_modules()
        return tuple(name for name, module in modules if isinstance(module, (nn.Conv2d, nn.Linear)))

    @property
    def convolutions(self) -> tuple[str, ...]:
        """Those that lose half of their channels."""
        model = teacher_of(self).model
        return tuple(name for name in self.layers if isinstance(model.get_submodule(name), nn.Conv2d))


def chain(layers: str, norms: str = "") -> Links:
    """Links of a network whose layers follow each other, in words separated by blanks.

    Between two layers, and between a layer and its normalisation, such a network has ReLU, dropout, max pooling and a
    response normalisation that hardly changes anything, so that a channel can be scaled before as well as after them.
    """
    names = layers.split()
    between = norms.split() or [None] * (len(names) - 1)
    return tuple(
        Link((((before, norm),),), (after,)) for before, norm, after in zip(names[:-1], between, names[1:], strict=True)
    )


def residual(groups: int, blocks: int) -> Links:
    """Links of the zoo's ResNet: the sums of each group, and the channels inside of each block."""
    links = []
    for group in range(1, groups + 1):
        names = [f"group{group}.{number}" for number in range(blocks)]
        sums: list[tuple[Maker, ...]] = [((f"{name}.conv2", f"{name}.bn2"),) for name in names]
        if group == 1:
            sums.insert(0, (("conv1", "bn1"),))
        else:
            sums[0] += ((f"{names[0]}.shortcut.0", f"{names[0]}.shortcut.1"),)
        following = f"group{group + 1}.0"
        behind = ["fc"] if group == groups else [f"{following}.conv1", f"{following}.shortcut.0"]
        readers = [f"{name}.conv1" for name in names[group > 1 :]]
        links.append(Link(tuple(sums), (*readers, *behind)))
        links += [Link((((f"{name}.conv1", f"{name}.bn1"),),), (f"{name}.conv2",)) for name in names]
    return tuple(links)


_FASHION = ("teacher.weights=zoo:lenet5-fashion-mnist", "evaluation.data=fashion-mnist")
_RESNET = (
    "teacher.model=zoo:resnet20",
    "teacher.arguments={}",
    "teacher.weights=zoo:resnet20-cifar10",
    "teacher.input={shape: [3, 32, 32], mean: [0.4914, 0.4822, 0.4465], std: [0.2023, 0.1994, 0.2010]}",
)
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
    "resnet20": Pair(
        "resnet20-cifar10",
        "cifar10",
        residual(3, 3),
        lambda: ResNet(3, widths=(8, 16, 32)),
        ("cifar10-resnet20-prune50-int8", "quick"),
        {
            "W8A8": ("cifar10-ptq8", _RESNET),
            "W4A8": ("cifar10-ptq-w4a8", _RESNET),
            "W4A4": ("cifar10-ptq-w4a4", _RESNET),
        },
        norm_first=True,
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
