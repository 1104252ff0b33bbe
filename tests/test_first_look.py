"""What is said and refused before the long work: wrong inputs of teachers, sizes of test images, what is resumed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from zskd_nni.cli import app
from zskd_nni.data.datasets import LabelledImages, describe_fit, fit_shape, load_images
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher, load_teacher
from zskd_nni.pipeline import Run
from zskd_nni.pipeline.first_look import RIGHT, first_spread, least_accuracy, look_at, near_chance
from zskd_nni.pipeline.neutral import neutral_images
from zskd_nni.pipeline.report_html import remarks
from zskd_nni.pipeline.resumed import taken_up
from zskd_nni.recipes.load import load_recipe
from zskd_nni.runtime.errors import UserError

DIGITS = [
    "transfer.size=20",
    "transfer.held_out=10",
    "transfer.synthesis.max_steps=2",
    "controls=[]",
    "distillation.steps=2",
    "compression.pruning.steps=2",
    "compression.quantization=null",
]


class Normed(nn.Module):
    """A convolution and a BatchNorm that has seen digits as a training would have shown them."""

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = (
            nn.Conv2d(spec.shape[0], 8, 3),
            nn.BatchNorm2d(8, momentum=None),
            nn.Linear(8, 10),
        )
        images = load_images("digits").pixels(slice(0, 200), spec)
        with torch.no_grad():
            self.train()(spec.normalise(images))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


INPUTS = {
    "pixels": InputSpec((1, 16, 16)),
    "normalised": InputSpec((1, 16, 16), mean=(0.3,), std=(0.37,)),
    "bytes": InputSpec((1, 16, 16), high=255.0),
}


@pytest.mark.parametrize("trained", INPUTS)
@pytest.mark.parametrize("given", INPUTS)
def test_the_first_batch_norm_tells_a_wrong_input(trained: str, given: str) -> None:
    teacher = Teacher(Normed(INPUTS[trained]), INPUTS[given])
    spread, look = first_spread(teacher), look_at(teacher, None)
    assert spread is not None
    assert (RIGHT[0] <= spread <= RIGHT[1]) == (trained == given)
    assert look.warnings == (trained != given)
    if trained != given:
        assert "teacher.input (low, high, mean, std) is probably another than in its training" in look.lines[-1]


@pytest.mark.parametrize(("batches", "known"), [(0, True), (3, False), (43, False), (44, True)])
def test_a_batch_norm_that_has_seen_few_batches_tells_nothing(batches: int, known: bool) -> None:
    """With a momentum of 0.1, a hundredth of the start is left after 44 batches; 0 batches were not counted."""
    network = Normed(INPUTS["normalised"])
    norm = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    norm.momentum = 0.1
    norm.num_batches_tracked.fill_(batches)
    assert (first_spread(Teacher(network, INPUTS["bytes"])) is not None) == known
    norm.running_var.fill_(1)
    if batches == 0:
        assert first_spread(Teacher(network, INPUTS["bytes"])) is None, "as it was made"


def test_a_teacher_without_batch_norm_has_no_spread() -> None:
    teacher = load_teacher("lenet5-digits")
    assert first_spread(teacher) is None
    look = look_at(teacher, replace(load_images("digits"), fit="resize"))
    assert look.accuracy is not None and look.accuracy > 95 and look.images == 360
    assert "8x8 resized to 32x32" in look.lines[0]
    assert near_chance(look, 10) is None


@pytest.mark.parametrize(("classes", "least"), [(10, 0.2), (100, 0.02), (3, 2 / 3), (2, 0.75)])
def test_twice_chance(classes: int, least: float) -> None:
    assert least_accuracy(classes) == pytest.approx(least)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zskd_nni", *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def with_order(order: list[int]) -> Teacher:
    """The digits' teacher with its classes in another order."""
    teacher = load_teacher("lenet5-digits")
    with torch.no_grad():
        for values in (teacher.classifier.weight, teacher.classifier.bias):
            values.copy_(values[order])
    return teacher


def test_classes_in_another_order_are_told() -> None:
    test = load_images("digits", "test")
    for order, told in (
        ([0, 1, 2, 5, 4, 3, 6, 7, 8, 9], "the teacher's class 3 is 5, 5 is 3 of the test data. In that order"),
        (
            [1, 2, 3, 4, 5, 6, 7, 8, 9, 0],
            "the teacher's class 0 is 1, 1 is 2, 2 is 3, 3 is 4 of the test data and so on",
        ),
    ):
        look = look_at(with_order(order), test)
        assert look.warnings and any(told in line for line in look.lines[-look.warnings :])
    assert look_at(with_order(list(range(10))), test).warnings == 0


def test_a_weak_teacher_is_no_order_of_classes() -> None:
    torch.manual_seed(0)
    teacher = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)), (1, 32, 32))
    assert not any("order of the classes is probably" in line for line in look_at(teacher, load_images("digits")).lines)


def test_colours_in_another_order_are_told() -> None:
    """A teacher that tells red from blue images."""
    images = torch.zeros(60, 3, 8, 8, dtype=torch.uint8)
    labels = torch.arange(60) % 2
    images[labels == 0, 0], images[labels == 1, 2] = 255, 255
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    for weight, warned in ((torch.eye(3)[[0, 2, 1]], False), (torch.eye(3)[[2, 0, 1]], True)):
        with torch.no_grad():
            network[2].weight.copy_(weight)
            network[2].bias.zero_()
        look = look_at(Teacher(network, (3, 8, 8)), LabelledImages(images, labels, "colours"))
        assert any("in the order blue, green, red" in line for line in look.lines) is warned


def test_a_dry_run_measures_the_teacher_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sets = [word for change in DIGITS for word in ("--set", change)]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    taken = command("compress", "digits-prune50", "--out", str(tmp_path / "taken"), "--dry-run", *sets)
    assert taken.returncode == 2 and "is not empty" in taken.stderr
    right = command("compress", "digits-prune50", "--out", str(out), "--dry-run", *sets)
    assert right.returncode == 0, right.stderr
    assert "teacher: accuracy 98.89 % on 360 test images of digits (8x8 resized to 32x32)" in right.stderr
    assert "dry run" in right.stdout and not out.exists()
    # The classes in another order: as good as an untrained network.
    images = load_images("digits")
    np.savez(tmp_path / "shifted.npz", images=images.images.squeeze(1).numpy(), labels=(images.labels.numpy() + 1) % 10)
    wrong = [*sets, "--set", f"evaluation.data={tmp_path / 'shifted.npz'}", "--set", "evaluation.fit=resize"]
    stopped = command("compress", "digits-prune50", "--out", str(out), *wrong)
    assert stopped.returncode == 2 and not out.exists()
    assert "chance is 10.00 %" in stopped.stderr and "--set evaluation.any_teacher=true" in stopped.stderr
    all_the_same = ("--set", "evaluation.any_teacher=true")
    despite = command("compress", "digits-prune50", "--out", str(out), "--dry-run", *wrong, *all_the_same)
    assert despite.returncode == 0 and "warning: chance is 10.00 %" in despite.stderr


def test_sizes_without_a_rule_are_refused_until_the_recipe_says_how(tmp_path: Path) -> None:
    np.savez(tmp_path / "small.npz", images=np.zeros((4, 16, 16), np.uint8), labels=np.arange(4))
    changes = [*DIGITS, f"evaluation.data={tmp_path / 'small.npz'}"]
    with pytest.raises(UserError, match=r"evaluation\.fit: the images are 16x16, the network takes 32x32: say how"):
        Run(load_recipe("digits-prune50", changes), tmp_path / "out", quiet=True)
    for fit, words in (("pad", "16x16 padded to 32x32"), ("resize", "16x16 resized to 32x32")):
        run = Run(load_recipe("digits-prune50", [*changes, f"evaluation.fit={fit}"]), tmp_path / "out", quiet=True)
        assert run.look is not None and words in run.look.lines[0]
    with pytest.raises(UserError, match="crop is not possible; resize is"):
        Run(load_recipe("digits-prune50", [*changes, "evaluation.fit=crop"]), tmp_path / "out", quiet=True)


def test_images_are_padded_and_cropped_at_the_middle() -> None:
    images = torch.arange(36.0).view(1, 1, 6, 6)
    assert torch.equal(fit_shape(images, (1, 4, 4), "crop"), images[..., 1:5, 1:5])
    padded = fit_shape(images, (1, 8, 9), "pad")
    assert torch.equal(padded[..., 1:7, 1:7], images) and padded.sum() == images.sum()
    assert fit_shape(images, (1, 6, 6), "exact") is images
    with pytest.raises(UserError, match="pad is not possible"):
        fit_shape(images, (1, 4, 8), "pad")
    data = LabelledImages(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.zeros(2), "set")
    assert describe_fit(data, (3, 32, 32)) == "28x28 padded to 32x32, grey repeated as colours"
    assert describe_fit(data, (1, 28, 28)) == ""
    assert describe_fit(replace(data, fit="crop"), (1, 20, 20)) == "28x28 cropped to 20x20"


@pytest.mark.parametrize("kind", ["float32", "float64", "int64", "int16"])
def test_other_types_of_images_are_read_where_their_range_is_known(tmp_path: Path, kind: str) -> None:
    given = np.arange(256, dtype=np.uint8).reshape(4, 8, 8)
    other = (given / 255).astype(kind) if kind.startswith("float") else given.astype(kind)
    np.savez(tmp_path / "images.npz", images=other, labels=np.arange(4))
    assert np.array_equal(load_images(str(tmp_path / "images.npz")).images.squeeze(1).numpy(), given)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 255.0), (-2.1, 2.64)])
def test_other_ranges_are_refused_with_the_line_that_converts(tmp_path: Path, low: float, high: float) -> None:
    images = np.linspace(low, high, 256).reshape(4, 8, 8)
    path = tmp_path / "images.npz"
    np.savez(path, images=images, labels=np.arange(4))
    with pytest.raises(UserError, match=r"they belong in \[0, 1\], or as uint8") as told:
        load_images(str(path))
    line = str(told.value).partition("images = ")[2]
    converted = eval(line, {"np": np, "images": images})
    np.savez(path, images=converted, labels=np.arange(4))
    assert load_images(str(path)).images.flatten().tolist() == list(range(256))


def test_the_neutral_images_belong_to_the_teacher_and_to_no_method() -> None:
    teacher = load_teacher("lenet5-mnist")
    images = neutral_images(teacher, 100)
    assert torch.equal(images, neutral_images(teacher, 100))
    counts = torch.bincount(teacher.predict(images).argmax(1), minlength=10)
    assert counts.min() >= 5 and counts.max() <= 20


def test_what_is_continued_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    Run(load_recipe("digits-prune50", [*DIGITS, "evaluation=null"]), out, quiet=True).compress()
    capsys.readouterr()
    report = Run(load_recipe("digits-prune50", [*DIGITS, "evaluation=null"]), out).compress()
    told = capsys.readouterr().err
    assert f"{out} is continued" in told
    assert "impressions: all 20 are there" in told and "student: finished, taken from" in told
    assert report["agreement"] == report["agreement_neutral"]
    assert report["agreement_on"].startswith("600 procedural images, the same for every method")
    assert any("orders students of one teacher" in line for line in remarks(report))
    (out / "state" / "student.checkpoint.pt").write_bytes(b"")
    for shard in (out / "impressions").rglob("*.safetensors"):
        shard.unlink()
    told = "\n".join(taken_up(out, {}))
    assert "impressions: 0 of 20 are there" in told and "student: begun, continued from its checkpoint" in told


def report_of(student: float, int8: float | None, section: dict[str, Any]) -> dict[str, Any]:
    recipe = {"transfer": {"method": "zskd"}, "distillation": {"features": "none", "feature_weight": 0}}
    return {
        "data_free": True, "impressions": None, "history": None, "pruning": None, "quantization": None,
        "evaluation": "digits", "latency_ms": {"student": student, "student_int8": int8},
        "recipe": {**recipe, "compression": {"quantization": section}},
    }  # fmt: skip


def test_slower_integers_are_told_with_what_may_help() -> None:
    section = {"config_list": [{"target_names": ["_input_", "weight"]}], "fuse_batch_norm": False}
    (line,) = remarks(report_of(0.141, 0.288, section))
    assert "int8 is slower here (0.288 ms for 0.141 ms)" in line and "bytes, not time" in line
    assert "fuse_batch_norm: true and _output_ among the target_names may help" in line
    (line,) = remarks(report_of(0.092, 0.144, {**section, "fuse_batch_norm": True}))
    assert "fuse_batch_norm" not in line and "_output_" in line
    (line,) = remarks({**report_of(0.092, 0.144, section), "batch_norm": False})
    assert "fuse_batch_norm" not in line and "_output_" in line, "there is nothing to fold"
    assert remarks(report_of(0.3, 0.2, section)) == [] == remarks(report_of(0.3, None, section))


def test_real_images_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [*DIGITS, "evaluation=null", "transfer.method=real", "transfer.data=digits", "transfer.size=3000"]
    report = Run(load_recipe("digits-prune50", changes), tmp_path / "out", quiet=True).compress()
    assert "real: the student is trained on 1,427 images, fewer than transfer.size (3,000)" in capsys.readouterr().err
    assert report["real_images"] == 1427
    assert "(digits), 1,427 images of the 3,000 that transfer.size asks for" in remarks(report)[0]


def test_of_procedural_and_real_sources_not_all_images_are_real(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = ["transfer.method=ats", "transfer.preset=paper", "transfer.sources=[shapes, digits]", "transfer.fill=none"]
    changes = [*(change for change in DIGITS if "synthesis" not in change), "evaluation=null", *mixed]
    report = Run(load_recipe("digits-prune50", changes), tmp_path / "out", quiet=True).compress()
    assert "procedural and real ones" in capsys.readouterr().err
    assert report["real_images"] is None
    assert remarks(report)[0] == "NOT data-free: the student was trained on real images (ats: shapes, digits)."


def test_real_images_are_fitted_as_the_recipe_says(tmp_path: Path) -> None:
    mine = tmp_path / "mine.npz"
    np.savez(mine, images=np.full((30, 8, 8), 255, np.uint8), labels=np.arange(30) % 10)
    real = ["transfer.method=real", f"transfer.data={mine}", f"evaluation.data={mine}"]
    teacher = load_teacher("lenet5-digits")

    def made(fit: str) -> Any:
        loaded = load_recipe("digits-prune50", [*DIGITS, *real, f"evaluation.fit={fit}"])
        return loaded.transfer_source(teacher, tmp_path / fit)

    resized, padded, unnamed = made("resize"), made("pad"), made("null")
    assert resized.images.min() == 1 and padded.images.mean() == pytest.approx(1 / 16)
    assert torch.equal(unnamed.images, resized.images)
    assert resized.fingerprint != padded.fingerprint
    with pytest.raises(UserError, match=r"evaluation\.fit: the images are 8x8, the network takes 32x32"):
        made("exact")


def test_a_dry_run_refuses_the_folder_of_another_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        Run(load_recipe("digits-prune50", [*DIGITS, "evaluation=null"]), tmp_path, quiet=True).require_own_folder()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_dry_run_looks_at_given_impressions(tmp_path: Path) -> None:
    words = ["compress", "digits-prune50", "--out", str(tmp_path / "out"), "--dry-run", "--quiet"]
    done = CliRunner().invoke(app, [*words, "--set", "evaluation=null", "--impressions", str(tmp_path)])
    assert isinstance(done.exception, UserError) and "is not a store of impressions" in str(done.exception)
