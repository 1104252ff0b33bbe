"""``docs/results.md``, made from the records alone."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zskd_nni.research.reproduction.ablation_charts import Ablation, ablation_charts, ablations
from zskd_nni.research.reproduction.cells import Cell, resolve
from zskd_nni.research.reproduction.charts import Row, dot_chart, rows_of, verdict
from zskd_nni.research.reproduction.pairs import PAIRS
from zskd_nni.research.reproduction.published import PUBLISHED, TARGETS, Published
from zskd_nni.research.reproduction.records import Record, teacher_of
from zskd_nni.research.reproduction.tables import TABLES

Group = list[Record]  # the seeds of a cell at a scale
Groups = dict[tuple[str, str], Group]  # by name of the cell and scale

# The text around the tables; the site replaces "results:" by the table of results/*.json.
TEMPLATE = Path(__file__).parent / "templates" / "results.md"
TITLES = {  # in the order of the summary
    "cifar10-alexnet": "CIFAR-10, AlexNet to AlexNet-Half",
    "cifar10-wrn": "CIFAR-10, WRN-40-2 to WRN-16",
    "fashion-mnist": "Fashion-MNIST, LeNet-5 to LeNet-5-Half",
    "mnist": "MNIST, LeNet-5 to LeNet-5-Half",
    "digits": "Digits, LeNet-5 to LeNet-5-Half",
}
DATA = {pair: title.split(" to ")[0] for pair, title in TITLES.items()}
COLUMNS = (
    "method | preset | variant | images | teacher | student | agreement | ECE | MTE | published | target | seeds | time"
)
# The tables that compare all methods, in the order of the charts.
SUMMARIES = ("cifar10-alexnet", "cifar10-wrn", "main", "digits")
BALANCE_COLUMNS = (
    "source | images | balanced | unbalanced | difference over paired seeds | by two deviations "
    "| own / repeats / nearest of the balanced set | seeds"
)


def group_records(records: Iterable[Record]) -> Groups:
    """Records by cell and scale, each group in the order of its seeds."""
    groups: Groups = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        groups.setdefault((record["cell"], record["scale"]), []).append(record)
    return groups


def mean_and_deviation(values: Iterable[float | None], digits: int = 2) -> str:
    """``98.50 ± 0.20``; without a deviation if there is one value, ``-`` if there is none. None is left out."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def percent_agreement(record: Record) -> float | None:
    """Agreement with the teacher in percent; None if the cell has no student."""
    return None if record["agreement"] is None else 100 * record["agreement"]


def student_accuracies(group: Group) -> list[float]:
    """Of the records that have a student."""
    return [record["accuracy"]["student"] for record in group if record["accuracy"]["student"] is not None]


def render_page(records: Iterable[Record], teachers: Mapping[str, str] | None = None) -> str:
    """The whole page, as Markdown.

    Args:
        records: of any cells.
        teachers: by pair the fingerprint of its present teacher; records of other teachers are older ones. For other
            pairs the teacher that most of the records have.
    """
    groups = group_records(records)
    older = take_out_older(groups, teachers)
    parts, missing, drawn = [], [], list(_ablations(groups))
    for name, table in TABLES.items():
        found = [
            str(section)
            for pair in dict.fromkeys(cell.pair for cell in table.cells)
            for scale in PAIRS[pair].scales
            if (section := _Section(name, pair, scale, groups)).rows
        ]
        if not found:
            missing.append(f"- {table.title}. No runs yet: `zskd-nni reproduce {name}`.")
            continue
        charts = [key for key in drawn if key in {f"{name}-{pair}" for pair in PAIRS}]
        parts.append(f"## {table.title}\n\n{table.text}\n")
        parts += [f"<!-- charts: {' '.join(charts)} -->\n"] if charts else []
        parts.extend(found)
    if missing:
        parts += ["## Tables without runs\n", *missing, ""]
    known = {cell.name for table in TABLES.values() for cell in table.cells}
    others = sorted({cell for cell, _ in groups if cell not in known})
    for title, text, names in (
        ("Other records", "Of cells that no table has any more", others),
        ("Older records", "Of settings or a teacher that have changed since; they count nowhere above", older),
    ):
        if names:
            parts.append(f"## {title}\n\n{text}: " + ", ".join(f"`{name}`" for name in names) + ".\n")
    page = TEMPLATE.read_text().replace("{{ tables }}", "\n".join(parts))
    return page.replace("{{ summary }}", "\n".join(map(str, summaries(groups))))


def render_charts(records: Iterable[Record], teachers: Mapping[str, str] | None = None) -> dict[str, str]:
    """The page's charts as SVG: those of all methods by pair, and those of one table by ``TABLE-PAIR``.

    The site puts them where the page says ``<!-- chart: KEY -->`` or, side by side, ``<!-- charts: KEY KEY -->``.

    Args:
        records: of any cells.
        teachers: as :func:`render_page` takes them.
    """
    groups = group_records(records)
    take_out_older(groups, teachers)
    charts = {found.pair: dot_chart(TITLES[found.pair], found.rows, found.teacher) for found in summaries(groups)}
    return {**charts, **ablation_charts(_ablations(groups), DATA)}


def _ablations(groups: Groups) -> dict[str, Ablation]:
    tables = {name: table.cells for name, table in TABLES.items()}
    return ablations(tables, lambda pair: PAIRS[pair].scales, groups)


@dataclass(frozen=True)
class Summary:
    """All methods of a pair at its largest scale that has records."""

    pair: str
    scale: str
    rows: list[Row]
    teacher: float

    def __str__(self) -> str:
        scale = "" if self.scale == "full" else f" At scale `{self.scale}`."
        said = f"{verdict(self.rows, self.teacher)}{scale}"
        return f"### {TITLES[self.pair]}: summary\n\n{said}\n\n<!-- chart: {self.pair} -->\n"


def summaries(groups: Groups) -> Iterator[Summary]:
    """Of each pair that has a student in a table of all methods; colour first, then the harder of the grey sets."""
    found: dict[str, list[Cell]] = {}
    for cell in (cell for name in SUMMARIES for cell in TABLES[name].cells):
        found.setdefault(cell.pair, []).append(cell)
    for pair in sorted(found, key=list(TITLES).index):
        for scale in PAIRS[pair].scales:
            rows = rows_of((cell, groups.get((cell.name, scale), [])) for cell in found[pair])
            if rows:
                first = next(groups[cell.name, scale][0] for cell in found[pair] if (cell.name, scale) in groups)
                yield Summary(pair, scale, rows, first["accuracy"]["teacher"])
                break


def take_out_older(groups: dict[tuple[str, str], Group], now: Mapping[str, str] | None = None) -> list[str]:
    """Keep the records of present settings, and of one teacher of each pair; returns the names of the others.

    Args:
        groups: is changed.
        now: by pair the teacher's fingerprint; for other pairs the teacher that most of the records have.
    """
    cells = {cell.name: cell for table in TABLES.values() for cell in table.cells}
    known = [key for key in groups if key[0] in cells and key[1] in PAIRS[cells[key[0]].pair].scales]
    present = {key: list(filter(resolve(cells[key[0]], key[1]).matches, groups[key])) for key in known}
    teachers: dict[str, Counter[str]] = {}
    for (cell, _), group in present.items():
        teachers.setdefault(cells[cell].pair, Counter()).update(map(teacher_of, group))
    removed = []
    for (cell, scale), group in present.items():
        pair = cells[cell].pair
        wanted = (now or {}).get(pair) or next((name for name, _ in teachers[pair].most_common(1)), None)
        kept = [record for record in group if teacher_of(record) == wanted]
        removed += [f"{cell} ({scale}) seed {record['seed']}" for record in groups[cell, scale] if record not in kept]
        groups[cell, scale] = kept
        if not kept:
            del groups[cell, scale]
    return removed


@dataclass(frozen=True)
class _Section:
    """The runs of one pair at one scale in one table."""

    table: str
    pair: str
    scale: str
    groups: Groups

    def group(self, cell: Cell) -> Group:
        return self.groups.get((cell.name, self.scale), [])

    @property
    def cells(self) -> list[Cell]:
        return [cell for cell in TABLES[self.table].cells if cell.pair == self.pair]

    @property
    def rows(self) -> list[Cell]:
        """The cells that were run."""
        return [cell for cell in self.cells if self.group(cell)]

    def __str__(self) -> str:
        heading = TITLES[self.pair] + ("" if self.scale == "full" else f", scale <code>{self.scale}</code>")
        planned = len(self.cells) * len(TABLES[self.table].seeds)
        runs = f"{sum(len(self.group(cell)) for cell in self.rows)} of {planned} runs"
        if self.table == "ats-balance":
            body = _markdown(BALANCE_COLUMNS, map(self.balance_row, dict.fromkeys(c.variant for c in self.rows)))
        else:
            body = _markdown(COLUMNS, map(self.row, self.rows)) + _sources(self.rows)
        return folded(f"{heading}: {len(self.rows)} of {len(self.cells)} cells, {runs}.", body)

    def row(self, cell: Cell) -> list[str]:
        group = self.group(cell)
        first, students = group[0], student_accuracies(group)
        seconds = statistics.mean(record["seconds"]["total"] for record in group)
        return [
            cell.method + _dagger(group[:1]),
            cell.preset or "-",
            first["variant"] or "-",
            _images(group),
            f"{first['accuracy']['teacher']:.2f}",
            f"**{mean_and_deviation(students)}**" if students else "cannot be balanced",
            mean_and_deviation(map(percent_agreement, group)),
            mean_and_deviation((record["calibration_error"].get("student") for record in group), 3),
            mean_and_deviation((record["mte"] for record in group), 3),
            _published(cell),
            "; ".join(self.target(cell)) or "-",
            _seeds(group),
            f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min",
        ]

    def target(self, cell: Cell) -> Iterator[str]:
        """For each part of the cell's target: what it is, and whether the mean reaches it."""
        target = None if cell.variant or cell.network else TARGETS.get((cell.pair, cell.method, cell.preset))
        group = self.group(cell)
        if target is None or self.scale != "full" or not student_accuracies(group):
            return
        parts: list[tuple[str, float | None]] = []
        if target.floor is not None:
            parts.append(("{:.2f}", target.floor))
        if target.below_teacher is not None:
            least = group[0]["accuracy"]["teacher"] - target.below_teacher
            parts.append((f"{{:.2f}} (teacher - {target.below_teacher:.2f})", least))
        if target.below is not None:
            preset, points = target.below
            parts.append((f"{{:.2f}} (real KD - {points:g})", self.mean(Cell(cell.pair, "real-kd", preset), -points)))
        if target.above is not None:
            parts.append((f"{{:.2f}} ({' '.join(target.above)})", self.mean(Cell(cell.pair, *target.above))))
        mean = statistics.mean(student_accuracies(group))
        for text, least in parts:
            if least is None:
                yield text.removeprefix("{:.2f} ") + ": not run"
                continue
            missing = round(least, 2) - round(mean, 2)  # of the numbers as they are shown
            yield text.format(least) + (": met" if missing <= 1e-9 else f": missed by {missing:.2f}")

    def mean(self, cell: Cell, points: float = 0.0) -> float | None:
        """The mean accuracy of another row, and so many points; None if it was not run."""
        values = student_accuracies(self.group(cell))
        return statistics.mean(values) + points if values else None

    def balance_row(self, variant: str) -> list[str]:
        """A source, balanced beside unbalanced, seed by seed."""
        found = {cell.preset: self.group(cell) for cell in self.rows if cell.variant == variant}
        balanced, unbalanced = found.get("paper", []), found.get("unbalanced", [])
        whole = [*balanced, *unbalanced]
        pairs = [
            (one["accuracy"]["student"], other["accuracy"]["student"])
            for one in balanced
            for other in unbalanced
            if one["seed"] == other["seed"]
        ]
        differences = [one - other for one, other in pairs if one is not None and other is not None]
        ahead = "-"
        if len(differences) > 1:
            ahead = "yes" if statistics.mean(differences) > 2 * statistics.stdev(differences) else "no"
        cannot = bool(balanced) and not student_accuracies(balanced)
        logits_alone = ", logits alone" if variant.endswith("-logits") else ""
        return [
            ", ".join(whole[0]["ingredients"]["sources"]) + _dagger(whole) + logits_alone,
            _images(whole),
            "cannot be balanced" if cannot else mean_and_deviation(student_accuracies(balanced)),
            mean_and_deviation(student_accuracies(unbalanced)),
            mean_and_deviation(differences),
            ahead,
            _counts(balanced),
            ", ".join(str(seed) for seed in sorted({record["seed"] for record in whole})),
        ]


def folded(summary: str, body: str) -> str:
    """Markdown that a click opens, on the site and on a code host."""
    return f'<details markdown="1">\n<summary>{summary}</summary>\n\n{body}\n\n</details>\n'


def _markdown(columns: str, rows: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(columns.split(" | "))
    return "\n".join(f"| {row} |" for row in (columns, *map(" | ".join, (rule, *rows))))


def _dagger(group: Group) -> str:
    """Marks runs that read real images."""
    return "" if all(record.get("data_free", True) for record in group) else " †"


def _images(group: Group) -> str:
    """Size of the transfer set; a seed that cannot be balanced has none."""
    return next((f"{record['impressions']:,}" for record in group if record["impressions"]), "-")


def _seeds(group: Group) -> str:
    """The seeds of a mean; those that have no student stand in brackets."""
    trained = [record for record in group if record["accuracy"]["student"] is not None]
    return ", ".join(str(r["seed"]) if r in trained or not trained else f"({r['seed']})" for r in group)


def _find_published(cell: Cell) -> Published | None:
    """The paper's number for a row as the paper has it: no variant but the number of shots."""
    if cell.variant and cell.shots is None:
        return None
    method = cell.method if cell.shots is None else f"{cell.method}-{cell.shots}"
    return PUBLISHED.get((cell.pair, method, cell.network))


def _published(cell: Cell) -> str:
    known = _find_published(cell)
    if known is None:
        return "-"
    details = [f"teacher {known.teacher:.2f}"] if known.teacher is not None else []
    details += [f"MTE {known.mte}"] if known.mte is not None else []
    return f"{known.accuracy:.2f}" + (f" ({', '.join(details)})" if details else "")


def _sources(cells: Sequence[Cell]) -> str:
    """Where the published numbers of some rows come from."""
    found: dict[str, dict[str, None]] = {}
    for cell in cells:
        known = _find_published(cell)
        if known is not None:
            found.setdefault(known.source, {})[cell.method] = None
    listed = "; ".join(f"{', '.join(methods)}: {source}" for source, methods in found.items())
    return f"\n\nPublished: {listed}." if listed else ""


def _counts(group: Group) -> str:
    """How the sets of a group came about, summed over classes and averaged over seeds."""
    counts = [record["transfer"]["counts"] for record in group if record.get("transfer")]
    if not counts:
        return "-"
    made = [one for one in counts if "own" in one]
    if not made:
        return "candidates by class: " + ", ".join(f"{count:,}" for count in counts[0]["candidates"])
    shown = " / ".join(f"{statistics.mean(sum(c[name]) for c in made):,.0f}" for name in ("own", "repeats", "nearest"))
    return shown if len(made) == len(counts) else f"{shown} (of {len(counts)} seeds {len(made)} could be balanced)"
