"""Logits of a network on a labelled set."""

from __future__ import annotations

import torch
from torch import Tensor

from zskd_nni.data.datasets import LabelledImages
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.runtime import signals
from zskd_nni.training.metrics import Network


@torch.no_grad()
def logits_on(
    network: Network, data: LabelledImages, spec: InputSpec, device: str = "cpu", batch: int | None = None
) -> Tensor:
    """Logits ``(N, K)`` of a network that takes images in the spec's value range, on the CPU."""
    parts = []
    batch = batch or spec.inference_batch
    for first in range(0, len(data), batch):
        signals.check()
        parts.append(network(data.pixels(slice(first, first + batch), spec).to(device)).float().cpu())
    return torch.cat(parts)
