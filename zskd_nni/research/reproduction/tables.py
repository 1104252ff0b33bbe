"""The named tables and their cells: plain data and small loops."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from zskd_nni.data.augmentation import Augmentation
from zskd_nni.methods import sts, zskd
from zskd_nni.methods.ats import method as ats
from zskd_nni.methods.zskt import method as zskt
from zskd_nni.methods.zskt.settings import ZsktSettings
from zskd_nni.research.reproduction.cells import Cell
from zskd_nni.research.reproduction.pairs import PAIRS
from zskd_nni.runtime.errors import UserError
from zskd_nni.synthesis import SynthesisSettings

SEEDS = (0, 1, 2)
PAIRED_SEEDS = (0, 1, 2, 3, 4)
FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.8)
SHOTS = (10, 25, 50, 100, 200)
LENETS = ("mnist", "fashion-mnist")


@dataclass(frozen=True)
class Table:
    """Cells under a heading.

    Attributes:
        title: of its section.
        text: what it compares, in a sentence or two.
        cells: its rows.
        seeds: of its runs, unless others are named.
    """

    title: str
    text: str
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...] = SEEDS


def _cell(pair: str, method: str, preset: str = "", variant: str = "", **more: Any) -> Cell:
    # The mean transition error takes minutes.
    transition = method in ("zskt", "kd-at") or (method in ("zskd", "real-kd") and preset == "best" and not variant)
    return Cell(pair, method, preset, variant, transition=transition, **more)


def _methods(pair: str, network: str = "", author_code: bool = False) -> list[Cell]:
    """Every method of a pair once, in the order of the page; author-code's 1,500 steps only where asked for."""
    presets = {
        "ats": list(ats.PRESETS),
        "class-impressions": ["paper", "best"],
        "zskd": ["paper", *(["author-code"] if author_code else []), "best"],
        "sts": list(sts.PRESETS),
        "zskt": list(zskt.PRESETS),
    }
    cells = [_cell(pair, "none", network=network), _cell(pair, "noise", network=network)]
    cells += [_cell(pair, method, name, network=network) for method, names in presets.items() for name in names]
    # 200 a class is what ZSKT compares itself with, on wide residual networks.
    cells += [_kd_at(pair, count, network) for count in (10, 100, *([200] if network.startswith("wrn") else []))]
    cells += [_cell(pair, "real-kd", name, network=network) for name in ("paper", "best")]
    return [*cells, _cell(pair, "real-labels", network=network)]


def _kd_at(pair: str, shots: int, network: str = "") -> Cell:
    return _cell(pair, "kd-at", variant=f"{shots}-a-class", shots=shots, network=network)


NOT_AUGMENTED: dict[str, Any] = {"augmentation": Augmentation()}


def _sizes(pair: str) -> list[Cell]:
    return [
        Cell(pair, method, "paper", f"{100 * fraction:.0f}-percent{suffix}", fraction, student=student)
        for fraction in FRACTIONS
        for method in ("zskd", "class-impressions")
        for suffix, student in (("-not-augmented", NOT_AUGMENTED), ("", {}))
    ]


def _betas(pair: str) -> list[Cell]:
    betas = {"beta-0.1": (0.1,), "beta-1.0": (1.0,)}
    alone = [Cell(pair, "zskd", "paper", name, options={"targets": {"betas": beta}}) for name, beta in betas.items()]
    return [Cell(pair, "zskd", "paper"), *alone]


def _augmentation(pair: str) -> list[Cell]:
    return [
        _cell(pair, method, preset, variant, student=student)
        for method in ("zskd", "class-impressions", "real-kd")
        for preset in ("paper", "best")
        for variant, student in (("", {}), ("not-augmented", NOT_AUGMENTED))
    ]


# Ingredients of ZSKD's best by name: the keys of synthesis that each changes. Other keys in which best differs from
# paper are ingredients of their own.
INGREDIENTS = {
    "fit-temperature": ("temperature",),
    "start": ("start",),
    "held-background": ("start", "hold"),
    "total-variation": ("total_variation",),
    "step-limits": ("max_steps",),
}


def _ablation(pair: str) -> list[Cell]:
    """From paper to best: each ingredient added to paper alone, and best without each."""
    paper, best = zskd.PRESETS["paper"]["synthesis"], zskd.PRESETS["best"]["synthesis"]
    published = {**asdict(SynthesisSettings()), **paper}
    ingredients, named = dict(INGREDIENTS), {key for keys in INGREDIENTS.values() for key in keys}
    if not PAIRS[pair].teacher_has_batch_norm:
        named.add("batch_statistics")
    other = [key for key in best if key not in named and best[key] != published[key]]
    ingredients.update({key.replace("_", "-"): (key,) for key in other})
    # What the student has without each of its ingredients.
    students: dict[str, dict[str, Any]] = {
        "augmentation": NOT_AUGMENTED,
        "student-temperature": {"temperature": 20.0},
        "student-learning-rate": {"learning_rate": PAIRS[pair].published_student["learning_rate"]},
        "features": {"features": "none"},
    }

    def alone(variant: str, synthesis: Mapping[str, Any], student: Mapping[str, Any] = NOT_AUGMENTED) -> Cell:
        # Size and steps are those of best, so that they are no ingredients.
        options = {"synthesis": synthesis} if synthesis else {}
        student = {**student, "steps": None, "batch": None}
        return _cell(pair, "zskd", "paper", variant, size="best", options=options, student=student)

    cells = [alone("base", {})]
    for name, keys in ingredients.items():
        cells.append(
            alone(f"only-{name}", {key: best[key] for key in keys} | ({"hold": 0.0} if name == "start" else {}))
        )
    for name, without in students.items():
        own = {} if name == "augmentation" else {**NOT_AUGMENTED, **dict.fromkeys(without)}
        cells.append(alone(f"only-{name}", {}, own))
    cells.append(_cell(pair, "zskd", "best"))
    for name, keys in ingredients.items():
        changes = {"hold": 0.0} if name == "held-background" else {key: published[key] for key in keys}
        cells.append(_cell(pair, "zskd", "best", f"without-{name}", options={"synthesis": changes}))
    cells += [_cell(pair, "zskd", "best", f"without-{name}", student=keys) for name, keys in students.items()]
    return cells


def _balance(pair: str) -> list[Cell]:
    """ATS from each source, balanced and not, by the pair's student and by one that matches logits alone."""
    sources = {
        "uniform": "noise-uniform",
        "gaussian": "noise-gaussian",
        "structured": "structured",
        "shapes": "shapes",
        "synthetic": "mixed",
        "natural": PAIRS[pair].unrelated,
    }
    if PAIRS[pair].recipe.spec.shape[0] == 3:
        sources["leaves"] = "leaves"
    logits = {"features": "none", "temperature": 20.0}
    return [
        _cell(pair, "ats", preset, name + variant, options={"sources": (source,)}, student=student)
        for variant, student in (("", {}), ("-logits", logits))
        for name, source in sources.items()
        for preset in ats.PRESETS
    ]


def _zskt(pair: str) -> list[Cell]:
    cells = [_cell(pair, "zskt", preset) for preset in zskt.PRESETS]
    usual = PAIRS[pair].zskt.get("", {}).get("generator_range", ZsktSettings().generator_range)
    other = "unit" if usual == "input" else "input"
    cells.append(_cell(pair, "zskt", "fresh", f"{other}-range", options={"generator_range": other}))
    cells.append(_cell(pair, "zskt", "fresh", "no-attention", options={"attention": "none"}))
    return cells


# What STS's paper leaves open: other settings than those of our `paper`, one at a time.
STS_CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "noise-start": {"synthesis": {"start": "uniform"}},
    "temperature-20": {"targets": {"temperature": 20.0}, "synthesis": {"temperature": 20.0}},
    "draws-cut": {"targets": {"clamp": "relu"}},
    "outgoing-weights": {"targets": {"weights": "outgoing"}},
    "no-activation-term": {"targets": {"activation_weight": 0.0}},
}


def _sts_choices(pair: str) -> list[Cell]:
    changed = [_cell(pair, "sts", "paper", name, options=keys) for name, keys in STS_CHOICES.items()]
    return [_cell(pair, "sts", "paper"), *changed, _cell(pair, "sts", "best")]


# Ingredients of ZSKT's best by name: what its keys are without them. A generator that is not renewed also keeps its
# learning rate.
ZSKT_INGREDIENTS: dict[str, dict[str, Any]] = {
    "rhythm": {"generator_steps": 1, "student_steps": 10},
    "classes": {"class_weight": 0.0},
    "batch-statistics": {"batch_statistics": 0.0},
    "renewed-layer": {"renewed": False},
    "memory": {"memory": 0, "new_images": 0, "filling": 0, "figures": 0, "latents": "fresh"},
    "figures": {"figures": 0},
}


def _zskt_ablation(pair: str) -> list[Cell]:
    """Each ingredient of ZSKT's best alone, and best without each; all students have the pair's recipe."""
    ingredients, published = dict(ZSKT_INGREDIENTS), PAIRS[pair].zskt.get("", {})
    for name, key in (("bounded-images", "generator_range"), ("mean-over-images", "divergence")):
        plain = published.get(key, getattr(ZsktSettings(), key))
        if zskt.PRESETS["best"].get(key, plain) != plain:
            ingredients[name] = {key: plain}
    if not PAIRS[pair].teacher_has_batch_norm:
        del ingredients["batch-statistics"]

    def cell(variant: str, options: Mapping[str, Any]) -> Cell:
        # steps named: the student has the pair's recipe even without a memory.
        return Cell(pair, "zskt", "best", variant, options=options, student={"steps": None})

    base = {key: value for keys in ingredients.values() for key, value in keys.items()}
    # Figures are kept in the memory, which can be without them.
    keys_of = {name: set(keys) - {"figures"} for name, keys in ingredients.items() if name != "figures"}
    keys_of["memory-and-figures"] = set(ingredients["memory"])
    order = ["memory-and-figures" if name == "figures" else name for name in ingredients]
    cells = [cell("base", base)]
    cells += [cell(f"only-{name}", {k: v for k, v in base.items() if k not in keys_of[name]}) for name in order]
    cells.append(_cell(pair, "zskt", "best"))
    without = {**ingredients, "adversary": {"adversarial_weight": 0.0}, "filling": {"filling": 0}}
    return [*cells, *(cell(f"without-{name}", keys) for name, keys in without.items())]


def _over(pairs: Sequence[str], make: Callable[[str], list[Cell]]) -> tuple[Cell, ...]:
    return tuple(cell for pair in pairs for cell in make(pair))


def _students_of(pair: str) -> tuple[Cell, ...]:
    names = list(PAIRS[pair].students)
    return tuple(cell for name in names for cell in _methods(pair, name if len(names) > 1 else "", True))


_CELLS: dict[str, tuple[Cell, ...]] = {
    "main": _over(LENETS, _methods),
    "zskd-sizes": _over(LENETS, _sizes),
    "zskd-beta": _over(LENETS, _betas),
    "zskd-augmentation": _over(LENETS, _augmentation),
    "best-ablation": _over(LENETS, _ablation),
    "zskt-ablation": _over(("fashion-mnist", "cifar10-wrn"), _zskt_ablation),
    "ats-balance": _over(LENETS, _balance),
    "kd-at": _over(LENETS, lambda pair: [*(_kd_at(pair, shots) for shots in SHOTS), *_zskt(pair)]),
    "zskd-author-code": _over(LENETS, lambda pair: [_cell(pair, "zskd", "author-code")]),
    "digits": tuple(_methods("digits", author_code=False)),
    "sts-choices": tuple(_sts_choices("digits")),
    "cifar10-alexnet": _students_of("cifar10-alexnet"),
    "cifar10-alexnet-sizes": tuple(_sizes("cifar10-alexnet")),
    "cifar10-alexnet-balance": tuple(_balance("cifar10-alexnet")),
    "cifar10-wrn": _students_of("cifar10-wrn"),
}
_TEXTS = yaml.safe_load((Path(__file__).parent / "templates" / "tables.yml").read_text())
TABLES = {
    name: Table(cells=cells, seeds=PAIRED_SEEDS if name.endswith("-balance") else SEEDS, **_TEXTS[name])
    for name, cells in _CELLS.items()
}


def find_table(name: str) -> Table:
    """The table of that name; ``all`` is every cell of every table.

    Raises:
        UserError: there is none; names the nearest.
    """
    if name == "all":
        return Table(
            "All", "Every cell.", tuple({cell.name: cell for t in TABLES.values() for cell in t.cells}.values())
        )
    if name not in TABLES:
        raise UserError(f"There is no table {name!r}; {_nearest(name, [*TABLES, 'all'])}")
    return TABLES[name]


def choose_cells(table: Table, wanted: Sequence[str]) -> list[Cell]:
    """Cells of a table whose name is one of those wanted, or else begins with it, or else holds it; all without any.

    Raises:
        UserError: one of those wanted is in no cell's name; names the nearest.
    """
    if not wanted:
        return list(table.cells)
    chosen: dict[str, Cell] = {}
    for text in wanted:
        found = (
            [cell for cell in table.cells if cell.name == text]
            or [cell for cell in table.cells if cell.name.startswith(text)]  # mnist- is not fashion-mnist-
            or [cell for cell in table.cells if text in cell.name]
        )
        if not found:
            raise UserError(f"No cell of the table is called {text!r}; {_nearest(text, [c.name for c in table.cells])}")
        chosen.update({cell.name: cell for cell in found})
    return [cell for cell in table.cells if cell.name in chosen]


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 3, 0.4)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}."
