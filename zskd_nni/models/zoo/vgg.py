"""A small network of the VGG kind for 32x32 images: convolutions, ReLU and pooling, no normalisation at all.

It stands for the colour teachers that have no BatchNorm, whose training data has left no statistics in them.
"""

from __future__ import annotations

from torch import Tensor, nn


class Vgg(nn.Module):
    """Three stages of two 3x3 convolutions, each ended by pooling, then two fully connected layers.

    Args:
        widths: channels of the three stages.
        hidden: units of the hidden fully connected layer.
        in_channels: channels of the input image.
        num_classes: number of logits.

    Shape:
        input ``(N, in_channels, 32, 32)``, output logits ``(N, num_classes)``.
    """

    def __init__(
        self,
        widths: tuple[int, int, int] = (48, 96, 192),
        hidden: int = 256,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = in_channels
        for width in widths:
            for _ in range(2):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(before * 4 * 4, hidden)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(hidden, num_classes)
        for module in self.modules():
            # Without normalisation PyTorch's own start lets the activations shrink from layer to layer.
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.fc2.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(self.features(x))  # (N, 192 * 4 * 4)
        return self.fc2(self.drop(self.relu(self.fc1(x))))


def vgg(num_classes: int = 10, in_channels: int = 3) -> Vgg:
    """VGG without normalisation for 32x32 images: 1,434,042 parameters at 10 classes.

    Example:
        >>> sum(parameter.numel() for parameter in vgg().parameters())
        1434042
    """
    return Vgg(num_classes=num_classes, in_channels=in_channels)
