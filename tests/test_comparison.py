"""Tables and verdict of a report: controls stand beside students of their own precision."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from zskd_nni.pipeline.comparison import bits_of, networks, tables, verdict, worth_of_agreement
from zskd_nni.pipeline.loss_chart import loss_chart
from zskd_nni.pipeline.report_html import render_table
from zskd_nni.pipeline.twin import read_twin
from zskd_nni.recipes.load import load_recipe
from zskd_nni.runtime.errors import UserError


def figures(accuracy: float, accuracy_int8: float, label: str) -> dict[str, Any]:
    return {
        "accuracy": accuracy, "agreement": accuracy / 100, "label": label, "what": "made alike",
        "accuracy_int8": accuracy_int8, "agreement_int8": accuracy_int8 / 100, "agreement_neutral": 0.5,
    }  # fmt: skip


REPORT: dict[str, Any] = {
    "name": "example",
    "accuracy": {"teacher": 99.0, "student": 98.0, "student_int8": 97.5},
    "agreement": 0.98,
    "agreement_int8": 0.975,
    "agreement_on": "test data (digits, 1000 images)",
    "agreement_onnx": 1.0,
    "parameters": {"teacher": 61706, "student": 35820},
    "macs": {"teacher": 416520, "student": 153720},
    "bytes": {
        "teacher": {"safetensors": 5, "onnx": 248708},
        "student": {"safetensors": 3, "onnx": 145164, "onnx_int8": 42416},
    },
    "latency_ms": {"teacher": 0.02, "student": 0.016, "student_int8": 0.03},
    "controls": {"none": figures(92.0, 91.0, "not distilled"), "noise": figures(97.9, 66.0, "distilled on noise")},
    "twin": figures(98.8, 98.7, "on real images"),
    "quantization": {"exported": True, "note": ""},
    "pruning": None, "impressions": None, "history": None, "data_free": True, "only_calibrated": False,
    "evaluation": "digits", "test_images": 1000, "classifier": "fc3", "seconds": {"total": 1.0},
    "recipe": {
        "transfer": {"method": "zskd"}, "distillation": {"features": "none", "feature_weight": 0},
        "compression": {"quantization": {"fuse_batch_norm": True, "config_list": [{"quant_dtype": "int8"}]}},
    },
}  # fmt: skip
KINDS = ("test", "held_out", "neutral")
AGREEMENTS = {
    **{f"student{end}": dict(zip(KINDS, (0.98, 0.9, 0.8), strict=True)) for end in ("", "_int8")},
    **{f"none{end}": dict(zip(KINDS, (0.91, 0.5, 0.4), strict=True)) for end in ("", "_int8")},
    **{f"noise{end}": dict(zip(KINDS, (0.7, 0.6, 0.3), strict=True)) for end in ("", "_int8")},
}


def test_a_precision_of_few_bits_is_named() -> None:
    recipe = load_recipe("cifar10-ptq-w4a4").recipe.compression.model_dump(mode="json")
    report = {**REPORT, "recipe": {**REPORT["recipe"], "compression": recipe}}
    assert tables(report)[1].columns[2] == "student, W4A4"
    assert bits_of({"config_list": [{"target_names": ["weight"], "quant_dtype": "int4"}]}) == "W4A32"


def test_each_table_has_one_precision() -> None:
    in_float, in_integers = tables(REPORT)
    assert in_float.columns == ["teacher", "student", "on real images", "not distilled", "distilled on noise"]
    assert dict(in_float.rows)["accuracy"] == ["99.00 %", "98.00 %", "98.80 %", "92.00 %", "97.90 %"]
    assert in_integers.columns[:4] == ["teacher, float32", "student, float32", "student, int8", "on real images"]
    rows = dict(in_integers.rows)
    assert rows["accuracy"] == ["99.00 %", "98.00 %", "97.50 %", "98.70 %", "91.00 %", "66.00 %"]
    assert rows["to the teacher, points"] == ["", "-1.00", "-1.50", "-0.30", "-8.00", "-33.00"]
    assert rows["MACs an image"][:3] == ["417 k", "154 k", "154 k"]
    assert rows["of the teacher's bytes"][:3] == ["100 %", "58 %", "17 %"]
    assert rows["of the teacher's time"][:3] == ["1.00 x", "0.80 x", "1.50 x"]


def test_the_verdict_compares_within_the_students_precision() -> None:
    said = verdict(REPORT)
    assert said == [
        "The int8 student is right on 97.50 % of the test images of digits, 1.50 points below the teacher's 99.00 %.",
        "Its ONNX file has 17 % of the teacher's bytes, and an image takes 1.50 times as long on one CPU thread.",
        "The student is 1.20 points below the same recipe on real images (98.70 %).",
        "The student is 6.50 points above the best control of its precision, not distilled (91.00 %).",
    ]


def test_the_verdict_says_where_the_images_did_not_help_or_nothing_can_be_told() -> None:
    plain = {**copy.deepcopy(REPORT), "quantization": None, "agreement_onnx": None}
    assert verdict(plain)[-1].endswith("(97.90 %); 1,000 test images hardly tell apart less than 1.3 points.")
    plain["accuracy"]["student"] = 97.0
    assert verdict(plain)[-1].endswith("(97.90 %), so that its images have not helped.")


def test_without_test_data_agreement_takes_the_place_of_accuracy() -> None:
    report = {**copy.deepcopy(REPORT), "evaluation": None, "test_images": None, "quantization": None, "twin": None}
    report["accuracy"] = dict.fromkeys(report["accuracy"])
    without = {"test": None}
    report["agreements"] = {name: {**kinds, **without} for name, kinds in AGREEMENTS.items()}
    for control in report["controls"].values():
        control["accuracy"] = control["accuracy_int8"] = None
    assert verdict(report)[0].startswith("The student chooses the teacher's class for 80.0 % of the procedural images;")
    assert "40.00 points of agreement above the best control" in verdict(report)[-1]
    assert "accuracy" not in dict(tables(report)[0].rows)


def test_accuracy_is_never_compared_with_agreement() -> None:
    report = {**copy.deepcopy(REPORT), "quantization": None}
    report["twin"] |= {"accuracy": None, "agreement": 0.5}  # the twin was measured without test data
    assert not any("real images" in sentence for sentence in verdict(report))
    report = {**copy.deepcopy(REPORT), "quantization": None, "evaluation": None, "agreements": AGREEMENTS}
    report["accuracy"] = dict.fromkeys(report["accuracy"])  # now this run was, and the twin not
    assert "The student is 30.00 points of agreement above the same recipe on real images (50.00 %)." in verdict(report)


def test_what_agreement_is_worth_is_told_of_this_run() -> None:
    assert worth_of_agreement(REPORT) == []  # as of an earlier version
    said = " ".join(worth_of_agreement({**REPORT, "agreements": AGREEMENTS}))
    assert "98.0 % on the test images, 90.0 % on the held-out and 80.0 % on the procedural ones" in said
    # In int8 the control on noise is right less often than the one that is not distilled, and agrees more on held-out.
    assert "Agreement on procedural images alone puts student and controls (int8) in the same order" in said


def test_the_terminal_shows_the_same_cells_within_80_columns() -> None:
    lines = render_table(REPORT).splitlines()
    assert max(map(len, lines)) <= 80
    shown = " ".join(" ".join(lines).split())
    cells = [cell for table in tables(REPORT) for _, row in table.rows for cell in row]
    assert all(cell in shown for cell in cells)
    assert sum(line.startswith("int8 ") for line in lines) == 3  # two heads of one table, and the advice
    assert len(networks(REPORT)) == 9


def test_a_chart_has_titles_and_ticks() -> None:
    chart = loss_chart({"steps": [50, 100, 150], "losses": [10.0, 1.0, 0.1]}) or ""
    assert "training step" in chart and "loss, nats x T²" in chart
    assert all(f">{tick}<" in chart for tick in ("0.1", "1", "10", "50", "150"))
    assert chart.count(",") >= 3 and loss_chart({"steps": [50], "losses": [1.0]}) is None is loss_chart(None)


def twin_folder(folder: Path, **changes: Any) -> Path:
    recipe = {"transfer": {"method": "real"}, "seed": 0, "controls": []}
    report = {
        **copy.deepcopy(REPORT), "data_free": False, "learnt_on": "digits", "agreement_neutral": 0.5, "recipe": recipe,
        "provenance": {"teacher": "abc"}, **changes,
    }  # fmt: skip
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_a_twin_differs_in_its_images_alone(tmp_path: Path) -> None:
    mine = {"recipe": {"transfer": {"method": "zskd"}, "seed": 0, "controls": ["none"]}, "teacher": "abc"}
    twin = read_twin(twin_folder(tmp_path / "twin"), mine).figures()
    assert twin["accuracy_int8"] == 97.5 and twin["what"] == "the same recipe, trained on real images (digits)"
    with pytest.raises(UserError, match=r"differs in more than its images: seed, the teacher's weights"):
        read_twin(tmp_path / "twin", {"recipe": {**mine["recipe"], "seed": 1}, "teacher": "other"})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="was trained without real images"):
        read_twin(twin_folder(tmp_path / "free", data_free=True), mine)
    own_images_beside = {"transfer": {"method": "zskd", "also": "mine.npz"}, "seed": 0, "controls": []}
    with pytest.raises(UserError, match=r"has transfer\.method zskd; a twin has transfer\.method real"):
        read_twin(twin_folder(tmp_path / "beside", recipe=own_images_beside), mine)
    with pytest.raises(UserError, match=r"has no report\.json"):
        read_twin(tmp_path / "nowhere", mine)
    (tmp_path / "twin" / "report.json").write_text("[]")
    with pytest.raises(UserError, match="is not the report of a run"):
        read_twin(tmp_path / "twin", mine)
