"""A real browser: the chromium that is installed, driven by Playwright; skips with a reason where there is none.

And the notebooks, executed once.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
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


# The notebooks.

ROOT = Path(__file__).resolve().parents[2]
# With real data where the environment has any; the others without.
WITH_DATA = {"02_mnist", "04_cifar10", "06_four_methods"}
NOTEBOOK_TOOLS = ("papermill", "ipykernel", "nbformat")


@pytest.fixture(scope="session")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where the executed copies of all notebooks lie, and what was said on the way."""
    need(*NOTEBOOK_TOOLS)
    folder = tmp_path_factory.mktemp("notebooks")
    names = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    said = []
    for half, environment in ((WITH_DATA, {}), (names - WITH_DATA, {"ZSKD_NNI_DATA": ""})):
        command = [sys.executable, "notebooks/run.py", *sorted(half), "--scale", "smoke"]
        command += ["--to", str(folder / "done"), "--work", str(folder / "work")]
        run = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=560, check=False,
        )  # fmt: skip
        said.append(run.stdout)
    return folder / "done", "\n".join(said)
