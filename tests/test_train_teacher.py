"""Teachers trained by name: the same command again, a different one, damage."""

import json
from pathlib import Path

import pytest
import torch

from zskd_nni.data.datasets import LabelledImages
from zskd_nni.research.train_teacher import HELD_OUT, TeacherTraining, hold_out, train_teacher


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    folder = tmp_path_factory.mktemp("teachers")
    return folder, train_teacher("lenet5-digits", folder, TeacherTraining(epochs=1, quiet=True))


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("lenet5-digits*")}


def test_finished_teacher_is_not_trained_again(trained):
    folder, result = trained
    before = written(folder)
    left = folder / ".lenet5-digits.checkpoint.pt"
    left.write_bytes(b"of a training whose end came just before this was deleted")
    assert (
        train_teacher("lenet5-digits", folder, TeacherTraining(epochs=1, quiet=True))
        == result
        == json.loads((folder / "lenet5-digits.json").read_text())
    )
    assert written(folder) == before
    assert not left.exists()


@pytest.mark.parametrize("other", [{"seed": 1}, {"epochs": 2}, {"validation": True}])
def test_other_training_takes_its_place(trained, tmp_path, other):
    for path in trained[0].glob("lenet5-digits*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    again = train_teacher("lenet5-digits", tmp_path, TeacherTraining(**{"epochs": 1, "quiet": True, **other}))
    assert again["sha256"] != trained[1]["sha256"]
    assert json.loads((tmp_path / "lenet5-digits.json").read_text()) == again


@pytest.mark.parametrize("name", ["lenet5-digits.safetensors", "lenet5-digits.json"])
def test_damaged_teacher_is_trained_again(trained, tmp_path, name):
    for path in trained[0].glob("lenet5-digits*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
    again = train_teacher("lenet5-digits", tmp_path, TeacherTraining(epochs=1, quiet=True))
    assert again["sha256"] == trained[1]["sha256"]
    weights = "lenet5-digits.safetensors"
    assert (tmp_path / weights).read_bytes() == (trained[0] / weights).read_bytes()


@pytest.mark.parametrize(("count", "held"), [(60_000, HELD_OUT), (50_000, 5_000), (1437, 143)])
def test_the_end_of_the_training_split_is_held_back(count, held):
    data = LabelledImages(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.arange(count), "numbers")
    rest, held_out = hold_out(data)
    assert torch.equal(torch.cat([rest.labels, held_out.labels]), data.labels)
    assert len(held_out) == held
