"""AlexNet and AlexNet-Half for 32x32 images, the CIFAR-10 pair of the ZSKD paper.

The layers and their unusual order (normalisation after pooling and after dropout) follow the authors' released
TensorFlow networks. PyTorch's local response normalisation divides ``alpha`` by the size of the window, TensorFlow's
does not; ``alpha`` is therefore 5 times theirs here.
"""

from __future__ import annotations

from torch import Tensor, nn


def _response_norm() -> nn.LocalResponseNorm:
    # TensorFlow: depth_radius=2, bias=1, alpha=1e-4, beta=0.75
    return nn.LocalResponseNorm(size=5, alpha=5e-4, beta=0.75, k=1.0)


class AlexNet(nn.Module):
    """AlexNet for small images.

    Args:
        widths: channels of the five convolutions.
        hidden: units of the two hidden fully connected layers.
        in_channels: channels of the input image.
        num_classes: number of logits.
        bn_momentum: PyTorch's momentum of the running statistics. The authors' decay of 0.999 is 0.001 here; a
            training of a few thousand steps needs a larger one.

    Shape:
        input ``(N, in_channels, 32, 32)``, output logits ``(N, num_classes)``.
    """

    def __init__(
        self,
        widths: tuple[int, int, int, int, int] = (48, 128, 192, 192, 128),
        hidden: tuple[int, int] = (512, 256),
        in_channels: int = 3,
        num_classes: int = 10,
        bn_momentum: float = 0.001,
    ) -> None:
        super().__init__()
        a, b, c, d, e = widths
        self.conv1 = nn.Conv2d(in_channels, a, 5, padding=2)
        self.relu1 = nn.ReLU()
        self.norm1 = _response_norm()
        self.pool1 = nn.MaxPool2d(3, 2)
        self.bn1 = nn.BatchNorm2d(a, eps=1e-3, momentum=bn_momentum)
        self.conv2 = nn.Conv2d(a, b, 5, padding=2)
        self.relu2 = nn.ReLU()
        self.norm2 = _response_norm()
        self.pool2 = nn.MaxPool2d(3, 2)
        self.bn2 = nn.BatchNorm2d(b, eps=1e-3, momentum=bn_momentum)
        self.conv3 = nn.Conv2d(b, c, 3, padding=1)
        self.relu3 = nn.ReLU()
        self.bn3 = nn.BatchNorm2d(c, eps=1e-3, momentum=bn_momentum)
        self.conv4 = nn.Conv2d(c, d, 3, padding=1)
        self.relu4 = nn.ReLU()
        self.bn4 = nn.BatchNorm2d(d, eps=1e-3, momentum=bn_momentum)
        self.conv5 = nn.Conv2d(d, e, 3, padding=1)
        self.relu5 = nn.ReLU()
        self.pool5 = nn.MaxPool2d(3, 2)
        self.bn5 = nn.BatchNorm2d(e, eps=1e-3, momentum=bn_momentum)
        self.flatten = nn.Flatten()
        self.fc6 = nn.Linear(e * 3 * 3, hidden[0])
        self.relu6 = nn.ReLU()
        self.drop6 = nn.Dropout(0.5)
        self.bn6 = nn.BatchNorm1d(hidden[0], eps=1e-3, momentum=bn_momentum)
        self.fc7 = nn.Linear(hidden[0], hidden[1])
        self.relu7 = nn.ReLU()
        self.drop7 = nn.Dropout(0.5)
        self.bn7 = nn.BatchNorm1d(hidden[1], eps=1e-3, momentum=bn_momentum)
        self.fc8 = nn.Linear(hidden[1], num_classes)
        for module in self.modules():
            # The authors draw every weight from N(0, 0.01); Kaiming's start trains reliably.
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.constant_(module.bias, 1.0 if module in (self.conv2, self.conv4, self.conv5) else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.pool1(self.norm1(self.relu1(self.conv1(x)))))  # (N, 48, 15, 15)
        x = self.bn2(self.pool2(self.norm2(self.relu2(self.conv2(x)))))  # (N, 128, 7, 7)
        x = self.bn3(self.relu3(self.conv3(x)))  # (N, 192, 7, 7)
        x = self.bn4(self.relu4(self.conv4(x)))  # (N, 192, 7, 7)
        x = self.bn5(self.pool5(self.relu5(self.conv5(x))))  # (N, 128, 3, 3)
        x = self.flatten(x)
        x = self.bn6(self.drop6(self.relu6(self.fc6(x))))
        x = self.bn7(self.drop7(self.relu7(self.fc7(x))))
        return self.fc8(x)


def alexnet(num_classes: int = 10, in_channels: int = 3, bn_momentum: float = 0.001) -> AlexNet:
    """AlexNet for 32x32 images: 1,659,178 parameters at 10 classes.

    Example:
        >>> sum(parameter.numel() for parameter in alexnet().parameters())
        1659178
    """
    return AlexNet(num_classes=num_classes, in_channels=in_channels, bn_momentum=bn_momentum)


def alexnet_half(num_classes: int = 10, in_channels: int = 3, bn_momentum: float = 0.001) -> AlexNet:
    """AlexNet-Half for 32x32 images: 417,434 parameters at 10 classes.

    Example:
        >>> sum(parameter.numel() for parameter in alexnet_half().parameters())
        417434
    """
    return AlexNet((24, 64, 96, 96, 64), (256, 128), in_channels, num_classes, bn_momentum)
