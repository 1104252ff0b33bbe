"""Local response normalisation for a layer that lost some of its channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PrunedLocalResponseNorm(nn.Module):
    """What ``nn.LocalResponseNorm`` gives for the kept channels while the removed ones are zero.

    Local response normalisation divides each channel by the energy of its neighbours. With channels removed, a plain
    ``nn.LocalResponseNorm`` would count other neighbours than the network was trained with. This one keeps the
    neighbourhoods of the original positions, as a 0/1 matrix.

    Args:
        norm: the original normalisation.
        kept: positions of the kept channels, ascending, ``(K,)``.

    Shape:
        input and output ``(N, K, ...)``.
    """

    window: Tensor

    def __init__(self, norm: nn.LocalResponseNorm, kept: Tensor) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = norm.size, norm.alpha, norm.beta, norm.k
        offset = kept[None, :] - kept[:, None]
        # PyTorch's window for channel i: size // 2 channels before it, (size - 1) // 2 behind it.
        window = (offset >= -(norm.size // 2)) & (offset <= (norm.size - 1) // 2)
        self.register_buffer("window", window.float())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(N, K, ...)`` by the energy of each channel's original neighbours."""
        energy = torch.einsum("ij,nj...->ni...", self.window.to(x.dtype), x.square())  # (N, K, ...)
        return x / (self.k + self.alpha / self.size * energy).pow(self.beta)

    def extra_repr(self) -> str:
        """Channels and settings, as in ``nn.LocalResponseNorm``."""
        return f"{self.window.shape[0]} channels, size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"
