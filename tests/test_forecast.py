"""Time and memory of a run, forecast before it begins."""

from __future__ import annotations

import json
import time
import types
from pathlib import Path

import pytest
import torch
from helpers import run_cli

from zskd_nni.pipeline import Run, rehearsal, run
from zskd_nni.pipeline.forecast import Forecast, compared
from zskd_nni.pipeline.report_html import notes, render_table
from zskd_nni.pipeline.steps import EVALUATION, EXPORT
from zskd_nni.recipes.load import load_recipe
from zskd_nni.runtime.files import sha256_of_file
from zskd_nni.runtime.memory import peak_memory

SMALL = (
    "transfer.size=250",
    "transfer.held_out=50",
    "compression.pruning.steps=20",
    "distillation.steps=60",
)
STAGES = {
    "synthesis",
    *(f"{work} of {who}" for work in ("pruning", "quantization") for who in ("student", "control-none")),
    "distillation of student",
    EXPORT,
    EVALUATION,
}
NORMALISED = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8, 10),
    )
"""


def digits(out: Path, *changes: str, quiet: bool = False) -> Run:
    return Run(load_recipe("digits-prune50", [*SMALL, "controls=[none]", *changes]), out, quiet=quiet)


@pytest.fixture
def cpu_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of this process alone: other work on the machine slows what is forecast and what is done unequally."""
    clock = types.SimpleNamespace(monotonic=time.process_time)
    monkeypatch.setattr(rehearsal, "time", clock)
    monkeypatch.setattr(run, "time", clock)


def test_the_packaged_digits_take_what_was_forecast(
    tmp_path: Path, cpu_seconds: None, capsys: pytest.CaptureFixture[str]
) -> None:
    report = digits(tmp_path / "told").compress()
    forecast = Forecast.read(report["forecast"])
    assert forecast is not None and set(forecast.seconds) == STAGES == set(report["seconds"]) - {"total"}
    assert 1 / 3 < forecast.total / report["seconds"]["total"] < 3
    assert 2 / 3 < forecast.memory["cpu"] / report["peak_memory"]["cpu"] < 3 / 2
    said = capsys.readouterr().err
    assert said.count("forecast: ") == 1 and said.index("forecast: ") < said.index("step 1 of ")
    sentence = compared(report)
    assert sentence is not None and sentence in notes(report)
    assert " ".join(sentence.split()) in " ".join(render_table(report).split())

    quiet = digits(tmp_path / "quiet", quiet=True).compress()
    assert quiet["forecast"] is None and "forecast" not in capsys.readouterr().err
    for name in ("student.safetensors", "student-int8.onnx", "state/student-pruned.safetensors"):
        assert sha256_of_file(tmp_path / "told" / name) == sha256_of_file(tmp_path / "quiet" / name), name
    assert quiet["history"] == report["history"] and quiet["agreements"] == report["agreements"]


def test_a_forecast_moves_nothing(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NORMALISED)
    torch.manual_seed(1)
    namespace: dict = {}
    exec(NORMALISED, namespace)
    torch.save(namespace["net"]().state_dict(), tmp_path / "net.pt")
    (tmp_path / "recipe.yml").write_text(
        """
name: normalised
teacher: {model: "net.py:net", weights: net.pt, allow_pt: true, input: {shape: [1, 12, 12]}}
transfer: {size: 40, held_out: 20}
compression:
  pruning: {pruner: TaylorPruner, config_list: [{op_names: ["0"], sparse_ratio: 0.5}], steps: 30}
distillation: {steps: 30, batch: 20}
"""
    )
    begun = Run(load_recipe(str(tmp_path / "recipe.yml")), tmp_path / "out", quiet=True)
    before = {name: value.clone() for name, value in begun.teacher.model.state_dict().items()}
    random = torch.get_rng_state()
    forecast = begun.foresee()
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in begun.teacher.model.state_dict().items())
    assert begun.teacher.model.training is False and begun.teacher.device.type == "cpu"
    assert not (tmp_path / "out").exists()
    assert all(seconds >= 0 for seconds in forecast.seconds.values()) and forecast.seconds["pruning of student"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        ("transfer.method=ats",),
        ("transfer.method=procedural", "controls=[leaves]", "distillation.repeats=2"),
        ("transfer.method=zskt", "transfer.filling=1", "transfer.figures=100", "transfer.width=16"),
        ("compression.quantization.quantizer=QATQuantizer", "compression.pruning.pruner=MovementPruner"),
        ("compression.quantization.quantizer=QATQuantizer", "compression.quantization.fused=true"),
    ],
    ids=["ats", "procedural", "zskt", "movement and QAT", "one training"],
)
def test_other_recipes_are_forecast(tmp_path: Path, changes: tuple[str, ...]) -> None:
    more = ("compression.quantization.steps=20", *changes)
    begun = digits(tmp_path / "out", *more, quiet=True)
    forecast = begun.foresee()
    works = {step for step in begun.headings if " of " in step}
    assert set(forecast.seconds) == {"synthesis", *works, EXPORT, EVALUATION}
    assert forecast.left_out == []
    assert all(forecast.seconds[step] > 0 for step in works)


def test_longer_trainings_are_forecast_to_take_longer(tmp_path: Path, cpu_seconds: None) -> None:
    few, many = (
        digits(tmp_path / steps, f"distillation.steps={steps}", quiet=True).foresee().seconds["distillation of student"]
        for steps in ("100", "1000")
    )
    assert 4 < many / few < 25


def test_a_dry_run_forecasts(tmp_path: Path) -> None:
    sets = [word for change in (*SMALL, "controls=[]") for word in ("--set", change)]
    said = run_cli("compress", "digits-prune50", "--out", tmp_path / "out", "--dry-run", "--quiet", *sets)
    assert said.returncode == 0, said.stderr
    first, second = said.stdout.splitlines()
    assert first.startswith("forecast: ") and " of memory" in first and second.startswith("dry run: ")
    assert not (tmp_path / "out").exists()


def test_a_run_that_continues_says_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    digits(out, "compression.quantization=null", "controls=[]", "distillation.steps=5").compress()
    known = json.loads((out / "run.json").read_text())
    known["forecast"] = {"seconds": {"synthesis": 5.0, EVALUATION: 90.0, "total": 95.0}, "memory": {}, "left_out": []}
    known["seconds"] = {"synthesis": 5.5}
    (out / "run.json").write_text(json.dumps(known))
    capsys.readouterr()
    digits(out, "compression.quantization=null", "controls=[]", "distillation.steps=5").compress()
    assert "forecast: 90 s left (measuring 90 s)" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, 3, {}, {"seconds": {"total": 1}}, {"seconds": [], "memory": {}}])
def test_what_is_no_forecast_is_none(content: object) -> None:
    assert Forecast.read(content) is None


def test_a_forecast_is_read_as_it_was_described() -> None:
    forecast = Forecast({"synthesis": 1.5, "export": 2.0}, {"cpu": 10}, ["the images of the method x"])
    assert Forecast.read(json.loads(json.dumps(forecast.described()))) == forecast
    assert forecast.line().endswith("; not in it: the images of the method x")


def test_memory_that_is_held_counts() -> None:
    before = peak_memory()["cpu"]
    held = torch.ones(before // 4 + 50_000_000)  # four bytes each: more than all before
    assert peak_memory()["cpu"] >= before + 100_000_000 and held[0] == 1
