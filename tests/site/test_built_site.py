"""The site, built strictly, served on this machine and read in a real browser."""

from __future__ import annotations

import html.parser
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from conftest import need

ROOT = Path(__file__).resolve().parents[2]
PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1280, "height": 900}
PAGES = ["", "quickstart/", "recipes/", "methods/zskd/", "results/", "api/compression/", "changelog/", "faq/"]

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter", "latex2mathml")
    out = tmp_path_factory.mktemp("site")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=500,  # seconds where the machine is idle
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def address(built: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(built))

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class Page(html.parser.HTMLParser):
    """What a page links to and loads, and what can be linked to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.assets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") not in ("canonical", "prev", "next"):
            self.assets.append(found.get("href", ""))
        elif tag in ("script", "img", "source", "iframe") and "src" in found:
            self.assets.append(found["src"])


@pytest.fixture(scope="module")
def pages(built: Path) -> dict[str, Page]:
    return {
        path.relative_to(built).as_posix(): Page(path.read_text())
        for path in sorted(built.rglob("*.html"))
        if path.name != "404.html"
    }


def test_no_internal_link_is_dead(built: Path, pages: dict[str, Page]) -> None:
    assert len(pages) > 20
    dead, followed = [], 0
    for name, page in pages.items():
        for link in (*page.links, *page.assets):
            target = urlsplit(urljoin(f"http://here/{name}", link))
            if target.netloc != "here" or target.scheme != "http":
                continue
            followed += 1
            path = unquote(target.path).lstrip("/")
            path = f"{path}index.html" if not path or path.endswith("/") else path
            if not (built / path).is_file() or (
                target.fragment and path in pages and unquote(target.fragment) not in pages[path].anchors
            ):
                dead.append(f"{name} -> {link}")
    assert followed > 1000
    assert not dead, dead[:20]


def test_nothing_is_loaded_from_elsewhere(pages: dict[str, Page]) -> None:
    elsewhere = {(name, url) for name, page in pages.items() for url in page.assets if urlsplit(url).netloc}
    assert not elsewhere


def test_formulas_are_drawn_and_tables_filled_in(built: Path) -> None:
    zskd = (built / "methods/zskd/index.html").read_text()
    assert zskd.count("<math") > 10
    for path in built.rglob("index.html"):
        text = path.read_text()
        assert "arithmatex" not in text, path
        assert "<!-- results" not in text, path
    assert "mnist-half" in (built / "index.html").read_text()


def test_tutorials_say_on_which_day_they_were_executed(built: Path) -> None:
    tutorials = sorted((built / "tutorials").glob("*/index.html"))
    assert len(tutorials) == 7
    for path in tutorials:
        assert re.search(r"Executed 20\d\d-\d\d-\d\d at scale <code>(cpu|full)</code>", path.read_text()), path


def test_formulas_of_notebooks_are_drawn_and_code_is_left_alone() -> None:
    need("latex2mathml")
    spec = importlib.util.spec_from_file_location("maths", ROOT / "docs" / "_hooks" / "maths.py")
    assert spec is not None and spec.loader is not None
    maths = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maths)
    notebook = SimpleNamespace(file=SimpleNamespace(src_uri="tutorials/01.ipynb"))
    given = '<p title="$a$">Let $x^2$ be <code>$y$</code>, 5 $ each.</p><pre>$z$ $w$</pre><p>$$\\arg\\min_x f$$</p>'
    html = maths.on_page_content(given, page=notebook)
    assert html.count("<math") == 2
    for kept in ('title="$a$"', "<code>$y$</code>", "5 $ each", "<pre>$z$ $w$</pre>"):
        assert kept in html
    with pytest.raises(ValueError, match="does not know all"):
        maths.on_page_content(r"<p>$\nosuchthing x$</p>", page=notebook)


def test_names_in_tables_break_after_their_signs_alone(built: Path) -> None:
    page = (built / "howto/own-teacher/index.html").read_text()
    assert "<code>transfer.<wbr>synthesis.<wbr>learning_<wbr>rate</code>" in page  # in a cell
    assert "<code>evaluation: {data: my-test.npz}</code>" in page  # in a sentence
    for path in built.rglob("index.html"):
        assert not re.search(r"\d\.<wbr>\d|<wbr>[^\w]", path.read_text()), path


def watched(browser: Any, address: str, **options: Any) -> tuple[Any, list[str]]:
    """A page, and what went wrong in it."""
    page = browser.new_page(**options)
    wrong: list[str] = []
    page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("response", lambda response: response.status >= 400 and wrong.append(f"{response.status} {response.url}"))
    page.on("request", lambda request: request.url.startswith(("http:", "https:", "ws"))
            and not request.url.startswith(address) and wrong.append(f"asked for {request.url}"))  # fmt: skip
    return page, wrong


# Size of what sticks out, and pictures that are not there.
LOOK = """() => ({
    wide: document.documentElement.scrollWidth - window.innerWidth,
    broken: [...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.src),
})"""

# Contrast of text and links with the page behind them (WCAG 2: at least 4.5 for body text).
CONTRAST = """() => {
    const drawn = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const back = getComputedStyle(document.body).backgroundColor;
    const light = colour => {
        drawn.fillStyle = back; drawn.fillRect(0, 0, 1, 1);
        drawn.fillStyle = colour; drawn.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...drawn.getImageData(0, 0, 1, 1).data].map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const against = selector => {
        const colour = getComputedStyle(document.querySelector(selector)).color;
        const [high, low] = [light(colour), light(back)].sort((a, b) => b - a);
        return (high + 0.05) / (low + 0.05);
    };
    return {back: light(back), text: against('.md-content p'), link: against('.md-content p a')};
}"""


def test_every_page_fits_a_phone_and_reports_nothing(browser: Any, address: str, pages: dict[str, Page]) -> None:
    page, wrong = watched(browser, address, viewport=PHONE)
    for name in pages:
        page.goto(address + name.removesuffix("index.html"))
        seen = page.evaluate(LOOK)
        assert seen["wide"] <= 0, f"{name} is {seen['wide']} pixels wider than a phone"
        assert not seen["broken"], f"{name} lacks {seen['broken']}"
    page.close()
    assert not wrong, wrong[:10]


def test_notebook_pages_show_their_pictures(browser: Any, address: str) -> None:
    page, wrong = watched(browser, address, viewport=DESKTOP)
    for notebook in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")):
        cells = json.loads(notebook.read_text())["cells"]
        made = [output for cell in cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
        page.goto(f"{address}tutorials/{notebook.stem}/")
        shown = page.evaluate(
            "() => [...document.querySelectorAll('.jupyter-wrapper img')]"
            ".map(image => [image.complete, image.naturalWidth, image.clientWidth, image.alt])"
        )
        assert len(shown) == len(made) > 0, notebook.name
        for (complete, natural, wide, words), output in zip(shown, made, strict=True):
            assert complete and natural > 400, notebook.name
            # As wide as its text is drawn for, so that nine pixels stay nine.
            assert wide >= 0.98 * output["metadata"]["image/png"]["width"], f"{notebook.name}: {words}"
            assert words == output["metadata"]["image/png"]["alt"]
        assert "How this page was made" in page.inner_text(".md-content")
        assert page.locator(".md-content a[href$='.md']").count() == 0
        assert page.locator(f".md-content a[href='{notebook.name}'][download]").count() == 1
        assert page.locator(".md-content a[href$='.ipynb']").count() == 1
        assert page.locator(".md-content details.fold > summary", has_text="Answer").count() == 3
        assert page.locator(".md-content details.fold[open]").count() == 0
    page.close()
    assert not wrong, wrong[:10]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_are_readable(browser: Any, address: str, scheme: str) -> None:
    page, wrong = watched(browser, address, viewport=DESKTOP, color_scheme=scheme)
    for name in PAGES:
        page.goto(address + name)
        assert page.evaluate(LOOK)["wide"] <= 0, name
    page.goto(address)
    contrast = page.evaluate(CONTRAST)
    assert (contrast["back"] > 0.8) if scheme == "light" else (contrast["back"] < 0.1)
    assert contrast["text"] > 7
    assert contrast["link"] > 4.5
    page.close()
    assert not wrong, wrong[:10]


def test_search_finds_the_distiller(browser: Any, address: str) -> None:
    page, wrong = watched(browser, address, viewport=DESKTOP)
    page.goto(address)
    page.click("label.md-search__icon[for=__search]", force=True)
    page.locator("input.md-search__input").press_sequentially("ZeroShotDistiller")  # the page listens for keys
    results = page.locator(".md-search-result__link")
    results.first.wait_for(timeout=60_000)
    links = [results.nth(index).get_attribute("href") for index in range(results.count())]
    assert any("zskd_nni.compression.distiller.ZeroShotDistiller" in link for link in links), links
    page.close()
    assert not wrong, wrong[:10]
