"""How much memory this process has needed so far."""

from __future__ import annotations

import sys

import torch


def peak_memory(device: torch.device | str = "cpu") -> dict[str, int]:
    """The most bytes that this process has held at a time: ``cpu``, and ``gpu`` where it computes on one.

    Args:
        device: on which it computes.

    Example:
        >>> peak_memory()["cpu"] > 10_000_000
        True
    """
    device, peaks = torch.device(device), {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peaks["cpu"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        peaks["gpu"] = torch.cuda.max_memory_allocated(device)
    return peaks
