"""The papers' networks, exactly, and small trained teachers."""

from collections.abc import Callable

from torch import nn

from zskd_nni.models.zoo.alexnet import AlexNet, alexnet, alexnet_half
from zskd_nni.models.zoo.lenet import LeNet5, lenet5, lenet5_half
from zskd_nni.models.zoo.wrn import WideResNet, wrn

FACTORIES: dict[str, Callable[..., nn.Module]] = {
    "lenet5": lenet5,
    "lenet5_half": lenet5_half,
    "alexnet": alexnet,
    "alexnet_half": alexnet_half,
    "wrn": wrn,
}

__all__ = [
    "FACTORIES",
    "AlexNet",
    "LeNet5",
    "WideResNet",
    "alexnet",
    "alexnet_half",
    "lenet5",
    "lenet5_half",
    "wrn",
]
