"""Pictures and tables that display themselves as the last line of a notebook cell, and how figures are styled."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zskd_nni.models.input_spec import InputSpec
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import write_atomic
from zskd_nni.synthesis.image_grid import as_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI, _SCREEN = 120, 76  # pixels per inch: of the file, and on the screen
SMALL, LABEL, TITLE = 9, 10, 11  # sizes of text in points; the smallest is over 9 pixels on the screen


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
        png: content of the file.
        alt: description in words.
        width: in pixels of a screen; the file has more.
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


def new_figure(width: float, height: float, dpi: int = _DPI) -> Figure:
    """An empty figure of so many inches, without a window; :func:`finish` makes a picture of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finish(figure: Figure, alt: str) -> Picture:
    """The figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", pil_kwargs={"optimize": True})
    return Picture(buffer.getvalue(), alt, round(figure.get_figwidth() * _SCREEN))


def new_grid(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    """A figure with ``count`` charts that share their axes; each row is ``height`` inches high."""
    rows = -(-count // columns)
    figure = new_figure(width, 0.3 + height * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axis in axes[count:]:
        axis.axis("off")
    return figure, axes[:count]


def style(axis: Any, title: str = "", *, x: str = "", y: str = "", size: float = SMALL) -> None:
    """Small tick labels, no frame above and on the right, names of the axes, and a title."""
    axis.tick_params(labelsize=size)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel(x, fontsize=LABEL)
    axis.set_ylabel(y, fontsize=LABEL)
    axis.set_title(title, fontsize=TITLE)


def show_image(axis: Any, image: Tensor, spec: InputSpec, title: str = "", note: str = "", size: float = SMALL) -> None:
    """Draw an image ``(C, H, W)`` without ticks, with a title above and a note below."""
    axis.imshow(as_picture(image, spec), cmap="gray", vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=size, pad=3)
    axis.set_xlabel(note, fontsize=size, labelpad=2)


def label_classes(axis: Any, names: Sequence[str], *, both: bool = False, size: float = SMALL) -> None:
    """Names of classes at the x axis, or at both; of more than 20 classes about ten are named."""
    places = list(range(0, len(names), 1 if len(names) <= 20 else len(names) // 10))
    shown = [names[place] for place in places]
    turned = {} if max(map(len, shown)) <= 3 else {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(places, shown, fontsize=size, **turned)
    if both:
        axis.set_yticks(places, shown, fontsize=size)


@dataclass(frozen=True)
class Table:
    """Rows under a heading.

    Attributes:
        columns: their names.
        rows: entries as they are displayed.
        caption: where the numbers come from.
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
