"""The pictures of the methods' pages are made by a command."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``benchmarks/method_pictures.py``, as a module."""
    spec = importlib.util.spec_from_file_location("method_pictures", ROOT / "benchmarks" / "method_pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "method_pictures", module)  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def test_the_first_image_of_each_class_is_shown(script: Any) -> None:
    assert script.first_of_each(torch.tensor([2, 0, 2, 0]), 4) == [1, None, 0, None]


def test_a_picture_has_a_row_for_each_source(script: Any) -> None:
    picture = script.ats(size=60)
    assert picture.png.startswith(b"\x89PNG") and picture.width > 400
    assert re.search("five sources", picture.alt)


def test_every_picture_of_a_page_is_one_that_the_command_makes(script: Any) -> None:
    for page in (ROOT / "docs" / "methods").glob("*.md"):
        text = page.read_text()
        for name in re.findall(r"pictures/method-([\w-]+)\.png", text):
            assert name in script.PAGES and (ROOT / "docs" / "pictures" / f"method-{name}.png").is_file(), page
            assert re.search(rf"method_pictures\.py [\w -]*\b{name}\b", " ".join(text.split())), page


def test_method_pages_are_short_and_have_figures() -> None:
    for name in ("zskd", "sts", "ats", "zskt"):
        text = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
        assert len(text.split()) <= 1500, name
        assert "](../pictures/method-" in text and "<!-- charts: " in text, name
