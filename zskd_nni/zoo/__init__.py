"""The papers' networks, exactly, and small trained teachers."""

from zskd_nni.zoo.alexnet import AlexNet, alexnet, alexnet_half
from zskd_nni.zoo.lenet import LeNet5, lenet5, lenet5_half
from zskd_nni.zoo.wrn import WideResNet, wrn

__all__ = ["AlexNet", "LeNet5", "WideResNet", "alexnet", "alexnet_half", "lenet5", "lenet5_half", "wrn"]
