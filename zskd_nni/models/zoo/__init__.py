"""The papers' networks, exactly; one without normalisation; small trained teachers."""

from collections.abc import Callable

from torch import nn

from zskd_nni.models.zoo.alexnet import AlexNet, alexnet, alexnet_half
from zskd_nni.models.zoo.lenet import LeNet5, lenet5, lenet5_half
from zskd_nni.models.zoo.vgg import Vgg, vgg
from zskd_nni.models.zoo.wrn import WideResNet, wrn

FACTORIES: dict[str, Callable[..., nn.Module]] = {
    factory.__name__: factory for factory in (lenet5, lenet5_half, alexnet, alexnet_half, vgg, wrn)
}

__all__ = ["FACTORIES", "AlexNet", "LeNet5", "Vgg", "WideResNet", *FACTORIES]
