"""Freed memory is kept for the next tensor instead of being given back to the system.

By default glibc gives a large block back as soon as it is freed, and asks for it anew for the next tensor of that size.
The system then clears each page of it again. In a training step that is up to half of the time of a CPU
(`benchmarks/allocator.py` measures it). Kept memory counts towards the process, at most what its peak was.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
# Blocks up to this many bytes come from the heap, which is not given back; before glibc 2.35 at most 32 MiB.
_FROM_THE_HEAP = (1 << 30, 32 << 20)
_KEPT = {
    _M_TRIM_THRESHOLD: (1 << 31) - 1,
    _M_TOP_PAD: 64 << 20,  # the heap grows by at least this much
}


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep freed memory; only once, and only on Linux with glibc.

    A user's own ``MALLOC_*`` or ``GLIBC_TUNABLES`` in the environment stay as they are.

    Returns:
        whether it is kept.

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    chosen = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    return _set(ctypes.CDLL(None).mallopt)


def _set(mallopt: Callable[[int, int], int]) -> bool:
    """Set all by ``mallopt``, or nothing: with the heap's end kept alone, glibc gives back more blocks than before."""
    if not any(mallopt(_M_MMAP_THRESHOLD, size) == 1 for size in _FROM_THE_HEAP):
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in _KEPT.items())
