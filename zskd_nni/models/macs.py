"""How many multiplications a network needs for one image."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zskd_nni.models.input_spec import InputSpec


@torch.no_grad()
def multiply_accumulates(network: nn.Module, spec: InputSpec) -> int:
    """Multiply-accumulate operations (MACs) of a forward pass of one image.

    Counted are convolutions, matrix products and attention. Normalisations, activations and pooling are not.

    Args:
        network: in ``eval()``, on the CPU.
        spec: of its input.

    Example:
        >>> from torch import nn
        >>> multiply_accumulates(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), InputSpec((1, 8, 8)))
        640
    """
    image = spec.example_input()[:1]
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation, which the counter does not know
    try:
        with FlopCounterMode(display=False) as counter:
            network(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
    return counter.get_total_flops() // 2  # it counts a multiplication and an addition as two
