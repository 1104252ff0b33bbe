"""Where a name in a table may be broken: after a dot, a colon, a slash, an underscore or an equals sign.

Browsers break ``transfer.synthesis.learning_rate`` nowhere or between any two letters. On a phone it has to be broken.
"""

from __future__ import annotations

import re
from typing import Any

_CELL = re.compile(r"<td\b[^>]*>.*?</td>", re.DOTALL)
_CODE = re.compile(r"(?<=<code>)[^<]*(?=</code>)")
_BREAK = re.compile(r"(?<=\w)(?:[:/_=](?=\w\w)|\.(?=[A-Za-z]{2}))")  # not in 0.25, nor before one letter


def on_page_content(html: str, **_: Any) -> str:
    """Mark the places in the cells of tables."""
    return _CELL.sub(lambda cell: _CODE.sub(lambda code: _BREAK.sub(r"\g<0><wbr>", code[0]), cell[0]), html)
