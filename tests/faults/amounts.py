"""How much is tried: a short version for ``make test``, the long one for ``make faults``."""

from __future__ import annotations

import os

LONG = os.environ.get("ZSKD_NNI_FAULTS") == "long"


def amount(short: int, long: int) -> int:
    """``short``, or ``long`` where the environment asks for the long version."""
    return long if LONG else short
