"""Examples in docstrings as code: griffe knows the section ``Examples``, the docstrings here say ``Example``."""

from __future__ import annotations

import re
from typing import Any

import griffe

_TITLE = re.compile(r"^( *)Example:$", re.MULTILINE)


class ExamplesAsCode(griffe.Extension):
    """Renames the section before griffe reads it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _TITLE.sub(r"\1Examples:", obj.docstring.value)
