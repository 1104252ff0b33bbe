"""Logits of a network on a labelled set."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zskd_nni.data.datasets import LabelledImages
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.local_response_norm import fast_response_norms
from zskd_nni.models.teacher import first_tensor
from zskd_nni.runtime import signals
from zskd_nni.training.metrics import Network


def float_answers(network: nn.Module, spec: InputSpec) -> Network:
    """A network as a function of images ``(N, C, H, W)`` in the value range; it leaves them as they are."""

    def answers(images: Tensor) -> Tensor:
        with fast_response_norms(network):
            return first_tensor(network(spec.normalise(images.clone())))

    return answers


@torch.no_grad()
def logits_on(
    network: Network, data: LabelledImages, spec: InputSpec, device: str = "cpu", batch: int | None = None
) -> Tensor:
    """Logits ``(N, K)`` of a network that takes images in the spec's value range, on the CPU.

    Args:
        network: gives the logits of a batch; of a module, :func:`float_answers`.
        data: the images.
        spec: of the network's input.
        device: where the network computes.
        batch: how many images at once; by default as many as the device is fast with.
    """
    parts = []
    batch = batch or spec.inference_batch_on(device)
    for first in range(0, len(data), batch):
        signals.check()
        parts.append(network(data.pixels(slice(first, first + batch), spec).to(device)).float().cpu())
    return torch.cat(parts)
