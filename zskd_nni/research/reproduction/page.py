"""``docs/results.md``, made from the records alone."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from zskd_nni.research.reproduction.cells import Cell, resolve
from zskd_nni.research.reproduction.pairs import PAIRS
from zskd_nni.research.reproduction.published import PUBLISHED, TARGETS, Published, Target
from zskd_nni.research.reproduction.records import Record, teacher_of
from zskd_nni.research.reproduction.tables import TABLES, Table

Group = list[Record]  # the seeds of a cell at a scale

TITLES = {
    "mnist": "MNIST, LeNet-5 to LeNet-5-Half",
    "fashion-mnist": "Fashion-MNIST, LeNet-5 to LeNet-5-Half",
    "digits": "Digits, LeNet-5 to LeNet-5-Half",
    "cifar10-alexnet": "CIFAR-10, AlexNet to AlexNet-Half",
    "cifar10-wrn": "CIFAR-10, WRN-40-2 to WRN-16",
}

# The tables are wide: without the columns at its sides the page has room for them.
HEAD = """---
hide: [navigation, toc]
---

# Results

This page is made from the records in `results/reproduce` by `zskd-nni results`; nothing is written by hand. A record is
one run of `zskd-nni reproduce`: one cell with one seed.

- Accuracy is measured on the whole test split, once a run, for the student of the last step. A number with a standard
  deviation is the mean over the seeds that the column *seeds* lists; one in brackets has no student.
- *agreement*: share of test images on which student and teacher choose the same class. *ECE*: the student's expected
  calibration error in 15 bins. *MTE*: mean transition error with K = 100 and step 1, followed on the student; its
  number of test images stands in each record, and is far below the 1,000 of the paper on a CPU.
- *images*: of the set that the student learnt on; `-` for a stream. Rows marked with a dagger (†) read real
  images.
- Rows of one preset share one student recipe, except for what a name says; ZSKT's `paper` and `fresh` have the one of
  its paper.
- *published* is the paper's own number with its own teacher; ours are other networks' weights, so that the distance to
  the teacher tells more than the number.
- *target* is what we set out to reach at full size, and whether the mean does.
- Presets were chosen on a slice of Fashion-MNIST's training split, with teachers trained for that choice, and frozen.
  Where it was otherwise (MNIST's steps, CIFAR's settings, ATS and ZSKT) `selected_on` of each record says how. The
  shipped teachers have seen the whole split.
- *time* is the mean of a run on the machine of its record, a shared CPU core for most: synthesis, student, measuring.
"""

# The site puts the table of results/*.json in the comment's place.
RECIPES = """## Packaged recipes

`results/*.json` holds the runs of the packaged recipes, which do more than this page asks: pruning, quantization,
controls. Their table stands in the README.

<!-- results: -->
"""


def group_records(records: Iterable[Record]) -> dict[tuple[str, str], Group]:
    """Records by cell and scale, each group in the order of its seeds."""
    groups: dict[tuple[str, str], Group] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        groups.setdefault((record["cell"], record["scale"]), []).append(record)
    return groups


def mean_and_deviation(values: Sequence[float], digits: int = 2) -> str:
    """``98.50 ± 0.20``; without a deviation where there is one value, ``-`` where there is none."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _students(group: Group) -> list[float]:
    return [record["accuracy"]["student"] for record in group if record["accuracy"]["student"] is not None]


def _values(group: Group, get: Callable[[Record], float | None]) -> list[float]:
    return [value for record in group if (value := get(record)) is not None]


def render_page(records: Iterable[Record], teachers: Mapping[str, str] | None = None) -> str:
    """The whole page, as Markdown.

    Args:
        records: of any cells.
        teachers: by pair the fingerprint of its teacher as it is now; records of others are older ones. Of a pair that
            is not among them the teacher that most of its records have.
    """
    groups = group_records(records)
    stale = take_out_older(groups, teachers)
    parts = [HEAD]
    for name, table in TABLES.items():
        parts.append(f"## {table.title}\n\n{table.text}\n")
        found = [section for pair in _pairs(table) for section in _sections(name, table, pair, groups)]
        parts.extend(found or [f"No runs yet: `zskd-nni reproduce {name}`.\n"])
    known = {cell.name for table in TABLES.values() for cell in table.cells}
    others = sorted({cell for cell, _ in groups if cell not in known})
    if others:
        parts.append(
            "## Other records\n\nOf cells that no table has any more: " + ", ".join(f"`{o}`" for o in others) + ".\n"
        )
    if stale:
        parts.append(
            "## Older records\n\nOf settings or a teacher that have changed since; they count nowhere above: "
            + ", ".join(f"`{name}`" for name in stale)
            + ".\n"
        )
    return "\n".join([*parts, RECIPES])


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


def _pairs(table: Table) -> list[str]:
    return list(dict.fromkeys(cell.pair for cell in table.cells))


def _sections(name: str, table: Table, pair: str, groups: dict[tuple[str, str], Group]) -> list[str]:
    cells = [cell for cell in table.cells if cell.pair == pair]
    sections = []
    for scale in PAIRS[pair].scales:
        run = [cell for cell in cells if (cell.name, scale) in groups]
        if not run:
            continue
        heading = f"### {TITLES[pair]}" + ("" if scale == "full" else f", scale `{scale}`")
        seeds = sum(len(groups[cell.name, scale]) for cell in run)
        text = f"{len(run)} of {len(cells)} cells, {seeds} of {len(cells) * len(table.seeds)} runs."
        body = _balance_rows(run, scale, groups) if name == "ats-balance" else _rows(run, scale, groups)
        sections.append(f"{heading}\n\n{text}\n\n{body}\n")
    return sections


def _rows(cells: Sequence[Cell], scale: str, groups: dict[tuple[str, str], Group]) -> str:
    lines = [
        "| method | preset | variant | images | teacher | student | agreement | ECE | MTE | published | target | seeds "
        "| time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines.extend(_row(cell, groups[cell.name, scale], scale, groups) for cell in cells)
    return "\n".join(lines) + _sources(cells)


def _row(cell: Cell, group: Group, scale: str, groups: dict[tuple[str, str], Group]) -> str:
    first = group[0]
    dagger = "" if first.get("data_free", True) else " †"
    sizes = [record["impressions"] for record in group if record["impressions"] is not None]
    images = f"{sizes[0]:,}" if sizes else "-"  # a seed that cannot be balanced has none
    agreements = _values(group, lambda record: None if record["agreement"] is None else 100 * record["agreement"])
    errors = _values(group, lambda record: record["calibration_error"].get("student"))
    student = f"**{mean_and_deviation(_students(group))}**" if _students(group) else "cannot be balanced"
    fields = [
        cell.method + dagger,
        cell.preset or "-",
        first["variant"] or "-",
        images,
        f"{first['accuracy']['teacher']:.2f}",
        student,
        mean_and_deviation(agreements),
        mean_and_deviation(errors, 3),
        mean_and_deviation(_values(group, lambda record: record["mte"]), 3),
        _published(cell),
        _target(cell, group, scale, groups),
        _seeds(group),
        _time(statistics.mean(record["seconds"]["total"] for record in group)),
    ]
    return "| " + " | ".join(fields) + " |"


def _seeds(group: Group) -> str:
    """The seeds of a mean; those that have no student stand in brackets."""
    learnt = [record for record in group if record["accuracy"]["student"] is not None]
    return ", ".join(str(r["seed"]) if r in learnt or not learnt else f"({r['seed']})" for r in group)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _known(cell: Cell) -> Published | None:
    """The paper's number for a row as the paper has it: no variant but the number of shots."""
    if cell.variant and cell.shots is None:
        return None
    method = cell.method if cell.shots is None else f"{cell.method}-{cell.shots}"
    return PUBLISHED.get((cell.pair, method, cell.network))


def _published(cell: Cell) -> str:
    known = _known(cell)
    if known is None:
        return "-"
    details = [f"teacher {known.teacher:.2f}"] if known.teacher is not None else []
    details += [f"MTE {known.mte}"] if known.mte is not None else []
    return f"{known.accuracy:.2f}" + (f" ({', '.join(details)})" if details else "")


def _sources(cells: Sequence[Cell]) -> str:
    """Where the published numbers of some rows stand."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        known = _known(cell)
        if known is not None and cell.method not in found.setdefault(known.source, []):
            found[known.source].append(cell.method)
    if not found:
        return ""
    return "\n\nPublished: " + "; ".join(f"{', '.join(methods)}: {source}" for source, methods in found.items()) + "."


def _target(cell: Cell, group: Group, scale: str, groups: dict[tuple[str, str], Group]) -> str:
    target = None if cell.variant or cell.network else TARGETS.get((cell.pair, cell.method, cell.preset))
    if target is None or scale != "full" or not _students(group):
        return "-"
    mean, shown = statistics.mean(_students(group)), []
    for name, least in _parts(target, cell.pair, group, scale, groups):
        if least is None:
            shown.append(f"{name}: not run")
        else:
            # As shown: the mean has two digits.
            missing = round(least, 2) - round(mean, 2)
            shown.append(f"{name}: " + ("met" if missing <= 1e-9 else f"missed by {missing:.2f}"))
    return "; ".join(shown)


def _parts(
    target: Target, pair: str, group: Group, scale: str, groups: dict[tuple[str, str], Group]
) -> Iterable[tuple[str, float | None]]:
    """Each part of a target in words, and the accuracy it comes to, None where the row it refers to is not there."""

    def of(cell: Cell) -> float | None:
        values = _students(groups.get((cell.name, scale), []))
        return statistics.mean(values) if values else None

    if target.floor is not None:
        yield f"{target.floor:.2f}", target.floor
    if target.below_teacher is not None:
        least = group[0]["accuracy"]["teacher"] - target.below_teacher
        yield f"{least:.2f} (teacher - {target.below_teacher:.2f})", least
    if target.below is not None:
        real = of(Cell(pair, "real-kd", target.below[0]))
        shown = "" if real is None else f"{real - target.below[1]:.2f} "
        yield f"{shown}(real KD - {target.below[1]:g})", None if real is None else real - target.below[1]
    if target.above is not None:
        other = of(Cell(pair, *target.above))
        shown = "" if other is None else f"{other:.2f} "
        yield f"{shown}({' '.join(target.above)})", other


def _balance_rows(cells: Sequence[Cell], scale: str, groups: dict[tuple[str, str], Group]) -> str:
    """Balanced beside unbalanced, seed by seed."""
    lines = [
        "| source | images | balanced | unbalanced | difference over paired seeds | by two deviations "
        "| own / repeats / nearest of the balanced set | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant in dict.fromkeys(cell.variant for cell in cells):
        found = {cell.preset: groups[cell.name, scale] for cell in cells if cell.variant == variant}
        balanced, unbalanced = found.get("paper", []), found.get("unbalanced", [])
        whole = [*balanced, *unbalanced]
        by_seed = {r["seed"]: r["accuracy"]["student"] for r in unbalanced}
        differences = [
            record["accuracy"]["student"] - by_seed[record["seed"]]
            for record in balanced
            if record["accuracy"]["student"] is not None and by_seed.get(record["seed"]) is not None
        ]
        ahead = "-"
        if len(differences) > 1:
            deviation = statistics.stdev(differences)
            ahead = "yes" if statistics.mean(differences) > 2 * deviation else "no"
        # An arbitrary set of real images, such as another data set, is not data-free.
        dagger = "" if all(record.get("data_free", True) for record in whole) else " †"
        cannot = bool(balanced) and not _students(balanced)
        fields = [
            f"{', '.join(whole[0]['ingredients']['sources'])}{dagger}"
            + (", logits alone" if variant.endswith("-logits") else ""),
            next((f"{r['impressions']:,}" for r in whole if r["impressions"]), "-"),
            "cannot be balanced" if cannot else mean_and_deviation(_students(balanced)),
            mean_and_deviation(_students(unbalanced)),
            mean_and_deviation(differences),
            ahead,
            _counts(balanced),
            ", ".join(str(seed) for seed in sorted({record["seed"] for record in whole})),
        ]
        lines.append("| " + " | ".join(fields) + " |")
    return "\n".join(lines)


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
