"""Notebook pages: links to other pages, and what there is to see in their pictures.

The plugin that draws notebooks leaves links as they were typed, and knows no text for a picture. A link to the source
of a page, as it works in JupyterLab and on a code host, becomes a link to the page; a dead one is a warning, which
``--strict`` turns into an error.
"""

from __future__ import annotations

import html as entities
import json
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r'(?P<before><a [^>]*?href=")(?P<to>[^":#]+\.(?:md|ipynb))(?P<anchor>#[^"]*)?"')
_PICTURE = re.compile(r'<img(?P<attributes>[^>]*\bsrc="data:image/png;base64,[^>]*)>')
_ALTERNATIVE = re.compile(r'\salt="[^"]*"')  # the plugin's own says that there is none
_log = logging.getLogger("mkdocs.hooks.notebooks")


def on_page_content(html: str, page: Any, files: Any, **_: Any) -> str:
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
    html = html.replace("</h1>", f"</h1>{dated(page, files)}", 1)
    return _LINK.sub(link, html)


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


def alternatives(notebook: Path) -> list[str]:
    """What there is to see in the pictures of a notebook, in their order."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    shown = [output for cell in cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    return [output.get("metadata", {}).get("image/png", {}).get("alt", "A picture") for output in shown]
