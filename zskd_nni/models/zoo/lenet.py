"""LeNet-5 and LeNet-5-Half for 32x32 images, the pair of the ZSKD paper (Nayak et al. 2019, section 4.1)."""

from __future__ import annotations

from torch import Tensor, nn


class LeNet5(nn.Module):
    """LeNet-5 with ReLU and max pooling.

    In LeNet-5-Half only the two convolutions are narrower; the fully connected layers keep their widths.

    Args:
        widths: channels of the two convolutions: ``(6, 16)`` is LeNet-5 (61,706 parameters),
            ``(3, 8)`` is LeNet-5-Half (35,820).
        in_channels: channels of the input image.
        num_classes: number of logits.

    Shape:
        input ``(N, in_channels, 32, 32)``, output logits ``(N, num_classes)``.
    """

    def __init__(self, widths: tuple[int, int] = (6, 16), in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        first, second = widths
        self.conv1 = nn.Conv2d(in_channels, first, 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(second * 5 * 5, 120)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(120, 84)
        self.relu4 = nn.ReLU()
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))  # (N, 6, 14, 14)
        x = self.pool2(self.relu2(self.conv2(x)))  # (N, 16, 5, 5)
        x = self.relu3(self.fc1(self.flatten(x)))
        x = self.relu4(self.fc2(x))
        return self.fc3(x)


def lenet5(num_classes: int = 10, in_channels: int = 1) -> LeNet5:
    """LeNet-5: 61,706 parameters at 10 classes and one input channel.

    Example:
        >>> sum(parameter.numel() for parameter in lenet5().parameters())
        61706
    """
    return LeNet5((6, 16), in_channels, num_classes)


def lenet5_half(num_classes: int = 10, in_channels: int = 1) -> LeNet5:
    """LeNet-5-Half: 35,820 parameters at 10 classes and one input channel.

    Example:
        >>> sum(parameter.numel() for parameter in lenet5_half().parameters())
        35820
    """
    return LeNet5((3, 8), in_channels, num_classes)
