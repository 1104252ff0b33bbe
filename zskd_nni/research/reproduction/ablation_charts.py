"""Charts of the tables that vary one thing at a time, as SVG; their colours come from the page's style.

Three kinds: marks (a row for each part, a mark for each way of taking it), curves (over sizes or shots), and
differences of paired seeds. Bars are one standard deviation over the seeds to either side.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from zskd_nni.research.reproduction.cells import Cell
from zskd_nni.research.reproduction.charts import Row, position
from zskd_nni.research.reproduction.records import Record

Groups = Mapping[tuple[str, str], Sequence[Record]]
Cells = Mapping[str, tuple[Cell, ...]]  # of each table

TICKS = (0, 20, 40, 50, 60, 70, 80, 85, 90, 95, 98, 99, 99.5)
_WIDTH, _SIDE, _ROW, _TOP, _BOTTOM = 400, 14, 38, 26, 38
_CURVES_LEFT, _CURVES_HEIGHT = 38, 230
_LETTER = 6.3  # mean width of a letter of a legend, in units of the drawing

# What a variant of a cell is called in a chart; others are named as they are.
LABELS = {
    "start": "starts: shapes and smooth noise",
    "held-background": "black background held",
    "fit-temperature": "images fitted at temperatures of 1.5 to 8",
    "total-variation": "smoothness prior",
    "step-limits": "a step limit for each image",
    "learning-rate": "images' learning rate 0.05",
    "augmentation": "student's images augmented",
    "student-temperature": "student's temperature 4",
    "student-learning-rate": "student's learning rate 0.005",
    "features": "hidden layers matched",
    "rhythm": "10 generator steps, then 50 of the student",
    "classes": "generator is given a class",
    "renewed-layer": "first layer drawn anew each round",
    "memory": "memory of images",
    "memory-and-figures": "memory, with shapes in it",
    "figures": "shapes in the memory",
    "bounded-images": "images bounded to the value range",
    "adversary": "adversarial term",
    "filling": "memory filled before the student's first step",
    "beta-0.1": "beta 0.1",
    "beta-1.0": "beta 1.0",
    "noise-start": "start: noise",
    "temperature-20": "temperature 20",
    "draws-cut": "draws cut at 0",
    "outgoing-weights": "outgoing weights",
    "no-activation-term": "no activation term",
    "uniform": "uniform noise",
    "gaussian": "Gaussian noise",
    "synthetic": "mixed",
    "natural": "the other data set",
}


@dataclass(frozen=True)
class Axis:
    """An axis from ``low`` to ``high`` with its ticks; that of accuracies is logarithmic in the error."""

    low: float
    high: float
    ticks: tuple[float, ...]
    name: str = "test accuracy, %"
    linear: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1; held to the axis."""
        if not self.linear:
            return position(value, self.low, self.high)
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


def accuracy_axis(rows: Iterable[Row]) -> Axis:
    """From the tick below the lowest end of a bar to the tick above the highest."""
    ends = [end for row in rows for end in (row.mean - row.deviation, min(row.mean + row.deviation, TICKS[-1]))]
    low = max(tick for tick in TICKS if tick <= max(0, min(ends)))
    high = min(tick for tick in TICKS if tick >= max(ends) and tick > low)
    return Axis(low, high, tuple(tick for tick in TICKS if low <= tick <= high))


def difference_axis(rows: Iterable[Row]) -> Axis:
    """In points, with 0 on it."""
    known = list(rows)
    ends = [0.0, *(row.mean + side * row.deviation for row in known for side in (-1, 1))]
    low, high = 5 * (min(ends) // 5), -5 * (-max(ends) // 5)
    step = 5 if high - low <= 30 else 10
    ticks = tuple(float(tick) for tick in range(int(low), int(high) + 1) if tick % step == 0)
    return Axis(low, high, ticks, "points of accuracy", linear=True)


def marks_chart(
    title: str, rows: Mapping[str, Sequence[Row]], axis: Axis, levels: Iterable[Row] = (), styles: Iterable[str] = ()
) -> str:
    """An SVG with a line for each entry of ``rows``: its name, and below it a mark for each of its ``Row``.

    Args:
        title: what is drawn, for readers who cannot see it.
        rows: by name; a ``Row.kind`` is the style of its mark, its label the name in the legend.
        axis: of the accuracies or differences.
        levels: drawn as lines from top to bottom, named above.
        styles: of the legend, in order; those of ``rows`` where absent.
    """
    kinds = {row.kind: row.label for marks in rows.values() for row in marks}
    legend = {kind: kinds[kind] for kind in (styles or kinds) if kind in kinds}
    head = _TOP + (18 * _legend_lines(legend.values()) if len(legend) > 1 else 0)
    floor = head + _ROW * len(rows)

    def x(value: float) -> float:
        return _SIDE + (_WIDTH - 2 * _SIDE) * axis.share(value)

    parts = [_opening(title, rows.items(), floor + _BOTTOM)]
    if len(legend) > 1:
        parts += _legend(legend)
    for tick in axis.ticks:
        strong = " zero" if axis.linear and tick == 0 else ""
        parts.append(f'<path class="grid{strong}" d="M{x(tick):.1f},{head} V{floor}"/>')
        parts.append(f'<text class="tick" text-anchor="middle" x="{x(tick):.1f}" y="{floor + 14}">{tick:g}</text>')
    parts.append(f'<text class="tick" text-anchor="middle" x="{_WIDTH / 2}" y="{floor + 31}">{axis.name}</text>')
    for level in levels:
        at = x(level.mean)
        anchor = "end" if at > 0.7 * _WIDTH else "start" if at < 0.3 * _WIDTH else "middle"
        parts.append(f'<path class="teacher" d="M{at:.1f},{head - 2} V{floor}"/>')
        parts.append(
            f'<text class="tick" text-anchor="{anchor}" x="{at:.1f}" y="{head - 7}">'
            f"{html.escape(level.label)} {level.mean:.1f}</text>"
        )
    for number, (name, marks) in enumerate(rows.items()):
        top = head + number * _ROW
        parts.append(f'<text class="name" x="{_SIDE}" y="{top + 13}">{html.escape(name)}</text>')
        for index, row in enumerate(marks):
            y = top + 24 + 8 * index - 4 * (len(marks) - 1)
            parts.append(_mark(row, name, x(row.mean), y, (x(row.mean - row.deviation), x(row.mean + row.deviation))))
    return "\n".join([*parts, "</svg>"])


def curves_chart(
    title: str,
    curves: Mapping[str, Mapping[float, Row]],
    axis: Axis,
    across: str,
    levels: Iterable[Row] = (),
    ticks: Sequence[float] = (),
) -> str:
    """An SVG of accuracies over sizes: a curve for each entry, with bars.

    Args:
        title: what is drawn, for readers who cannot see it.
        curves: by name, a row by size; the rows of a curve have one kind.
        axis: of the accuracies.
        across: name of the sizes.
        levels: drawn as lines from left to right.
        ticks: of a logarithmic axis of the sizes, from end to end; they stand at equal distances where absent.
    """
    places = sorted({place for rows in curves.values() for place in rows})
    head = 26 + 18 * _legend_lines(curves)
    floor, inner = head + _CURVES_HEIGHT, _WIDTH - _CURVES_LEFT - 2 * _SIDE

    def x(place: float) -> float:
        if ticks:
            share = math.log(place / ticks[0]) / math.log(ticks[-1] / ticks[0])
        else:
            share = places.index(place) / max(1, len(places) - 1)
        return _CURVES_LEFT + _SIDE + inner * share

    def y(value: float) -> float:
        return floor - _CURVES_HEIGHT * axis.share(value)

    parts = [_opening(title, ((name, rows.values()) for name, rows in curves.items()), floor + _BOTTOM)]
    parts += _legend({next(iter(rows.values())).kind: name for name, rows in curves.items()})
    parts.append(f'<text class="tick" x="2" y="{head - 10}">{axis.name}</text>')
    for tick in axis.ticks:
        parts.append(f'<path class="grid" d="M{_CURVES_LEFT},{y(tick):.1f} H{_WIDTH - _SIDE / 2}"/>')
        parts.append(
            f'<text class="tick" text-anchor="end" x="{_CURVES_LEFT - 6}" y="{y(tick) + 4:.1f}">{tick:g}</text>'
        )
    for place in ticks or places:
        parts.append(f'<text class="tick" text-anchor="middle" x="{x(place):.1f}" y="{floor + 15}">{place:g}</text>')
    middle = _CURVES_LEFT + _SIDE + inner / 2
    parts.append(f'<text class="tick" text-anchor="middle" x="{middle:.0f}" y="{floor + 32}">{across}</text>')
    for level in levels:
        at = y(level.mean)
        parts.append(f'<path class="teacher" d="M{_CURVES_LEFT},{at:.1f} H{_WIDTH - _SIDE / 2}"/>')
        said = f"{html.escape(level.label)} {level.mean:.1f}"
        parts.append(f'<text class="tick" x="{_CURVES_LEFT + 4}" y="{at - 4:.1f}">{said}</text>')
    for name, rows in curves.items():
        line = " L".join(f"{x(place):.1f},{y(row.mean):.1f}" for place, row in sorted(rows.items()))
        kind = next(iter(rows.values())).kind
        parts.append(f'<path class="curve {kind}" d="M{line}"/>')
        for place, row in rows.items():
            ends = (y(row.mean - row.deviation), y(row.mean + row.deviation))
            parts.append(_mark(row, f"{name}, {place:g}", x(place), y(row.mean), ends, upright=True))
    return "\n".join([*parts, "</svg>"])


def _opening(title: str, rows: Iterable[tuple[str, Iterable[Row]]], height: float) -> str:
    spoken = "; ".join(f"{name}: {', '.join(f'{row.label} {row}' for row in marks)}" for name, marks in rows)
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'aria-label="{html.escape(title)}. {html.escape(spoken)}">'
    )


def _mark(row: Row, name: str, x: float, y: float, ends: tuple[float, float], upright: bool = False) -> str:
    said = html.escape(f"{name}, {row.label}: {row}" if row.label not in name else f"{name}: {row}")
    bar = f"M{x:.1f},{ends[0]:.1f} V{ends[1]:.1f}" if upright else f"M{ends[0]:.1f},{y:.1f} H{ends[1]:.1f}"
    return (
        f'<g class="{row.kind}"><title>{said}</title><path class="spread" d="{bar}"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/></g>'
    )


def _legend_places(names: Iterable[str]) -> list[tuple[float, int]]:
    places, x, line = [], float(_SIDE), 0
    for name in names:
        wide = 22 + _LETTER * len(name)
        if x > _SIDE and x + wide > _WIDTH:
            x, line = float(_SIDE), line + 1
        places.append((x, line))
        x += wide + 8
    return places


def _legend_lines(names: Iterable[str]) -> int:
    return max((line for _, line in _legend_places(names)), default=-1) + 1


def _legend(names: Mapping[str, str]) -> list[str]:
    """Marks with their names above the drawing; the keys are the marks' styles."""
    return [
        f'<g class="{kind}"><circle cx="{x + 5:.1f}" cy="{9 + 18 * line}" r="4.5"/></g>'
        f'<text class="tick" x="{x + 15:.1f}" y="{13 + 18 * line}">{html.escape(name)}</text>'
        for (kind, name), (x, line) in zip(names.items(), _legend_places(names.values()), strict=True)
    ]


@dataclass(frozen=True)
class Ablation:
    """The runs of one pair in one table, at one scale."""

    pair: str
    scale: str
    cells: Sequence[Cell]
    groups: Groups

    def row(self, cell: Cell | None, label: str, kind: str) -> Row | None:
        """A cell's students; None if it was not run."""
        records = self.groups.get((cell.name, self.scale), []) if cell else []
        values = [record["accuracy"]["student"] for record in records]
        known = [value for value in values if value is not None]
        return Row(label, known, kind) if known else None

    def find(self, variant: str, preset: str | None = None, method: str | None = None) -> Cell | None:
        """The first cell of that variant."""
        fits = (c for c in self.cells if c.variant == variant and preset in (None, c.preset))
        return next((c for c in fits if method in (None, c.method)), None)


def parts_chart(found: Ablation) -> str:
    """Each part added to the plain method alone, and left out of the whole."""
    names = dict.fromkeys(
        c.variant.split("-", 1)[1] for c in found.cells if c.variant.startswith(("only-", "without-"))
    )
    rows = {}
    for name in names:
        marks = (
            found.row(found.find(f"only-{name}"), "this part alone", "free"),
            found.row(found.find(f"without-{name}"), "best without it", "free best"),
        )
        rows[LABELS.get(name, name)] = [row for row in marks if row]
    whole = (found.row(found.find("base"), "no part", ""), found.row(found.find("", "best"), "best", ""))
    levels = [row for row in whole if row]
    axis = accuracy_axis([*levels, *(row for marks in rows.values() for row in marks)])
    shown = {name: marks for name, marks in rows.items() if marks}
    return marks_chart("What each part is worth", shown, axis, levels, ("free", "free best"))


def choices_chart(found: Ablation) -> str:
    """One mark for each cell."""
    rows = {}
    for cell in found.cells:
        label = " ".join(part for part in (cell.preset, LABELS.get(cell.variant, cell.variant)) if part)
        if row := found.row(cell, label, "free best" if cell.preset == "best" else "free"):
            rows[label] = [row]
    return marks_chart("Other settings", rows, accuracy_axis(row for (row,) in rows.values()), (), ("free",))


def presets_chart(found: Ablation) -> str:
    """The presets of one method, between noise and real images."""
    rows = {}
    for cell in found.cells:
        label, kind = BESIDE.get(
            (cell.method, cell.preset), (cell.preset, "free best" if cell.preset == "best" else "free")
        )
        if row := found.row(cell, label, kind):
            rows[label] = [row]
    return marks_chart("The presets", rows, accuracy_axis(row for (row,) in rows.values()), (), ("free",))


def augmentation_chart(found: Ablation) -> str:
    """Each method with augmentation and without."""
    rows: dict[str, list[Row]] = {}
    for cell in found.cells:
        label, kind = ("not augmented", "free") if cell.variant else ("augmented", "free best")
        if row := found.row(cell, label, kind):
            rows.setdefault(f"{cell.method.replace('-', ' ')}, {cell.preset}", []).append(row)
    axis = accuracy_axis(row for marks in rows.values() for row in marks)
    return marks_chart("With augmentation and without", rows, axis, (), ("free best", "free"))


def sizes_chart(found: Ablation) -> str:
    """Accuracy over the size of the transfer set."""
    curves: dict[str, dict[float, Row]] = {}
    kinds = {"zskd": ("free best", "free"), "class-impressions": ("other best", "other")}
    for cell in found.cells:
        plain = cell.variant.endswith("not-augmented")
        name = f"{'ZSKD' if cell.method == 'zskd' else 'class impressions'}{', not augmented' if plain else ''}"
        if row := found.row(cell, name, kinds[cell.method][plain]):
            curves.setdefault(name, {})[float(cell.variant.split("-")[0])] = row
    axis = accuracy_axis(row for rows in curves.values() for row in rows.values())
    return curves_chart("Size of the transfer set", curves, axis, "% of the training split's size")


def shots_chart(found: Ablation) -> str:
    """Few-shot distillation over the number of real images, and what a generator reaches without any."""
    rows = {float(cell.shots): row for cell in found.cells
            if cell.shots and (row := found.row(cell, "KD+AT on real images", "real"))}  # fmt: skip
    presets = (found.row(found.find("", name, "zskt"), f"ZSKT {name}, no image", "") for name in ("fresh", "best"))
    levels = [row for row in presets if row]
    axis = accuracy_axis([*rows.values(), *levels])
    return curves_chart("Few real images", {"KD+AT on real images": rows}, axis, "real images a class", levels)


def balance_chart(found: Ablation) -> str:
    """Balanced minus unbalanced, seed by seed."""
    rows: dict[str, list[Row]] = {}
    for variant in dict.fromkeys(cell.variant for cell in found.cells):
        logits = variant.endswith("-logits")
        source = LABELS.get(variant.removesuffix("-logits"), variant.removesuffix("-logits"))
        sets = [found.groups.get((cell.name, found.scale), []) for preset in ("paper", "unbalanced")
                if (cell := found.find(variant, preset))]  # fmt: skip
        by_seed = [{r["seed"]: r["accuracy"]["student"] for r in records} for records in sets]
        differences = [
            one - by_seed[1][seed]
            for seed, one in (by_seed[0] if len(by_seed) == 2 else {}).items()
            if one is not None and by_seed[1].get(seed) is not None
        ]
        if differences:
            label, kind = ("logits alone", "free") if logits else ("hidden layers matched", "free best")
            rows.setdefault(source, []).append(Row(label, differences, kind))
    axis = difference_axis(row for marks in rows.values() for row in marks)
    return marks_chart("Balanced minus unbalanced", rows, axis, (), ("free", "free best"))


# What stands beside a method's presets.
BESIDE = {("noise", ""): ("on noise", "control"), ("real-kd", "best"): ("on real images, trained as best", "real")}
PRESETS_OF = ("zskd", "sts", "zskt")

# How each table is drawn; the others have a chart of all methods, or none.
DRAWN: dict[str, Callable[[Ablation], str]] = {
    "zskd-sizes": sizes_chart,
    "zskd-beta": choices_chart,
    "zskd-augmentation": augmentation_chart,
    "best-ablation": parts_chart,
    "zskt-ablation": parts_chart,
    "ats-balance": balance_chart,
    "kd-at": shots_chart,
    "sts-choices": choices_chart,
}


def ablations(tables: Cells, scales: Callable[[str], Iterable[str]], groups: Groups) -> dict[str, Ablation]:
    """By ``TABLE-PAIR`` what is drawn: the runs at the scale that most of the cells have records of.

    The table ``main`` is drawn method by method: ``METHOD-presets-PAIR``.

    Args:
        tables: the cells of each table.
        scales: the names of a pair's scales.
        groups: records by cell and scale.
    """
    of_methods = {
        f"{method}-presets": [c for c in tables["main"] if c.method == method or (c.method, c.preset) in BESIDE]
        for method in PRESETS_OF
    }
    found = {}
    for name, every in {**{name: tables[name] for name in DRAWN}, **of_methods}.items():
        for pair in dict.fromkeys(cell.pair for cell in every):
            cells = [cell for cell in every if cell.pair == pair]
            runs = {scale: sum((cell.name, scale) in groups for cell in cells) for scale in scales(pair)}
            scale = max(runs, key=runs.__getitem__)
            if runs[scale] > 1:
                found[f"{name}-{pair}"] = Ablation(pair, scale, cells, groups)
    return found


def ablation_charts(found: Mapping[str, Ablation], titles: Mapping[str, str]) -> dict[str, str]:
    """A figure for each, with the pair's title as its caption."""
    figures = {}
    for key, one in found.items():
        scale = "" if one.scale == "full" else f", scale <code>{one.scale}</code>"
        drawn = DRAWN.get(key.removesuffix(f"-{one.pair}"), presets_chart)(one)
        figures[key] = f"<figure><figcaption>{titles[one.pair]}{scale}</figcaption>{drawn}</figure>"
    return figures
