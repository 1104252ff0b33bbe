"""Teachers trained by name: the same command again, a different one, damage."""

import json
from pathlib import Path

import pytest

from zskd_nni.research.train_teacher import train_teacher


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    folder = tmp_path_factory.mktemp("teachers")
    return folder, train_teacher("lenet5-digits", folder, epochs=1, quiet=True)


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("lenet5-digits*")}


def test_finished_teacher_is_not_trained_again(trained):
    folder, result = trained
    before = written(folder)
    left = folder / ".lenet5-digits.checkpoint.pt"
    left.write_bytes(b"of a training whose end came just before this was deleted")
    assert (
        train_teacher("lenet5-digits", folder, epochs=1, quiet=True)
        == result
        == json.loads((folder / "lenet5-digits.json").read_text())
    )
    assert written(folder) == before
    assert not left.exists()


@pytest.mark.parametrize("other", [{"seed": 1}, {"epochs": 2}, {"validation": True}])
def test_other_training_takes_its_place(trained, tmp_path, other):
    for path in trained[0].glob("lenet5-digits*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    again = train_teacher("lenet5-digits", tmp_path, **{"epochs": 1, **other}, quiet=True)
    assert again["sha256"] != trained[1]["sha256"]
    assert json.loads((tmp_path / "lenet5-digits.json").read_text()) == again


@pytest.mark.parametrize("name", ["lenet5-digits.safetensors", "lenet5-digits.json"])
def test_damaged_teacher_is_trained_again(trained, tmp_path, name):
    for path in trained[0].glob("lenet5-digits*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
    again = train_teacher("lenet5-digits", tmp_path, epochs=1, quiet=True)
    assert again["sha256"] == trained[1]["sha256"]
    weights = "lenet5-digits.safetensors"
    assert (tmp_path / weights).read_bytes() == (trained[0] / weights).read_bytes()
