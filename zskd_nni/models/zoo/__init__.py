"""The papers' networks, exactly; two that its users have; small trained teachers."""

from collections.abc import Callable

from torch import nn

from zskd_nni.models.zoo.alexnet import AlexNet, alexnet, alexnet_half
from zskd_nni.models.zoo.lenet import LeNet5, lenet5, lenet5_half
from zskd_nni.models.zoo.resnet import ResNet, resnet20
from zskd_nni.models.zoo.vgg import Vgg, vgg
from zskd_nni.models.zoo.wrn import WideResNet, wrn

FACTORIES: dict[str, Callable[..., nn.Module]] = {
    factory.__name__: factory for factory in (lenet5, lenet5_half, alexnet, alexnet_half, resnet20, vgg, wrn)
}

__all__ = ["FACTORIES", "AlexNet", "LeNet5", "ResNet", "Vgg", "WideResNet", *FACTORIES]
