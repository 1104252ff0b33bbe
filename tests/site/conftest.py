"""A real browser: the chromium that is installed, driven by Playwright; skips with a reason where there is none."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

REQUIRE_BROWSER = "ZSKD_NNI_REQUIRE_BROWSER"


def need(*modules: str) -> None:
    """Skip, or fail where the environment says that all must be there, unless these can be imported."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        absent(f"{', '.join(missing)} cannot be imported (make install-all)")


def absent(reason: str) -> None:
    if os.environ.get(REQUIRE_BROWSER) == "1":
        pytest.fail(f"{reason}, although {REQUIRE_BROWSER}=1")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    need("playwright")
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        absent("no chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's sandbox does not run as root, which is who continuous integration is.
        started = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield started
        started.close()
