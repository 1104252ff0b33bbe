"""Local response normalisation: a fast version, and one for layers that lost some of their channels.

PyTorch's own uses a three-dimensional average pooling and a power, which take two thirds of the time of an AlexNet for
small images. The sum over neighbouring channels is also a product with a banded 0/1 matrix, and the gradient has a
closed form (`benchmarks/response_norm.py` measures both).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def neighbours(positions: Tensor, size: int) -> Tensor:
    """``(K, K)``, true where channel ``j`` is in the window of channel ``i``.

    Args:
        positions: of the channels in the whole layer, ``(K,)``, ascending.
        size: of the window, as in ``nn.LocalResponseNorm``.
    """
    offset = positions[None, :] - positions[:, None]
    # PyTorch's window for channel i: size // 2 channels before it, (size - 1) // 2 after it.
    return (offset >= -(size // 2)) & (offset <= (size - 1) // 2)


class _Normalise(torch.autograd.Function):
    """``y = x d^-beta`` with ``d = k + a W x^2``; ``dx = g d^-beta - 2 a beta x W'(g x d^(-beta-1))``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Tensor, a: float, beta: float, k: float) -> Tensor:
        """``x`` is ``(N, K, H, W)``, ``window`` ``(K, K)``."""
        d = functional.conv2d(x * x, window[:, :, None, None]).mul_(a).add_(k)
        root = d.rsqrt()
        scale = root.sqrt().mul_(root) if beta == 0.75 else d.pow_(-beta)
        ctx.save_for_backward(x, root, scale, window)
        ctx.a, ctx.beta = a, beta
        return x * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of ``x``; the other arguments have none."""
        x, root, scale, window = ctx.saved_tensors
        scaled = gradient * scale
        summed = functional.conv2d((scaled * x).mul_(root).mul_(root), window.t()[:, :, None, None])
        return scaled.addcmul_(summed, x, value=-2 * ctx.a * ctx.beta), None, None, None, None


class PrunedLocalResponseNorm(nn.Module):
    """What ``nn.LocalResponseNorm`` computes for the kept channels if the removed ones are zero.

    Local response normalisation divides each channel by the energy of its neighbours. With channels removed, a plain
    ``nn.LocalResponseNorm`` would take other neighbours than the network was trained with. This one keeps the windows
    of the original positions, as a 0/1 matrix.

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
        window = neighbours(torch.tensor(self.kept), size)
        # Not saved: it follows from the positions, which are in a saved network's description.
        self.register_buffer("window", window.float(), persistent=False)

    @classmethod
    def of(cls, norm: nn.LocalResponseNorm | PrunedLocalResponseNorm, kept: Tensor) -> PrunedLocalResponseNorm:
        """The layer that replaces ``norm`` after all channels except those at ``kept``, ``(K,)``, are removed."""
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


@lru_cache(maxsize=64)
def _window(positions: tuple[int, ...], size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # the next call may need gradients
        return neighbours(torch.tensor(positions), size).to(device, dtype)


def _fast_forward(norm: Any, x: Tensor) -> Tensor:
    if x.ndim != 4:
        return type(norm).forward(norm, x)
    with torch.autocast(x.device.type, enabled=False):  # in single precision, as PyTorch's own
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        positions = norm.kept if isinstance(norm, PrunedLocalResponseNorm) else tuple(range(x.shape[1]))
        window = _window(positions, norm.size, x.device, x.dtype)
        return _Normalise.apply(x, window, norm.alpha / norm.size, norm.beta, norm.k)


@contextmanager
def fast_response_norms(model: nn.Module) -> Iterator[None]:
    """Within the block every local response normalisation of ``model`` computes the same values faster.

    Only ``forward`` is replaced. The modules stay the same for code that traces, copies or saves the model.
    """
    kinds = (nn.LocalResponseNorm, PrunedLocalResponseNorm)
    replaced = [m for m in model.modules() if type(m) in kinds and "forward" not in m.__dict__]
    for module in replaced:
        module.forward = partial(_fast_forward, module)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward
