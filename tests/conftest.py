"""One thread, no denormals, and warnings from this package's own code are errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import digits_network, prepare_torch

from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher

prepare_torch()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", r"error:::zskd_nni(\.|$)")


@pytest.fixture(autouse=True)
def _unchanged_threads() -> Iterator[None]:
    yield
    assert torch.get_num_threads() == 1, "a test or the code under test left another number of threads behind"


@pytest.fixture(scope="session")
def digits_teacher() -> Teacher:
    return Teacher(digits_network(), InputSpec((1, 32, 32)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"
