r"""Mathematics, ``\(...\)`` and ``\[...\]``, as MathML: browsers draw it themselves, no script, no fonts to load."""

from __future__ import annotations

import html as entities
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\s*\\[(\[](?P<latex>.*?)\\[)\]]\s*</(?P=tag)>', re.DOTALL)

LONG = 40  # letters; browsers do not break a formula, so that a long one scrolls by itself on a phone
_UNKNOWN_THERE = {r"\arg": r"\operatorname{arg}"}  # operators that the converter does not know


# Of a notebook page, where JupyterLab's notation is still as it was typed: code, scripts and attributes are left alone.
_NOT_PROSE = re.compile(r"(<(pre|code|script|style|svg)\b.*?</\2>|<[^>]*>)", re.DOTALL)
_IN_NOTEBOOK = re.compile(r"(?P<fence>\$\$?)(?=\S)(?P<latex>[^$]+?)(?<=\S)(?P=fence)")


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Replace what pymdownx.arithmatex marked, or what stands between dollars in a notebook."""
    if page.file.src_uri.endswith(".ipynb"):
        parts, at = [], 0
        for other in _NOT_PROSE.finditer(html):
            parts += [_IN_NOTEBOOK.sub(_in_notebook, html[at : other.start()]), other[0]]
            at = other.end()
        return "".join(parts) + html[at:]
    return _FORMULA.sub(lambda match: _drawn(match["latex"], match["tag"]), html)


def _in_notebook(match: re.Match[str]) -> str:
    return _drawn(match["latex"], "div" if match["fence"] == "$$" else "span")


def _drawn(latex: str, tag: str) -> str:
    latex = entities.unescape(latex).strip()
    for name, known in _UNKNOWN_THERE.items():
        latex = re.sub(re.escape(name) + r"(?![a-zA-Z])", lambda _, known=known: known, latex)
    mathml = convert(latex, display="block" if tag == "div" else "inline")
    if "\\" in mathml:
        raise ValueError(f"latex2mathml does not know all of {latex!r}; write it otherwise, or add it here")
    kind = "formula long" if len(latex) > LONG else "formula"
    return f'<{tag} class="{kind}">{mathml}</{tag}>'
