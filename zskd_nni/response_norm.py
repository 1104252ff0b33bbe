"""Local response normalisation for a layer that lost some of its channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PrunedLocalResponseNorm(nn.Module):
    """What ``nn.LocalResponseNorm`` gives for the kept channels while the removed ones are zero.

    Local response normalisation divides each channel by the energy of its neighbours. With channels removed, a plain
    ``nn.LocalResponseNorm`` would count other neighbours than the network was trained with. This one keeps the
    neighbourhoods of the original positions, as a 0/1 matrix.

    Args:
        kept: positions of the kept channels in the original layer, ascending, K of them.
        size: as in ``nn.LocalResponseNorm``.
        alpha: as in ``nn.LocalResponseNorm``.
        beta: as in ``nn.LocalResponseNorm``.
        k: as in ``nn.LocalResponseNorm``.

    Shape:
        input and output ``(N, K, ...)``.
    """

    window: Tensor

    def __init__(self, kept: Sequence[int], size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        super().__init__()
        self.kept = tuple(int(position) for position in kept)
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k
        positions = torch.tensor(self.kept)
        offset = positions[None, :] - positions[:, None]
        # PyTorch's window for channel i: size // 2 channels before it, (size - 1) // 2 behind it.
        window = (offset >= -(size // 2)) & (offset <= (size - 1) // 2)
        # It follows from the positions, which a saved network's description names: no weight of the network.
        self.register_buffer("window", window.float(), persistent=False)

    @classmethod
    def of(cls, norm: nn.LocalResponseNorm | PrunedLocalResponseNorm, kept: Tensor) -> PrunedLocalResponseNorm:
        """What is left of ``norm`` where only the channels at ``kept``, ``(K,)``, stay."""
        positions = kept.tolist()
        if isinstance(norm, PrunedLocalResponseNorm):
            positions = [norm.kept[position] for position in positions]
        return cls(positions, norm.size, norm.alpha, norm.beta, norm.k)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(N, K, ...)`` by the energy of each channel's original neighbours."""
        energy = torch.einsum("ij,nj...->ni...", self.window.to(x.dtype), x.square())  # (N, K, ...)
        return x / (self.k + self.alpha / self.size * energy).pow(self.beta)

    def extra_repr(self) -> str:
        """Channels and settings, as in ``nn.LocalResponseNorm``."""
        return f"{len(self.kept)} channels, size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"
