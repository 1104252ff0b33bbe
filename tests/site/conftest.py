"""A real browser: the chromium that is installed, driven by Playwright; skips with a reason where there is none.

And the notebooks, which run beside the other tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
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


class Execution:
    """All notebooks, one after the other, in a process beside the tests.

    Begun when the tests have been collected, so that it uses the core that the other tests, of one thread each, leave.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        names = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
        given = ["--scale", "smoke", "--to", str(self.folder / "done"), "--work", str(self.folder / "work")]
        halves = [
            shlex.join([sys.executable, "notebooks/run.py", *sorted(half), *given])
            for half in (WITH_DATA, names - WITH_DATA)
        ]
        self._log = self.folder / "log"
        with self._log.open("w") as log:
            self._running = subprocess.Popen(
                ["sh", "-c", f"{halves[0]}; ZSKD_NNI_DATA= {halves[1]}"],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> str:
        """What was said on the way, when all have run."""
        self._running.wait()
        return self._log.read_text()

    def end(self) -> None:
        if self._running.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._running.pid, signal.SIGTERM)  # a kernel ends with its runner
        self._running.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


EXECUTION = pytest.StashKey[Execution]()


def pytest_collection_finish(session: pytest.Session) -> None:
    wanted = any("executed" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly and all(map(importlib.util.find_spec, NOTEBOOK_TOOLS)):
        session.config.stash[EXECUTION] = Execution()


def pytest_unconfigure(config: pytest.Config) -> None:
    if EXECUTION in config.stash:
        config.stash[EXECUTION].end()


@pytest.fixture(scope="session")
def executed(request: pytest.FixtureRequest) -> tuple[Path, str]:
    """Where the executed copies lie, and what was said on the way."""
    need(*NOTEBOOK_TOOLS)
    execution = request.config.stash[EXECUTION]
    return execution.folder / "done", execution.wait()
