"""Figures of merit: pure functions of logits and labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zskd_nni.data import LabelledImages
from zskd_nni.inputs import InputSpec

Network = Callable[[Tensor], Tensor]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label, in percent: ``(N, K), (N,) -> [0, 100]``."""
    return 100.0 * (logits.argmax(1) == labels).double().mean().item()


def agreement(first: Tensor, second: Tensor) -> float:
    """Share of rows on which two networks choose the same class, in [0, 1]: ``(N, K), (N, K)``."""
    return (first.argmax(1) == second.argmax(1)).double().mean().item()


@torch.no_grad()
def logits_on(
    network: Network, data: LabelledImages, spec: InputSpec, device: str = "cpu", batch: int = 1000
) -> Tensor:
    """Logits ``(N, K)`` of a network that takes images in the spec's value range, on the CPU."""
    parts = range(0, len(data), batch)
    return torch.cat([network(data.pixels(slice(i, i + batch), spec).to(device)).float().cpu() for i in parts])
