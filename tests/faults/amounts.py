"""How much is tried: a short version for ``make test``, the long one for ``make faults``."""

from __future__ import annotations

import os

import pytest

LONG = os.environ.get("ZSKD_NNI_FAULTS") == "long"


only_long = pytest.mark.skipif(not LONG, reason="takes minutes: part of make faults")


def amount(short: int, long: int) -> int:
    """``short``, or ``long`` where the environment asks for the long version."""
    return long if LONG else short
