r"""Mathematics, ``\(...\)`` and ``\[...\]``, as MathML: browsers draw it themselves, no script, no fonts to load."""

from __future__ import annotations

import html as entities
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\s*\\[(\[](?P<latex>.*?)\\[)\]]\s*</(?P=tag)>', re.DOTALL)

LONG = 40  # letters; browsers do not break a formula, so that a long one scrolls by itself on a phone
_UNKNOWN_THERE = {r"\arg": r"\operatorname{arg}"}  # operators that the converter does not know


def on_page_content(html: str, **_: Any) -> str:
    """Replace what pymdownx.arithmatex marked."""

    def drawn(match: re.Match[str]) -> str:
        display = "block" if match["tag"] == "div" else "inline"
        latex = entities.unescape(match["latex"]).strip()
        for name, known in _UNKNOWN_THERE.items():
            latex = re.sub(re.escape(name) + r"(?![a-zA-Z])", lambda _, known=known: known, latex)
        mathml = convert(latex, display=display)
        if "\\" in mathml:
            raise ValueError(f"latex2mathml does not know all of {latex!r}; write it otherwise, or add it here")
        kind = "formula long" if len(latex) > LONG else "formula"
        return f'<{match["tag"]} class="{kind}">{mathml}</{match["tag"]}>'

    return _FORMULA.sub(drawn, html)
