"""Every example in a docstring runs and gives the shown output."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
from helpers import prepare_torch

import zskd_nni

PACKAGE = Path(zskd_nni.__file__).parent
MODULES = sorted(
    ".".join(("zskd_nni", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>>" in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    prepare_torch()
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted
    assert not result.failed
