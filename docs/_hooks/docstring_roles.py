"""Sphinx's roles in docstrings, ``:func:`~a.b.c```, as links of the API reference."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:mod|class|func|meth|attr|data):<code>(?P<short>~?)(?P<name>[\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """A role becomes a reference that stays plain text where its target is on no page."""

    def link(match: re.Match[str]) -> str:
        shown = match["name"].rpartition(".")[2] if match["short"] else match["name"]
        return f'<autoref identifier="{match["name"]}" optional><code>{shown}</code></autoref>'

    return _ROLE.sub(link, html)
