r"""Mathematics, ``\(...\)`` and ``\[...\]``, as MathML: browsers draw it themselves, no script, no fonts to load."""

from __future__ import annotations

import html as entities
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*\\[(\[](?P<latex>.*?)\\[)\]]\s*</(?P=tag)>', re.DOTALL
)


def on_page_content(html: str, **_: Any) -> str:
    """Replace what pymdownx.arithmatex marked."""

    def drawn(match: re.Match[str]) -> str:
        display = "block" if match["tag"] == "div" else "inline"
        mathml = convert(entities.unescape(match["latex"]).strip(), display=display)
        return f'<{match["tag"]} class="formula">{mathml}</{match["tag"]}>'

    return _FORMULA.sub(drawn, html)
