"""A few cycles of ``make soak``."""

from __future__ import annotations

from amounts import amount
from helpers import start_process
from soak import soak


def test_memory_and_handles_stay(tmp_path) -> None:
    process = start_process(soak, float(amount(4, 120)))
    process.join()
    assert process.exitcode == 0
