"""Stopping at a safe place: a signal is recorded, and loops obey it between two steps."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """The user or the system asked the run to stop; what was finished is kept.

    Attributes:
        signum: the signal's number; the exit code is 128 plus it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


_pending: int | None = None


def check() -> None:
    """Raise :class:`Interrupted` if a signal asked to stop. Loops call this where their state is consistent."""
    if _pending is not None:
        raise Interrupted(_pending)


def asked() -> int:
    """The number of the signal that asked to stop, or 0."""
    return _pending or 0


@contextmanager
def stoppable() -> Iterator[None]:
    """Within the block SIGINT and SIGTERM are recorded for :func:`check`; a second one stops at once.

    A third one ends the process immediately, with the same exit code. Files are written atomically, so that this does
    no harm.
    """
    global _pending
    _pending = None
    raised = False

    def record(signum: int, frame: FrameType | None) -> None:
        global _pending
        nonlocal raised
        if raised:
            os._exit(128 + signum)
        if _pending is not None:
            raised = True
            raise Interrupted(signum)
        _pending = signum

    previous = {number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _pending = None
