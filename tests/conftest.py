"""One thread in every process, no denormals, and warnings from this package's own code are errors.

``make test`` gives whole files to two workers, and so keeps what a file computes once. The longest files come first,
so that neither worker is idle while the other finishes one of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import digits_network, prepare_torch

from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher

HERE = Path(__file__).parent
# Longest first; CONTRIBUTING.md says what takes so long and why it is worth it.
LONGEST = (
    "test_other_devices.py",
    "site/test_notebooks.py",
    "test_search.py",
    "faults/test_many_workers.py",
    "test_benchmarks.py",
    "site/test_shown_commands.py",
    "site/test_built_site.py",
    "faults/test_soak.py",
    "test_cli.py",
    "test_shipped_teachers.py",
    "site/test_explorer_in_jupyterlab.py",
)

prepare_torch()
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start: two workers share two cores


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", r"error:::zskd_nni(\.|$)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {HERE / name: place for place, name in enumerate(LONGEST)}
    assert all(path.exists() for path in places), "a file that LONGEST names is gone"
    items.sort(key=lambda item: places.get(item.path, len(places)))


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
