"""The precision that a network computes in where its forward asks for another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_autocast() -> Iterator[None]:
    """Within the block a network computes in the precision of its weights, also where its forward has an autocast.

    Graphs and exported files have no such blocks, and two networks are not compared in half the digits.

    Example:
        >>> with without_autocast(), torch.autocast("cpu", dtype=torch.bfloat16):
        ...     print((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        torch.float32
    """
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__
    torch.autocast.__enter__ = lambda self: self  # type: ignore[method-assign]
    torch.autocast.__exit__ = lambda self, *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]
