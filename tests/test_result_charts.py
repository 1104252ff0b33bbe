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
    for name in ("charts", "generated_pages"):
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
            assert f": {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} %, {size}" in said
            noise = [text for text in groups if text.startswith(f"{path.stem}, {precision}, on noise: ")]
            assert len(noise) == 1
            height = float(groups[said][1].get("cy"))
            teacher = next(group for text, group in groups.items() if text.startswith("teacher"))
            assert height > float(re.match(r"M[\d.]+,([\d.]+)", teacher[1].get("d"))[1]) or "-ptq" in path.stem
            seen += 1
    assert seen >= 9
    assert sum(len(list(panel.iter("circle"))) for panel in panels.values()) >= seen


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
    assert set(re.findall(r"<!-- chart: (\S+) -->", page)) == set(charts) >= {"mnist", "fashion-mnist", "digits"}
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
