"""Notebook pages: links to other pages, what there is to see in their pictures, and what is folded.

The plugin that draws notebooks leaves links as they were typed, knows no text for a picture, and folds nothing. A link
to the source of a page, as it works in JupyterLab and on a code host, becomes a link to the page; a dead one is a
warning, which ``--strict`` turns into an error. The code of cells tagged ``hide-input`` and the parameters are folded,
and so are cells tagged ``answer``, with all that is in them.
"""

from __future__ import annotations

import html as entities
import json
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup, Tag

_LINK = re.compile(r'(?P<before><a [^>]*?href=")(?P<to>[^":#]+\.(?:md|ipynb))(?P<anchor>#[^"]*)?"')
_PICTURE = re.compile(r'<img(?P<attributes>[^>]*\bsrc="data:image/png;base64,[^>]*)>')
_ALTERNATIVE = re.compile(r'\salt="[^"]*"')  # the plugin's own says that there is none
_PLUMBING = {"hide-input", "parameters", "injected-parameters"}
_log = logging.getLogger("mkdocs.hooks.notebooks")


def on_page_content(html: str, page: Any, files: Any, config: Any = None, **_: Any) -> str:
    """Mend links and pictures of a page that is a notebook."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def link(match: re.Match[str]) -> str:
        to = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), entities.unescape(match["to"])))
        found = files.get_file_from_path(to)
        if found is None:
            _log.warning("%s links to %s, which is no page", page.file.src_uri, match["to"])
            return match[0]
        return f'{match["before"]}{found.url_relative_to(page.file)}{match["anchor"] or ""}"'

    seen = iter(alternatives(Path(page.file.abs_src_path)))

    def picture(match: re.Match[str]) -> str:
        words = entities.escape(next(seen, "A picture"))
        return f'<img alt="{words}"{_ALTERNATIVE.sub("", match["attributes"])}>'

    html = _PICTURE.sub(picture, html)
    html = _LINK.sub(link, html)
    html = html.replace("</h1>", f"</h1>{dated(page, files)}{sources(page, config)}", 1)
    return folded(html, tags_of(Path(page.file.abs_src_path)))


def dated(page: Any, files: Any) -> str:
    """When a notebook was executed, and where later figures are: recipes and methods may have changed behind it."""
    about = json.loads(Path(page.file.abs_src_path).read_text(encoding="utf-8")).get("metadata", {}).get("zskd_nni")
    if about is None:
        return ""
    link = files.get_file_from_path("recipe-results.md").url_relative_to(page.file)
    return (
        f"<p><em>Executed {entities.escape(about['executed'][:10])} at scale "
        f"<code>{entities.escape(about['scale'])}</code>. Recipes may have changed since; the figures that hold today "
        f'are on the page of <a href="{link}">results</a>.</em></p>'
    )


def sources(page: Any, config: Any) -> str:
    """Where the notebook of a page is: to download, and in the repository."""
    name = posixpath.basename(page.file.src_uri)
    place = f"notebooks/{name}"
    repository = getattr(config, "repo_url", None)
    there = f"<code>{place}</code>"
    if repository:
        there = f'<a href="{repository.rstrip("/")}/blob/main/{place}">{there}</a>'
    return f'<p class="sources"><a href="{name}" download>Download this notebook</a>, in the repository: {there}</p>'


def tags_of(notebook: Path) -> dict[str, set[str]]:
    """The tags of a notebook's cells, by the names of the cells."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return {cell["id"]: set(cell.get("metadata", {}).get("tags", ())) for cell in cells if "id" in cell}


def folded(html: str, tags: dict[str, set[str]]) -> str:
    """Fold the code of plumbing cells, and answers as a whole; neighbours share a fold."""
    page = BeautifulSoup(html, "html.parser")
    cells = page.select(".jp-Notebook > .jp-Cell")
    open_fold: Tag | None = None  # into which the cell before went as a whole
    for cell in cells:
        named = cell if cell.get("id") else cell.find(id=re.compile("^cell-id="))
        of = tags.get(str(named["id"]).removeprefix("cell-id="), set()) if isinstance(named, Tag) else set()
        summary, what = ("Answer", cell) if "answer" in of else ("Code", None)
        if what is None and of & _PLUMBING:
            code = cell.select_one(".jp-Cell-inputWrapper")
            what = code if cell.select_one(".jp-Cell-outputWrapper") else cell
            summary = "Code" if what is code else "Parameters and preparation"
        fold = None
        if what is cell and open_fold is not None and open_fold["data-fold"] == summary:
            fold = open_fold
            fold.append(cell.extract())
        elif what is not None:
            fold = page.new_tag("details", attrs={"class": "fold", "data-fold": summary})
            what.wrap(fold)
            heading = page.new_tag("summary")
            heading.string = summary
            fold.insert(0, heading)
        open_fold = fold if what is cell else None
    return str(page)


def alternatives(notebook: Path) -> list[str]:
    """What there is to see in the pictures of a notebook, in their order."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    shown = [output for cell in cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    return [output.get("metadata", {}).get("image/png", {}).get("alt", "A picture") for output in shown]
