"""The charts of the site show what the records say."""

from __future__ import annotations

import itertools
import json
import re
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from zskd_nni.research.reproduction.ablation_charts import (
    Ablation,
    accuracy_axis,
    balance_chart,
    difference_axis,
    parts_chart,
    sizes_chart,
)
from zskd_nni.research.reproduction.cells import Cell
from zskd_nni.research.reproduction.charts import Row, dot_chart, position, range_of, rows_of, ticks_between, verdict
from zskd_nni.research.reproduction.page import render_charts, render_page
from zskd_nni.research.reproduction.records import read_records

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "results" / "reproduce"


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The hook that draws, with the one that it imports."""
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_hooks"))
    import charts

    yield charts
    for name in ("charts", "generated_pages", "rivals_page"):
        sys.modules.pop(name, None)


def test_positions_halve_the_error_in_equal_steps() -> None:
    assert position(0, 0, 99) == 0
    assert position(99, 0, 99) == 1
    steps = [position(value, 0, 99.9) for value in (60, 80, 90, 95)]
    assert steps[1] - steps[0] == pytest.approx(steps[2] - steps[1])
    assert steps[2] - steps[1] == pytest.approx(steps[3] - steps[2])
    assert position(100, 50, 99.9) == 1 and position(20, 50, 99.9) == 0  # held to the axis
    assert range_of([86.97, 20.84]) == (0, 90)
    assert range_of([98.89]) == (98, 99)
    low, high = range_of([90.0])
    assert low < high and ticks_between(0, 90) == [0, 50, 80, 90]


def test_every_measured_accuracy_is_a_mark_at_its_height(hooks: Any) -> None:
    drawn = hooks.accuracy_and_bytes()
    panels = {title: ElementTree.fromstring(svg) for title, svg in
              re.findall(r"<figcaption>([^<]+)</figcaption>(<svg.*?</svg>)", drawn, re.DOTALL)}  # fmt: skip
    assert list(panels) == ["CIFAR-10", "Fashion-MNIST", "MNIST"]
    seen = 0
    for path in sorted((ROOT / "results").glob("*-*.json")):
        if not path.stem.startswith(("cifar10-", "fashion-mnist-", "mnist-")):
            continue
        records = json.loads(path.read_text())
        panel = panels[hooks.TITLES[records[0]["recipe"]["evaluation"]["data"]]]
        groups = {group[0].text: group for group in panel.iter("g")}
        few_bits = re.search(r"w\da\d", path.stem)
        for precision, suffix in (("fp32", ""), (few_bits[0].upper() if few_bits else "int8", "_int8")):
            values = [record["accuracy"][f"student{suffix}"] for record in records]
            if values[0] is None or (not suffix and "-ptq" in path.stem):
                continue
            size = f"{records[0]['bytes']['student'][f'onnx{suffix}']:,} bytes"
            (said,) = [text for text in groups if text.startswith(f"{path.stem}, {precision}, student: ")]
            deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            assert f": {statistics.mean(values):.2f}{deviation} %, {size}" in said
            noise = [text for text in groups if text.startswith(f"{path.stem}, {precision}, on noise: ")]
            assert len(noise) == 1
            height = float(groups[said][1].get("cy"))
            teacher = next(group for text, group in groups.items() if text.startswith("teacher"))
            assert height > float(re.match(r"M[\d.]+,([\d.]+)", teacher[1].get("d"))[1]) or "-ptq" in path.stem
            seen += 1
    assert seen >= 9
    assert sum(len(list(panel.iter("circle"))) for panel in panels.values()) >= seen


def test_rivals_stand_in_the_column_of_the_same_shape_and_precision(hooks: Any) -> None:
    def rivals(name: str) -> dict[str, dict[str, float]]:
        records = json.loads((ROOT / "results" / f"{name}.json").read_text())
        return {column.label.split(", ")[1]: column.rivals for column in hooks.columns_of(name, records)}

    rows = json.loads((ROOT / "results" / "rivals-alexnet.json").read_text())

    def means(task: str, *names: str) -> set[float]:
        found = ([row["accuracy"] for row in rows if (row["task"], row["rival"]) == (task, name)] for name in names)
        return {statistics.mean(values) for values in found}

    assert means("half", "nni", "folding") <= set(rivals("cifar10-prune50-quick")["fp32"].values())
    assert means("W8A8", "squant", "onnxruntime") <= set(rivals("cifar10-ptq8")["int8"].values())
    assert rivals("cifar10-prune50-int8-quick") == {"fp32": {}, "int8": {}}  # fewer channels than any rival of 8 bits
    assert rivals("mnist-ptq8") == {"int8": {}}
    assert len(rivals("fashion-mnist-taylor50")["fp32"]) == 4
    assert hooks.accuracy_and_bytes().count('class="mark rival"') > 10


def test_every_budget_is_a_mark_at_its_minutes(hooks: Any) -> None:
    points = json.loads((ROOT / "results" / "time-to-accuracy.json").read_text())
    recorded = {}
    for name in ("cifar10-prune50-quick", "cifar10-prune50"):
        path = ROOT / "results" / f"{name}.json"
        for record in json.loads(path.read_text()) if path.exists() else []:
            recorded[record["recipe"]["distillation"]["steps"], record["recipe"]["seed"]] = record["accuracy"][
                "student"
            ]
    known = {(one["steps"], one["seed"]): one["accuracy"] for one in points if one["way"] == "ours"}
    assert recorded.items() <= known.items(), "python benchmarks/time_to_accuracy.py takes the recipe's records up"

    svg = ElementTree.fromstring(hooks.time_to_accuracy())
    marks = {group[0].text: group for group in svg.iter("g") if group[0].text}  # the legend's have no title
    budgets = {(one["way"], one["impressions"], one["steps"]) for one in points}
    assert len(marks) == len(budgets) >= 5
    for way, size, steps in budgets:
        runs = [one for one in points if (one["way"], one["impressions"], one["steps"]) == (way, size, steps)]
        minutes = round(statistics.mean(one["seconds"] for one in runs) / 60, 1)
        accuracy = f"{statistics.mean(one['accuracy'] for one in runs):.2f}"
        (said,) = [text for text in marks if text.startswith(f"{hooks.WAYS[way][0]}, {minutes:g}: ")]
        assert accuracy in said
    across = [(float(text.split(", ")[1].split(":")[0]), float(group[2].get("cx"))) for text, group in marks.items()]
    for (less, left), (more, right) in itertools.pairwise(sorted(across)):
        assert left < right or less == more


def test_recipes_of_one_size_stand_side_by_side(hooks: Any) -> None:
    apart = hooks._APART
    assert hooks.spread([100.0, 200.0]) == [100.0, 200.0]
    assert hooks.spread([100.0, 100.0, 100.0]) == [100 - apart, 100, 100 + apart]
    moved = hooks.spread([100.0, 101.0, 108.0, 300.0])
    assert all(after - before >= apart - 1e-9 for before, after in itertools.pairwise(moved))
    assert moved[3] == 300


def test_the_home_page_has_a_row_for_each_data_set_colour_first(hooks: Any) -> None:
    import generated_pages

    rows = generated_pages.smallest_table("recipe; ONNX bytes").splitlines()[2:]
    starts = [row.split("`")[1].split("-")[0] for row in rows]
    assert starts == ["cifar10", "fashion", "mnist"]
    sizes = [int(row.rstrip(" |").rsplit("→", 1)[1].replace(",", "").strip()) for row in rows]
    for start, size in zip(("cifar10-", "fashion-mnist-", "mnist-"), sizes, strict=True):
        for path in (ROOT / "results").glob(f"{start}*.json"):
            student = json.loads(path.read_text())[0]["bytes"]["student"]
            assert size <= (student["onnx_int8"] or student["onnx"])


def test_each_data_set_has_its_chart_with_every_method() -> None:
    records = read_records(RECORDS)
    charts, page = render_charts(records), render_page(records)
    shown = re.findall(r"<!-- charts?: ([^>]+) -->", page)
    keys = {key for keys in shown for key in keys.split()}
    assert keys >= {"mnist", "fashion-mnist", "digits", "best-ablation-mnist", "ats-balance-fashion-mnist"}
    of_pages = {
        key
        for path in (ROOT / "docs").rglob("*.md")
        for keys in re.findall(r"<!-- charts?: ([^>]+) -->", path.read_text())
        for key in keys.split()
        if keys not in ("accuracy and bytes", "time to accuracy")
    }
    assert keys <= of_pages <= set(charts)
    for chart in charts.values():
        assert list(ElementTree.fromstring(chart).iter("circle"))
    values = [record["accuracy"]["student"] for record in records
              if record["cell"] == "fashion-mnist-zskd-best" and record["scale"] == "full"]  # fmt: skip
    said = f"zskd best: {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    assert said in [title.text for title in ElementTree.fromstring(charts["fashion-mnist"]).iter("title")]
    assert page.count("<details") == page.count("</details>") == page.count("cells, ")


def test_rows_verdicts_and_kinds() -> None:
    def record(value: float | None, data_free: bool = True) -> dict[str, Any]:
        return {"accuracy": {"student": value}, "data_free": data_free}

    rows = rows_of([
        (Cell("mnist", "noise"), [record(70.0)]),
        (Cell("mnist", "zskd", "paper"), [record(97.0), record(98.0)]),
        (Cell("mnist", "zskd", "best"), [record(99.0)]),
        (Cell("mnist", "ats", "paper", "natural"), [record(99.2, data_free=False)]),
        (Cell("mnist", "sts", "best"), [record(None)]),
        (Cell("mnist", "zskt", "best"), []),
    ])  # fmt: skip
    assert [(row.label, row.kind) for row in rows] == [
        ("noise", "control"), ("zskd paper", "free"), ("zskd best", "free best"), ("ats paper natural", "real"),
    ]  # fmt: skip
    assert str(rows[1]) == "97.50 ± 0.71" and str(rows[2]) == "99.00"
    assert verdict(rows, 99.34) == (
        "Without data the most accurate student has **99.00 %** (`zskd best`); the teacher 99.34 %, on real images at "
        "most 99.20 % (`ats paper natural`), the best control 70.00 % (`noise`)."
    )
    drawn = ElementTree.fromstring(dot_chart("MNIST", rows, 99.34))
    circles = [float(circle.get("cx", "")) for circle in drawn.iter("circle")]
    assert circles == sorted(circles) and len(set(circles)) == 4
    assert Row("a", [50.0], "free").deviation == 0


def an_ablation(*runs: tuple[Cell, list[float]]) -> Ablation:
    def records(values: list[float]) -> list[dict[str, Any]]:
        return [{"seed": seed, "accuracy": {"student": value}} for seed, value in enumerate(values)]

    groups = {(cell.name, "cpu"): records(values) for cell, values in runs}
    return Ablation("mnist", "cpu", [cell for cell, _ in runs], groups)


def marks_of(drawn: str) -> dict[str, float]:
    """The position of each mark by what it says."""
    groups = [group for group in ElementTree.fromstring(drawn).iter("g") if group.find("title") is not None]
    return {group.find("title").text: float(group.find("circle").get("cx")) for group in groups}  # type: ignore[union-attr,arg-type]


def test_parts_are_drawn_alone_and_left_out() -> None:
    marks = marks_of(parts_chart(an_ablation(
        (Cell("mnist", "zskd", "paper", "base"), [60.0, 62.0]),
        (Cell("mnist", "zskd", "paper", "only-features"), [70.0, 74.0]),
        (Cell("mnist", "zskd", "best"), [98.0]),
        (Cell("mnist", "zskd", "best", "without-features"), [95.0, 96.0]),
        (Cell("mnist", "zskd", "best", "without-odd"), [97.0]),
    )))  # fmt: skip
    assert list(marks) == [
        "hidden layers matched, this part alone: 72.00 ± 2.83",
        "hidden layers matched, best without it: 95.50 ± 0.71",
        "odd, best without it: 97.00",
    ]
    assert list(marks.values()) == sorted(marks.values())


def test_balance_is_the_difference_of_paired_seeds() -> None:
    cells = {preset: Cell("mnist", "ats", preset, "uniform-logits") for preset in ("paper", "unbalanced")}
    drawn = balance_chart(an_ablation((cells["paper"], [50.0, 70.0, 60.0]), (cells["unbalanced"], [40.0, 40.0])))
    assert list(marks_of(drawn)) == ["uniform noise, logits alone: 20.00 ± 14.14"]  # the third seed has no other


def test_sizes_are_curves_and_axes_hold_all_bars() -> None:
    drawn = sizes_chart(an_ablation(
        (Cell("mnist", "zskd", "paper", "1-percent"), [60.0, 70.0]),
        (Cell("mnist", "zskd", "paper", "10-percent"), [80.0, 81.0]),
        (Cell("mnist", "class-impressions", "paper", "10-percent-not-augmented"), [30.0]),
    ))  # fmt: skip
    marks = marks_of(drawn)
    assert list(marks) == ["ZSKD, 1: 65.00 ± 7.07", "ZSKD, 10: 80.50 ± 0.71",
                           "class impressions, not augmented, 10: 30.00"]  # fmt: skip
    assert marks["ZSKD, 1: 65.00 ± 7.07"] < marks["ZSKD, 10: 80.50 ± 0.71"]
    axis = accuracy_axis([Row("a", [65.0, 75.0], "free"), Row("b", [98.3], "free")])
    assert (axis.low, axis.high) == (60, 99)
    assert difference_axis([Row("a", [4.0, 6.0], "free")]).ticks == (0.0, 5.0, 10.0)
