"""The benchmark's baselines follow the published schedules and give the results of the package's engine."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import SMALL, small_network, small_teacher

from zskd_nni.methods.zskd import ZskdSettings, ZskdTargets
from zskd_nni.models.build import build_network
from zskd_nni.pipeline.neutral import HELD_OUT_BELOW_TEST
from zskd_nni.recipes.load import load_recipe
from zskd_nni.research.reproduction.context import Workspace
from zskd_nni.research.reproduction.records import read_records
from zskd_nni.research.reproduction.session import Selection, run_table
from zskd_nni.synthesis import SynthesisSettings
from zskd_nni.synthesis.engine import ShardInputs, synthesize_shard
from zskd_nni.training.losses import soft_target_divergence

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loops() -> ModuleType:
    return script("published_loops")


def test_the_published_loop_and_the_engine_reach_the_same_fit(loops: ModuleType) -> None:
    """The engine's ``author-code`` way is this loop, but for the last step's rescaling."""
    teacher, model = small_teacher(), small_network()
    model.load_state_dict(teacher.model.state_dict())
    targets = ZskdTargets(teacher, ZskdSettings()).targets(0, 40, 40, 3)
    settings = SynthesisSettings(max_steps=60, learning_rate=0.01, range="rescale", slots=40)
    torch.manual_seed(7)
    inputs = ShardInputs(
        targets, torch.rand((40, *SMALL.shape)), torch.full((40, 1), 20.0), torch.zeros(40), torch.full((40,), 60.0)
    )
    engine = synthesize_shard(teacher, inputs, settings)
    torch.manual_seed(7)
    images, fit = loops.zskd_loop(
        model.eval().requires_grad_(False), targets, SMALL.shape, steps=60, batch=40, learning_rate=0.01
    )
    again = soft_target_divergence(model(images), targets, 20.0)
    assert torch.allclose(fit, again, atol=1e-5)
    start = soft_target_divergence(teacher(inputs.starts), targets, 20.0).mean()
    assert fit.mean() < 0.95 * start
    assert abs(float(fit.mean() - engine.fit.mean())) < 0.05 * float(start - fit.mean())


def test_the_published_game_moves_both_networks(loops: ModuleType) -> None:
    torch.manual_seed(0)
    teacher, student = (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()) for _ in range(2))
    heads = [
        torch.nn.Sequential(body, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 5))
        for body in (teacher, student)
    ]
    before = [value.clone() for value in heads[1].parameters()]
    kept = [value.clone() for value in heads[0].parameters()]
    loops.zskt_loop(heads[0].eval(), heads[1].train(), ([teacher], [student]), rounds=2, batch=4, student_steps=2)
    assert all(not torch.equal(old, new) for old, new in zip(before, heads[1].parameters(), strict=True))
    assert all(torch.equal(old, new) for old, new in zip(kept, heads[0].parameters(), strict=True))


def test_a_part_of_the_benchmark_runs_and_keeps_the_other_records(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    out.write_text(json.dumps([{"name": "of another part"}]))
    command = [
        sys.executable,
        "bench.py",
        "--only",
        "student",
        "--networks",
        "lenet5",
        "--pairs",
        "1",
        "--threads",
        "1",
    ]
    subprocess.run([*command, "--out", str(out)], cwd=BENCHMARKS, check=True, timeout=300)
    first, second = json.loads(out.read_text())
    assert first["name"] == "of another part"
    assert second["target"] == 0.9 and second["device"] == "cpu"
    assert second["ratio"] == pytest.approx(second["ours"] / second["theirs"], rel=0.01)


def test_the_ladder_measures_and_profiles_every_rung(tmp_path: Path) -> None:
    out = tmp_path / "ladder.json"
    command = [sys.executable, "ladder.py", "--only", "lenet5", "--pairs", "1", "--threads", "1", "--out", str(out)]
    subprocess.run(command, cwd=BENCHMARKS, check=True, timeout=300, capture_output=True)
    records = json.loads(out.read_text())
    changes = [record["change"] for record in records]
    assert changes[0] == "no gradients for weights" and changes[-1].startswith("the engine")
    for record in records:
        assert record["ratio"] > 0.1 and record["unit"] == "image-steps/s"
        for side in ("before", "after"):
            assert sum(record[side].values()) == pytest.approx(1, abs=0.01)
            assert record[side]["convolution, backward"] > 0.1


EPOCHS = "4"  # of the teacher on the rest of the split: what it has learnt does not matter here


@pytest.fixture(scope="module")
def slice_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that the teacher on the rest of the split is trained once."""
    return tmp_path_factory.mktemp("slice")


def test_settings_are_tried_on_a_slice_that_neither_teacher_nor_student_has_seen(slice_folder: Path) -> None:
    changes = ["student.steps=20", "student.augmentation.scale=[0.9, 1.1]", "targets.betas=[1.0]"]
    command = [
        "digits-zskd-best",
        "--scale",
        "smoke",
        "--seeds",
        "0",
        "1",
        "--teacher-epochs",
        EPOCHS,
        "--out",
        str(slice_folder),
        "--set",
        *changes,
    ]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "on_a_slice.py"), *command], capture_output=True, text=True, check=True
    )
    assert "seed 1" in done.stdout and "accuracy: " in done.stdout and " +- " in done.stdout
    teacher = json.loads((slice_folder / "teachers" / "lenet5-digits.json").read_text())
    assert teacher["trained_on"] == "1294 images of the training split"
    assert teacher["measured_on"] == "143 images of the training split, held back"
    assert "20 steps" in done.stderr + done.stdout


@pytest.mark.parametrize("real_data", [False, True], ids=["data-free", "real-data"])
def test_recipes_are_tried_on_a_slice(slice_folder: Path, real_data: bool) -> None:
    small = ["transfer.size=100", "transfer.held_out=50", "distillation.steps=10", "compression.pruning.steps=2"]
    changes = [*small, "compression.quantization=null", "controls=[noise]"]
    command = ["digits-prune50", "--teacher-epochs", EPOCHS, "--out", str(slice_folder)]
    command += [*(["--real-data"] if real_data else []), "--set", *changes]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "recipe_on_a_slice.py"), *command], capture_output=True, text=True, check=True
    )
    assert "student: " in done.stdout and "noise: " in done.stdout
    (folder,) = slice_folder.glob(f"digits-prune50-full-{'real-' if real_data else ''}*-seed0")
    report = json.loads((folder / "report.json").read_text())
    assert report["data_free"] is not real_data
    assert "143 images" in report["agreement_on"]


def test_every_part_of_the_colour_recipe_that_is_left_out_gives_another_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    parts = script("colour_parts")
    recipes = {
        name: load_recipe(parts.RECIPE, [*parts.BASE, *part.changes], 0, "quick").recipe.model_dump_json()
        for name, part in parts.PARTS.items()
    }
    assert len(set(recipes.values())) == len(recipes) >= 18


@pytest.mark.parametrize("other", [None, "synthesis", "targets", "teacher", "size", "seed"])
def test_given_images_are_those_that_the_recipe_would_make(tmp_path: Path, other: str | None) -> None:
    identity = {"teacher": "a", "targets": {"method": "zskd"}, "synthesis": {"max_steps": 16}, "size": 500, "seed": 9}
    (tmp_path / "impressions-held-out").mkdir()
    (tmp_path / "impressions-held-out" / "manifest.json").write_text(json.dumps({"identity": identity}))
    given = {**identity, "size": 4000, "seed": 0, **({} if other is None else {other: "another"})}
    report = {"name": "r", "impressions": {"given": given}, "recipe": {"transfer": {"size": 4000}, "seed": 0}}
    check = script("packaged_recipes").check_same_transfer
    if other is None:
        check(report, tmp_path)
    else:
        with pytest.raises(SystemExit, match=f"differ in {other} "):
            check(report, tmp_path)


def test_operations_are_counted_by_hand() -> None:
    module = script("matrix_peak")
    layer, images = torch.nn.Conv2d(3, 8, 3, bias=False).requires_grad_(False), torch.rand(5, 3, 10, 10)
    forward = 2 * 5 * 8 * 8 * 8 * 27  # multiply and add; images, places, channels out, inputs of each

    def gradient_of_the_images() -> None:
        leaf = images.clone().requires_grad_(True)
        torch.autograd.grad(layer(leaf).sum(), leaf)

    assert module.operations(lambda: layer(images)) == forward
    assert module.operations(gradient_of_the_images) == 2 * forward
    a, b = torch.rand(4, 6), torch.rand(6, 7)
    assert module.operations(lambda: a @ b) == 2 * 4 * 6 * 7
    assert module.matrix_peak("cpu", torch.float32) > 1e8


def test_transition_curves_are_drawn_from_records(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "runs", tmp_path / "results", quiet=True)
    selection = Selection("digits", ["digits-zskt-paper", "digits-kd-at-10-a-class"], [0], "smoke")
    run_table(selection, workspace, lambda _: None)
    found = script("transition_curves").chosen(read_records(tmp_path / "results"), "digits", "smoke")
    assert list(found) == ["kd-at-10-a-class", "zskt-paper"]
    for result in found.values():
        assert len(result.followed) == len(result.other) == result.steps
        # The error is the mean of |student - teacher| over images as well, the curves' distance that of the means.
        assert float((result.followed - result.other).abs().mean()) <= result.error + 1e-4
    command = [sys.executable, BENCHMARKS / "transition_curves.py", "digits", "--scale", "smoke"]
    command += ["--results", tmp_path / "results", "--out", tmp_path / "curves.png"]
    assert subprocess.run(command, check=False).returncode == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_peer_gets_our_teacher_under_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    renamed = script("fast_datafree").renamed
    assert renamed("group2.0.shortcut.weight") == "block2.layer.0.convShortcut.weight"
    assert renamed("group1.3.bn1.running_mean") == "block1.layer.3.bn1.running_mean"
    assert (renamed("bn.weight"), renamed("conv1.weight"), renamed("fc.bias")) == (
        "bn1.weight",
        "conv1.weight",
        "fc.bias",
    )
    names = build_network("zoo:wrn", {"depth": 40, "width": 2}).state_dict()
    assert len({renamed(name) for name in names}) == len(names)


def test_what_agreement_is_worth_is_said_as_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    worth = script("agreement_worth")
    assert worth.section() in worth.PAGE.read_text(), "python benchmarks/agreement_worth.py --write mends this"
    data_free = [one for (_, images), records in worth.runs().items() if images != "real images" for one in records]
    below = [-error for error in worth.off_by(data_free, "agreement_held_out")]
    runs, least, most = HELD_OUT_BELOW_TEST
    assert len(below) >= runs and all(least - 0.5 <= each <= most + 0.5 for each in below)


def test_the_cost_of_a_larger_task_is_calculated_from_units_of_each_stage(tmp_path: Path) -> None:
    out = tmp_path / "larger-task.json"
    command = [sys.executable, "larger_task.py", "--only", "leaves", "--threads", "1", "--out", str(out)]
    subprocess.run(command, cwd=BENCHMARKS, check=True, timeout=300, capture_output=True)
    (record,) = json.loads(out.read_text())
    assert record["minutes"] == pytest.approx(record["seconds_a_unit"] * record["units"] / 60, rel=0.5)
    assert 100 < record["peak_mib"] < 8000
    recorded = json.loads((BENCHMARKS.parent / "results" / "bench-larger-task.json").read_text())
    assert [one["name"] for one in recorded] == ["leaves", "impressions", "calibration", "distillation"]
