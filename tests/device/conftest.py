"""These tests run on the device that ``ZSKD_NNI_TEST_DEVICE`` names, ``cuda`` or ``elsewhere``, and only where one is.

The whole test-suite runs them ``elsewhere`` in a process of their own (``tests/test_other_devices.py``).
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

DEVICE = os.environ.get("ZSKD_NNI_TEST_DEVICE", "")

collect_ignore_glob = [] if DEVICE else ["test_*.py"]

if DEVICE == "elsewhere":
    import elsewhere

    elsewhere.install()


@contextmanager
def _synchronizations() -> Iterator[Counter[str]]:
    found: Counter[str] = Counter()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    found.update(f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test."""
    named = torch.device(DEVICE)
    one = torch.device(named.type, named.index or 0)
    if one.type == "cuda":
        torch.cuda.set_device(one)
    return one


@pytest.fixture(autouse=True, scope="session")
def _whole_precision() -> Iterator[None]:
    """Convolutions in float32 as the CPU computes them, not in the TF32 that cuDNN takes for them by default."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture(scope="session")
def waits() -> Callable[[], AbstractContextManager[Counter[str]]]:
    """A context that counts how often the device is waited for, by place."""
    return elsewhere.counted if DEVICE == "elsewhere" else _synchronizations
