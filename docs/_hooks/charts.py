"""Charts that are drawn from the records when the site is built.

``<!-- chart: accuracy and bytes -->`` becomes a plot of accuracy against the size of the ONNX file, one for each data
set with real images, and ``<!-- chart: time to accuracy -->`` one of accuracy against minutes. ``<!-- chart: KEY -->``
is a chart of the papers' tables, ``<!-- charts: KEY KEY -->`` several side by side; the keys are those of
``render_charts``.
"""

from __future__ import annotations

import html
import json
import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from generated_pages import packaged_recipes
from rivals_page import NAMES

from zskd_nni.pipeline.comparison import bits_of
from zskd_nni.research.reproduction.ablation_charts import accuracy_axis, curves_chart
from zskd_nni.research.reproduction.charts import Row, position, range_of, ticks_between
from zskd_nni.research.reproduction.page import render_charts
from zskd_nni.research.reproduction.records import read_records

ROOT = Path(__file__).resolve().parents[2]
TITLES = {"cifar10": "CIFAR-10", "fashion-mnist": "Fashion-MNIST", "mnist": "MNIST"}
KINDS = {"real": "same recipe on real images", "free": "student", "leaves": "on dead leaves", "noise": "on noise"}
RIVAL = "another tool or method without data"
RIVALS_OF = {"alexnet": "cifar10-prune50-quick", "lenet5": "fashion-mnist-taylor50"}  # and our recipe of their half
WAYS = {  # of time-to-accuracy.json: name and style
    "ours": ("ours", "free best"),
    "published": ("the schedule of ZSKD's released code", "free"),
    "real": ("the same distillation on real images", "real"),
}
_MINUTES = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_MARK = re.compile(r"<!-- chart(?P<several>s?): (?P<what>[^>]*?) -->")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 270, 40, 14, 34, 42
_APART = 13  # recipes of about one size stand side by side


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the charts in."""

    def chart(match: re.Match[str]) -> str:
        if match["what"] == "accuracy and bytes":
            return accuracy_and_bytes()
        if match["what"] == "time to accuracy":
            return f'<div class="chart-of-methods">\n{time_to_accuracy()}\n</div>\n\n{table_of_budgets()}'
        if match["several"]:
            figures = "\n".join(charts_of_tables()[key] for key in match["what"].split())
            return f'<div class="charts">\n{figures}\n</div>'
        return f'<div class="chart-of-methods">\n{charts_of_tables()[match["what"]]}\n</div>'

    return _MARK.sub(chart, markdown)


@cache
def charts_of_tables() -> dict[str, str]:
    """Of the papers' tables, by key."""
    return render_charts(read_records(ROOT / "results" / "reproduce"))


@dataclass(frozen=True)
class Column:
    """One recipe's student, and what it is compared with, in one precision.

    Attributes:
        label: recipe and precision.
        size: bytes of the student's ONNX file.
        accuracies: by kind, one a seed, in percent.
        rivals: by name, of networks of the same shape and precision.
    """

    label: str
    size: int
    accuracies: dict[str, list[float]]
    rivals: dict[str, float] = field(default_factory=dict)

    def mean(self, kind: str) -> float:
        """Of a kind, over the seeds."""
        return statistics.mean(self.accuracies[kind])


def columns_of(name: str, records: list[dict[str, Any]]) -> Iterator[Column]:
    """The rows that a recipe has in the table of results."""
    first = records[0]
    for suffix in ("", "_int8"):
        if suffix and first["accuracy"].get("student_int8") is None:
            continue
        if not suffix and packaged_recipes().only_calibrates(first):
            continue
        precision = bits_of(first["recipe"]["compression"]["quantization"]) if suffix else "fp32"
        found = {
            "free": [record["accuracy"][f"student{suffix}"] for record in records],
            "real": [
                record["real_data"]["accuracy"][f"student{suffix}"] for record in records if "real_data" in record
            ],
        }
        for kind in ("noise", "leaves"):
            controls = [record["controls"][kind] for record in records if kind in record["controls"]]
            found[kind] = [control[f"accuracy{suffix}"] for control in controls]
        known = {kind: [value for value in values if value is not None] for kind, values in found.items()}
        size = first["bytes"]["student"][f"onnx{suffix}"]
        accuracies = {kind: values for kind, values in known.items() if values}
        yield Column(f"{name}, {precision}", size, accuracies, rivals_of(name, precision, first))


def rivals_of(name: str, precision: str, record: dict[str, Any]) -> dict[str, float]:
    """By name the accuracies of other tools for our recipe's shape and precision, means over their seeds."""
    network = next((key for key, half in RIVALS_OF.items() if half.split("-")[0] == name.split("-")[0]), "")
    path = ROOT / "results" / f"rivals-{network}.json"
    task = "half" if name == RIVALS_OF.get(network) else {"int8": "W8A8"}.get(precision, precision)
    rows = [row for row in json.loads(path.read_text()) if row["task"] == task] if path.exists() else []
    if {row.get("parameters", record["parameters"]["student"]) for row in rows} != {record["parameters"]["student"]}:
        return {}
    found: dict[str, list[float]] = {}
    for row in rows:
        if not row["rival"].startswith(("ours", "real")) and "accuracy" in row:
            found.setdefault(", ".join(NAMES[row["rival"]]), []).append(row["accuracy"])
    return {rival: statistics.mean(values) for rival, values in found.items()}


def accuracy_and_bytes() -> str:
    """A panel for each data set, side by side where there is room, and what the marks mean."""
    panels: dict[str, tuple[dict[str, tuple[float, int]], list[Column]]] = {}
    for path in packaged_recipes().recipe_results():
        records = json.loads(path.read_text())
        data = records[0]["recipe"]["evaluation"]["data"]
        if data in TITLES:
            teachers, columns = panels.setdefault(data, ({}, []))
            name = records[0]["recipe"]["teacher"]["weights"].removeprefix("zoo:")
            teachers[name] = (records[0]["accuracy"]["teacher"], records[0]["bytes"]["teacher"]["onnx"])
            columns.extend(columns_of(path.stem, records))
    drawn = "\n".join(panel(data, *panels[data]) for data in TITLES if data in panels)
    marks = " ".join(f'<span><svg viewBox="0 0 14 14">{mark(kind, 7, 7)}</svg>{said}</span>'
                     for kind, said in {"teacher": "teacher", **KINDS, "rival": RIVAL}.items())  # fmt: skip
    return f'<div class="charts">\n{drawn}\n</div>\n<p class="marks">{marks}</p>'


def budgets() -> Iterator[tuple[str, int | None, int, float, list[float]]]:
    """Of each budget of ``time-to-accuracy.json``: way, impressions, steps, mean minutes, the seeds' accuracies."""
    points = json.loads((ROOT / "results" / "time-to-accuracy.json").read_text())
    found: dict[tuple[str, int | None, int], list[dict[str, Any]]] = {}
    for point in sorted(points, key=lambda one: (list(WAYS).index(one["way"]), one["steps"])):
        found.setdefault((point["way"], point["impressions"], point["steps"]), []).append(point)
    for (way, size, steps), runs in found.items():
        minutes = round(statistics.mean(run["seconds"] for run in runs) / 60, 1)
        yield way, size, steps, minutes, [run["accuracy"] for run in runs]


def table_of_budgets() -> str:
    """The points of :func:`time_to_accuracy` as a Markdown table."""
    lines = [
        "| images | impressions | steps of the student | minutes | accuracy, % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for way, size, steps, minutes, values in budgets():
        made = f"{size:,}" if size else "-"
        lines.append(f"| {WAYS[way][0]} | {made} | {steps:,} | {minutes:g} | {Row(way, values, '')} |")
    return "\n".join(lines)


def time_to_accuracy() -> str:
    """A curve for each way of training one pruned network: test accuracy against minutes of one core."""
    curves: dict[str, dict[float, Row]] = {}
    for way, _, _, minutes, values in budgets():
        name, kind = WAYS[way]
        curves.setdefault(name, {})[minutes] = Row(name, values, kind)
    drawn = [row for rows in curves.values() for row in rows.values()]
    times = [minutes for rows in curves.values() for minutes in rows]
    ticks = [tick for tick in _MINUTES if tick <= max(times)]
    ticks = [*[tick for tick in ticks if tick < min(times)][-1:], *[tick for tick in ticks if tick >= min(times)]]
    ticks.append(_MINUTES[_MINUTES.index(ticks[-1]) + 1])
    return curves_chart("Time to accuracy", curves, accuracy_axis(drawn), "minutes of one core", ticks=ticks)


def panel(data: str, teachers: dict[str, tuple[float, int]], columns: list[Column]) -> str:
    """One data set: accuracy in percent (logarithmic in the error) against bytes (logarithmic).

    Args:
        data: one of :data:`TITLES`.
        teachers: by name, accuracy and bytes; a line shows the level of one that stands alone.
        columns: a recipe in one precision each.
    """
    columns = sorted(columns, key=lambda column: (column.size, column.label))
    drawn = [value for c in columns for value in (*map(c.mean, c.accuracies), *c.rivals.values())]
    low, high = range_of([*(accuracy for accuracy, _ in teachers.values()), *drawn])
    sizes = [*(size for _, size in teachers.values()), *(column.size for column in columns)]
    bounds = [math.log(limit(sizes) * factor) for limit, factor in ((min, 0.8), (max, 1.25))]
    inner, floor = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _BOTTOM

    def across(count: float) -> float:
        return _LEFT + inner * (math.log(count) - bounds[0]) / (bounds[1] - bounds[0])

    def down(accuracy: float) -> float:
        return floor - (floor - _TOP) * position(accuracy, low, high)

    parts = [
        f'<figure><figcaption>{TITLES[data]}</figcaption><svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'role="img" aria-label="{TITLES[data]}: test accuracy against bytes of the ONNX file">'
    ]
    for tick in ticks_between(low, high):
        y = down(tick)
        parts.append(f'<path class="grid" d="M{_LEFT},{y:.1f} H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{tick:g}</text>')
    for count in _sizes(math.exp(bounds[0]), math.exp(bounds[1])):
        label = f"{count / 1e6:g} MB" if count >= 1e6 else f"{count / 1e3:g} kB"
        parts.append(f'<path class="grid" d="M{across(count):.1f},{floor} v4"/>')
        parts.append(f'<text class="tick" text-anchor="middle" x="{across(count):.1f}" y="{floor + 16}">{label}</text>')
    parts.append(f'<text class="tick" text-anchor="middle" x="{_LEFT + inner / 2}" y="{floor + 34}">ONNX file</text>')
    parts.append(f'<text class="tick" x="2" y="{_TOP - 22}">test accuracy, %</text>')
    for name, (accuracy, size) in teachers.items():
        if len(teachers) == 1:
            parts.append(f'<path class="teacher" d="M{_LEFT},{down(accuracy):.1f} H{_WIDTH - _RIGHT}"/>')
        said = f"teacher {name}: {accuracy:.2f} %, {size:,} bytes"
        parts.append(f"<g><title>{said}</title>{mark('teacher', across(size), down(accuracy))}</g>")
    for number, (column, x) in enumerate(zip(columns, spread([across(c.size) for c in columns]), strict=True), start=1):
        parts.append(_column(number, column, x, down))
    items = "".join(f"<li>{html.escape(column.label)}</li>" for column in columns)
    return "\n".join([*parts, f"</svg><ol>{items}</ol></figure>"])


def _column(number: int, column: Column, x: float, down: Any) -> str:
    heights = [down(value) for value in (*map(column.mean, column.accuracies), *column.rivals.values())]
    raised = 11 if number > 9 and number % 2 else 0  # two numbers of two digits are wider than marks are apart
    parts = [
        f'<path class="stem" d="M{x:.1f},{_TOP - 2} V{max(heights):.1f}"/>',
        f'<text class="tick number" text-anchor="middle" x="{x:.1f}" y="{_TOP - 6 - raised}">{number}</text>',
    ]
    for name, accuracy in column.rivals.items():
        said = f"{column.label}, instead of ours {name}: {accuracy:.2f} %"
        parts.append(f"<g><title>{html.escape(said)}</title>{mark('rival', x, down(accuracy))}</g>")
    for kind in reversed(KINDS):
        if kind in column.accuracies:
            values = column.accuracies[kind]
            deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            said = f"{column.label}, {KINDS[kind]}: {column.mean(kind):.2f}{deviation} %, {column.size:,} bytes"
            parts.append(f"<g><title>{html.escape(said)}</title>{mark(kind, x, down(column.mean(kind)))}</g>")
    return "\n".join(parts)


def spread(places: list[float]) -> list[float]:
    """Places in rising order, moved apart where they are closer than marks are wide; each group keeps its middle."""
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _start(groups[-1]) - _start(groups[-2]) < _APART * len(groups[-2]):
            last = groups.pop()
            groups[-1] += last
    return [
        min(max(_start(group), _LEFT + 8), _WIDTH - _RIGHT - _APART * (len(group) - 1)) + _APART * index
        for group in groups
        for index in range(len(group))
    ]


def _start(group: list[float]) -> float:
    return statistics.mean(group) - _APART * (len(group) - 1) / 2


def _sizes(low: float, high: float) -> list[float]:
    """Round numbers of bytes in a range; few enough that their labels do not touch."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 3, 4, 6) if high / low < 5 else (1, 2, 5) if high / low < 40 else (1, 3)
    return [step * 10**power for power in powers for step in steps if low <= step * 10**power <= high]


def mark(kind: str, x: float, y: float) -> str:
    """The SVG of one mark."""
    if kind == "teacher":
        return f'<path class="mark teacher-mark" d="M{x:.1f},{y - 6:.1f} l6,6 l-6,6 l-6,-6 z"/>'
    if kind == "noise":
        return f'<path class="mark noise" d="M{x - 4:.1f},{y - 4:.1f} l8,8 m0,-8 l-8,8"/>'
    if kind == "rival":
        return f'<rect class="mark rival" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"/>'
    if kind == "leaves":
        return f'<path class="mark leaves" d="M{x:.1f},{y - 5:.1f} l5,9 h-10 z"/>'
    return f'<circle class="mark {kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
