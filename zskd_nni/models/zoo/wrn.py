"""Wide residual networks for 32x32 images (Zagoruyko & Komodakis 2016), as used by ZSKT (Micaelli & Storkey 2019)."""

from __future__ import annotations

from torch import Tensor, nn


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv3x3-BN-ReLU-conv3x3 with a residual path; ``(N, in, H, W) -> (N, out, H/stride, W/stride)``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = (
            None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        # Where the width changes, the residual path starts after the activation, as in the authors' code.
        residual = x if self.shortcut is None else self.shortcut(activated)
        out = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return out + residual


class WideResNet(nn.Module):
    """WRN-depth-width: 16 channels, then three groups of ``(depth - 4) / 6`` blocks.

    Args:
        depth: total depth, ``6 n + 4``.
        width: widening factor k; the groups have 16k, 32k and 64k channels.
        num_classes: number of logits.
        in_channels: channels of the input image.

    Shape:
        input ``(N, in_channels, 32, 32)``, output logits ``(N, num_classes)``.

    Raises:
        ValueError: the depth is not ``6 n + 4``.
    """

    def __init__(self, depth: int, width: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"the depth of a wide residual network is 6 n + 4 (10, 16, 22, 28, 40, ...), not {depth}")
        blocks = (depth - 4) // 6
        widths = (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.group1 = self._group(widths[0], widths[1], blocks, 1)
        self.group2 = self._group(widths[1], widths[2], blocks, 2)
        self.group3 = self._group(widths[2], widths[3], blocks, 2)
        self.bn = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    @staticmethod
    def _group(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = PreActivationBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(PreActivationBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)  # (N, 16, 32, 32)
        x = self.group1(x)  # (N, 16k, 32, 32)
        x = self.group2(x)  # (N, 32k, 16, 16)
        x = self.group3(x)  # (N, 64k, 8, 8)
        x = self.flatten(self.pool(self.relu(self.bn(x))))
        return self.fc(x)


def wrn(depth: int = 40, width: int = 2, num_classes: int = 10, in_channels: int = 3) -> WideResNet:
    """WRN-depth-width: 16-1 has 0.175 M parameters, 16-2 0.69 M, 40-1 0.56 M, 40-2 2.24 M.

    Example:
        >>> sum(parameter.numel() for parameter in wrn(16, 1).parameters())
        175066
    """
    return WideResNet(depth, width, num_classes, in_channels)
