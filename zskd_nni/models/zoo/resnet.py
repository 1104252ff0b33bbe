"""The residual networks for 32x32 images of He et al. (CVPR 2016, section 4.2).

Where a block changes its width, the shortcut is a 1x1 convolution with BatchNorm (their option B), as in the trained
networks that most people have. Their own CIFAR networks pad with zeros (option A).
"""

from __future__ import annotations

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """conv3x3-BN-ReLU-conv3x3-BN, added to the shortcut; ``(N, in, H, W) -> (N, out, H/stride, W/stride)``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(out + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 convolution, three groups of ``blocks`` blocks, pooling, one linear layer.

    Args:
        blocks: of each group, n; the depth is ``6 n + 2``.
        num_classes: number of logits.
        in_channels: channels of the input image.
        widths: channels of each group.

    Shape:
        input ``(N, in_channels, 32, 32)``, output logits ``(N, num_classes)``.
    """

    def __init__(
        self,
        blocks: int = 3,
        num_classes: int = 10,
        in_channels: int = 3,
        widths: tuple[int, int, int] = (16, 32, 64),
    ) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        self.group1 = self._group(first, first, blocks, 1)
        self.group2 = self._group(first, second, blocks, 2)
        self.group3 = self._group(second, third, blocks, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _group(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))  # (N, widths[0], 32, 32)
        x = self.group3(self.group2(self.group1(x)))  # (N, widths[2], 8, 8)
        return self.fc(self.flatten(self.pool(x)))


def resnet20(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-20 for 32x32 images: 272,474 parameters at 10 classes.

    Example:
        >>> sum(parameter.numel() for parameter in resnet20().parameters())
        272474
    """
    return ResNet(3, num_classes, in_channels)
