"""Charts of the records as SVG: one of each data set, every method a row. Their colours come from the page's style.

The scale is logarithmic in the error (100 minus the accuracy): between 98 % and 99 % the error halves, as it does
between 60 % and 80 %.
"""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zskd_nni.research.reproduction.cells import Cell
from zskd_nni.research.reproduction.records import Record

TICKS = (0, 50, 80, 90, 95, 98, 99, 99.5, 99.9)
LEAST_ERROR = 0.1  # percent; what is better is drawn there
_LEFT, _RIGHT, _ROW, _TOP, _BOTTOM = 156, 94, 19, 26, 36
_WIDTH = 466


def position(accuracy: float, low: float, high: float) -> float:
    """Where an accuracy lies between ``low`` (0) and ``high`` (1), all in percent; held to that range."""
    errors = [math.log(max(100 - value, LEAST_ERROR)) for value in (accuracy, low, high)]
    return min(1.0, max(0.0, (errors[1] - errors[0]) / (errors[1] - errors[2])))


def range_of(values: Iterable[float]) -> tuple[float, float]:
    """The nearest ticks around all values."""
    known = list(values)
    low = max([tick for tick in TICKS if tick <= min(known)], default=TICKS[0])
    high = min([tick for tick in TICKS if tick >= max(known)], default=TICKS[-1])
    return (low, high) if low < high else (TICKS[max(0, TICKS.index(low) - 1)], high)


def ticks_between(low: float, high: float) -> list[float]:
    """The ticks of an axis from ``low`` to ``high``."""
    return [tick for tick in TICKS if low <= tick <= high]


@dataclass(frozen=True)
class Row:
    """One method and preset in a chart.

    Attributes:
        label: of the row.
        accuracies: one a seed, in percent.
        kind: its class in the style sheet.
    """

    label: str
    accuracies: Sequence[float]
    kind: str

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.mean(self.accuracies)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds; 0 of one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0

    def __str__(self) -> str:
        spread = f" ± {self.deviation:.2f}" if len(self.accuracies) > 1 else ""
        return f"{self.mean:.2f}{spread}"


def kind_of(cell: Cell, records: Sequence[Record]) -> str:
    """How a cell is drawn: a control, on real images, or without data; ``best`` is filled."""
    if cell.method in ("none", "noise"):
        return "control"
    if not all(record.get("data_free", True) for record in records):
        return "real"
    return "free best" if cell.preset == "best" else "free"


def rows_of(groups: Iterable[tuple[Cell, Sequence[Record]]]) -> list[Row]:
    """The cells that have a student, in their order, each given with its records."""
    rows = []
    for cell, records in groups:
        values = [record["accuracy"]["student"] for record in records]
        known = [value for value in values if value is not None]
        if known:
            label = " ".join(part for part in (cell.network, cell.method, cell.preset, cell.variant) if part)
            rows.append(Row(label, known, kind_of(cell, records)))
    return rows


def dot_chart(title: str, rows: Sequence[Row], teacher: float) -> str:
    """An SVG with a row for each method: mean, standard deviation and the teacher's accuracy as a line."""
    low, high = range_of([teacher, *(row.mean for row in rows)])
    inner, height = _WIDTH - _LEFT - _RIGHT, _TOP + len(rows) * _ROW
    spoken = "; ".join(f"{row.label} {row}" for row in rows)

    def x(accuracy: float) -> float:
        return _LEFT + inner * position(accuracy, low, high)

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height + _BOTTOM}" role="img" '
        f'aria-label="{html.escape(title)}: accuracy in percent. Teacher {teacher:.2f}; {html.escape(spoken)}">'
    ]
    for tick in ticks_between(low, high):
        parts.append(f'<path class="grid" d="M{x(tick):.1f},{_TOP - 4} V{height}"/>')
        parts.append(f'<text class="tick" text-anchor="middle" x="{x(tick):.1f}" y="{height + 14}">{tick:g}</text>')
    middle = _LEFT + inner / 2
    parts.append(f'<text class="tick" text-anchor="middle" x="{middle:.0f}" y="{height + 30}">test accuracy, %</text>')
    at = x(teacher)
    parts.append(f'<path class="teacher" d="M{at:.1f},{_TOP - 4} V{height}"/>')
    anchor = "end" if at > middle else "start"
    parts.append(f'<text class="tick" text-anchor="{anchor}" x="{at:.1f}" y="{_TOP - 10}">teacher {teacher:.2f}</text>')
    for index, row in enumerate(rows):
        y = _TOP + (index + 0.5) * _ROW
        ends = (x(row.mean - row.deviation), x(row.mean + row.deviation))
        parts += [
            f'<g class="{row.kind}"><title>{html.escape(row.label)}: {row}</title>',
            f'<text class="name" text-anchor="end" x="{_LEFT - 8}" y="{y + 4:.1f}">{html.escape(row.label)}</text>',
            f'<path class="spread" d="M{ends[0]:.1f},{y:.1f} H{ends[1]:.1f}"/>',
            f'<circle cx="{x(row.mean):.1f}" cy="{y:.1f}" r="4.5"/>',
            f'<text class="value" x="{_WIDTH - _RIGHT + 8}" y="{y + 4:.1f}">{row}</text></g>',
        ]
    return "\n".join([*parts, "</svg>"])


def verdict(rows: Sequence[Row], teacher: float) -> str:
    """One sentence: the best student without data, beside the teacher, real images and noise."""
    free = [row for row in rows if row.kind.startswith("free")]
    if not free:
        return f"The teacher has {teacher:.2f} %."
    best = max(free, key=lambda row: row.mean)
    others = [f"the teacher {teacher:.2f} %"]
    for words, kinds in (("on real images at most", ("real",)), ("the best control", ("control",))):
        found = [row for row in rows if row.kind in kinds]
        if found:
            row = max(found, key=lambda row: row.mean)
            others.append(f"{words} {row} % (`{row.label}`)")
    return f"Without data the most accurate student has **{best} %** (`{best.label}`); {', '.join(others)}."
