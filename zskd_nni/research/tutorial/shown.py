"""What a notebook shows: a picture and a table that draw themselves where they are the last line of a cell."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI, _SCREEN = 120, 76  # pixels an inch: of the file, and as shown


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
        png: the file.
        alt: what there is to see, in words.
        width: in pixels of a screen; the file is finer.
    """

    png: bytes
    alt: str
    width: int

    def save(self, path: str | Path) -> None:
        """Write the file.

        Raises:
            UserError: it is no ``.png``.
        """
        if Path(path).suffix != ".png":
            raise UserError(f"A picture is saved as .png, not as {path}.")
        write_atomic(path, self.png)

    def __repr__(self) -> str:
        return f"Picture: {self.alt}"

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, Any]]:
        data = {"image/png": base64.b64encode(self.png).decode(), "text/plain": repr(self)}
        return data, {"image/png": {"width": self.width, "alt": self.alt}}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches that no window knows of; :func:`finished` makes a picture of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finished(figure: Figure, alt: str) -> Picture:
    """The figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", pil_kwargs={"optimize": True})
    return Picture(buffer.getvalue(), alt, round(figure.get_figwidth() * _SCREEN))


@dataclass(frozen=True)
class Table:
    """Rows under a heading.

    Attributes:
        columns: their names.
        rows: entries as they are to be read.
        caption: where the figures come from.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {len(row)} entries under {len(self.columns)} columns: {list(row)}")

    def __repr__(self) -> str:
        cells = [list(self.columns), *map(list, self.rows)]
        widths = [max(len(row[place]) for row in cells) for place in range(len(self.columns))]
        lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([line.rstrip() for line in lines] + ([self.caption] if self.caption else []))

    def _repr_html_(self) -> str:
        def cells(tag: str, row: Sequence[str]) -> str:
            shown = (html.escape(cell).replace(" ± ", "&nbsp;±&nbsp;").replace(" %", "&nbsp;%") for cell in row)
            return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in shown) + "</tr>"

        parts = [f"<thead>{cells('th', self.columns)}</thead>"]
        parts.append("<tbody>" + "".join(cells("td", row) for row in self.rows) + "</tbody>")
        caption = f"<p><small>{html.escape(self.caption)}</small></p>" if self.caption else ""
        return f'<div class="zskd-table"><table>{"".join(parts)}</table></div>{caption}'
