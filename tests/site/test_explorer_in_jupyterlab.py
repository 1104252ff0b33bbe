"""The explorer in JupyterLab, in a real browser: a slider is moved, and the picture changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import need

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOT = "ZSKD_NNI_SCREENSHOT"  # a .png to write; docs/pictures/explorer.png was made so
TOKEN = "explorer-under-test"
CELL = "from zskd_nni.research.explorer.widget import Explorer\nexplorer = Explorer()\nexplorer"

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    need("jupyterlab", "ipywidgets", "ipykernel")
    import nbformat

    folder = tmp_path_factory.mktemp("lab")
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(CELL)],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    (folder / "work").mkdir()
    nbformat.write(notebook, folder / "work" / "explore.ipynb")
    places = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "RUNTIME", "DATA")}
    log = (folder / "log").open("w")
    server = subprocess.Popen(
        [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0",
            f"--IdentityProvider.token={TOKEN}", "--LabApp.news_url=None", "--LabApp.extension_manager=readonly",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            f"--ServerApp.root_dir={folder / 'work'}",
        ],
        env={
            **os.environ, **places, "IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        },
        stdout=log,
        stderr=log,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (found := list((folder / "runtime").glob("jpserver-*.json"))):
            assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
            time.sleep(0.1)
        yield json.loads(found[0].read_text())["url"]
    finally:
        server.terminate()
        server.wait(30)
        log.close()


def run_first_cell(page: Any) -> None:
    """Run it, as often as it takes: what is run before the kernel has answered is run nowhere, without a word."""
    prompt = page.locator(".jp-Cell .jp-InputPrompt").first
    deadline = time.monotonic() + 240
    while True:
        page.locator(".jp-Cell .cm-content").first.click()
        page.keyboard.press("Shift+Enter")
        for _ in range(20):
            if prompt.inner_text() != "[ ]:":  # [*]: while it runs, [1]: afterwards
                return
            page.wait_for_timeout(250)
        assert time.monotonic() < deadline, f"the kernel: {page.locator('#jp-main-statusbar').inner_text()}"


def picture(page: Any) -> str:
    return page.locator(".zskd-explorer img").first.get_attribute("src")


def changed(page: Any, before: str) -> str:
    """The picture's address once it is another; widgets hand every new picture out under one of its own."""
    page.wait_for_function(
        "before => document.querySelector('.zskd-explorer img').getAttribute('src') !== before", arg=before
    )
    return picture(page)


def pixels(page: Any) -> list[int]:
    return page.evaluate(
        """() => {
            const image = document.querySelector('.zskd-explorer img');
            const canvas = Object.assign(document.createElement('canvas'), {width: 200, height: 100});
            const drawn = canvas.getContext('2d');
            drawn.drawImage(image, 0, 0, 200, 100);
            return [...drawn.getImageData(0, 0, 200, 100).data];
        }"""
    )


def test_a_slider_moved_shows_another_impression(browser: Any, lab: str) -> None:
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    page.set_default_timeout(240_000)  # on a busy machine; idle it takes seconds
    page.goto(f"{lab}lab/tree/explore.ipynb?token={TOKEN}")
    run_first_cell(page)
    shown = page.locator(".zskd-explorer img, .jp-OutputArea-output[data-mime-type*='error']").first
    shown.wait_for()
    assert page.locator(".zskd-explorer img").count(), shown.inner_text()
    page.wait_for_function("() => document.querySelector('.zskd-explorer img').naturalWidth > 500")
    before, drawn = picture(page), pixels(page)

    sliders = page.locator(".zskd-explorer .noUi-handle")
    assert sliders.count() == 5  # class, beta, temperature, smoothness, steps
    sliders.nth(0).focus()
    page.keyboard.press("ArrowRight")
    after = changed(page, before)
    page.wait_for_function("() => document.querySelector('.zskd-explorer img').complete")
    assert pixels(page) != drawn
    assert page.locator(".zskd-explorer .widget-readout").first.inner_text() == "1"

    page.get_by_role("button", name="another draw").click()
    after = changed(page, after)
    # From random figures, as the best preset starts half of its images.
    page.locator(".zskd-explorer select").nth(1).select_option("shapes")
    changed(page, after)
    page.get_by_role("button", name="add to the gallery").click()
    gallery = page.locator(".zskd-explorer img").nth(1)
    gallery.wait_for(state="visible")
    page.wait_for_function("() => document.querySelectorAll('.zskd-explorer img')[1].naturalHeight > 150")
    if os.environ.get(SCREENSHOT):
        page.locator(".zskd-explorer").screenshot(path=os.environ[SCREENSHOT])
    page.close()
