"""The best rate of a device's matrix products, and the number of operations of a piece of work."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ROUNDS = 10
SIZES = {"cpu": 1024, "cuda": 8192}


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions of a call, backward passes included."""
    with _Counting() as counting:
        work()
    return counting.operations


class _Counting(TorchDispatchMode):
    """PyTorch's counter without its module names, whose hooks break gradients of images."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=result)
        return result


@cache
def matrix_peak(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large square matrix product; in TF32 if float32 convolutions are."""
    size = SIZES[torch.device(device).type]
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return 2 * size**3 / min(_seconds(one, other) for _ in range(ROUNDS))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _seconds(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.is_cuda:
        torch.cuda.synchronize(one.device)
    started = time.perf_counter()
    one @ other
    if one.is_cuda:
        torch.cuda.synchronize(one.device)
    return time.perf_counter() - started
