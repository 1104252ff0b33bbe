"""Files of version 0.1 are refused; the message tells how to make them again."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from helpers import is_one_sentence, run_cli
from torch import nn

from zskd_nni.pipeline import Run
from zskd_nni.pipeline.twin import read_twin
from zskd_nni.recipes.load import load_recipe
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import sha256_of_file, write_json
from zskd_nni.runtime.run_identity import RUN_FORMAT
from zskd_nni.synthesis import ImpressionStore
from zskd_nni.training.loop import TrainingRun, cosine_schedule, fit

MADE = Path(__file__).parent / "data" / "made-by-0.1"
# What made MADE / "run".
CHANGES = (
    "transfer.size=20",
    "transfer.held_out=10",
    "transfer.synthesis.shard=20",
    "transfer.synthesis.max_steps=2",
    "compression.pruning.steps=2",
    "compression.quantization.steps=2",
    "distillation.steps=2",
    "distillation.batch=10",
    "controls=[]",
)
COMMAND = ["compress", "digits-prune50", *(part for change in CHANGES for part in ("--set", change))]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MADE, tmp_path / "made"))


def hashes(folder: Path) -> dict[Path, str]:
    return {path: sha256_of_file(path) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_run_folder(old: Path) -> None:
    before = hashes(old)
    done = run_cli(*COMMAND, "--out", old / "run", "--threads", 1, "--quiet")
    assert done.returncode == 2 and is_one_sentence(done.stderr), done.stderr
    assert "run was made by another version of zskd_nni (its format is None, this version reads" in done.stderr
    assert "run the same command with a new output folder, or remove this one first." in done.stderr
    assert hashes(old) == before


def test_a_store_of_impressions(old: Path) -> None:
    message = r"made by another version .* Remove .* to make it anew\.$"
    with pytest.raises(UserError, match=message):
        ImpressionStore.open(old / "run" / "impressions")
    with pytest.raises(UserError, match=message):
        ImpressionStore.create(old / "run" / "impressions", {}, [20], {"threads": 1})
    done = run_cli("synthesize", *COMMAND[1:], "--out", old / "run" / "impressions", "--quiet")
    assert done.returncode == 2 and is_one_sentence(done.stderr), done.stderr
    assert "made by another version of zskd_nni" in done.stderr


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "checkpoint.pt"])  # named, or beside where one would be
def test_a_checkpoint(old: Path, name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    before = hashes(old)
    with pytest.raises(UserError, match=r"checkpoint\.safetensors .*Remove the file to start over\.$"):
        fit(
            model,
            optimizer,
            cosine_schedule(optimizer, 4),
            lambda step, random: model(torch.ones(1, 3)).square().sum(),
            TrainingRun(4, checkpoint=old / name, quiet=True),
        )
    assert hashes(old) == before


def test_a_run_that_was_begun_before_a_key_was_added_goes_on(tmp_path: Path) -> None:
    recipe = load_recipe("digits-prune50", ["evaluation=null"])
    run = Run(recipe, tmp_path, quiet=True)
    begun = copy.deepcopy(run.identity)
    del begun["recipe"]["distillation"]["dropout"]
    write_json(tmp_path / "run.json", {"format": RUN_FORMAT, "identity": begun})
    with run.owned():
        assert run.identity == begun  # a finished report has the fingerprint of this one
    other = Run(load_recipe("digits-prune50", ["evaluation=null", "distillation.dropout=false"]), tmp_path, quiet=True)
    with pytest.raises(UserError, match=r"recipe\.distillation\.dropout is True there, False here"):
        other.require_own_folder()


def test_a_twin_may_be_of_before_a_key_was_added(tmp_path: Path) -> None:
    mine = {"recipe": load_recipe("digits-prune50").recipe.described(), "teacher": "abc"}
    before = copy.deepcopy(mine["recipe"])
    del before["distillation"]["dropout"]
    before["transfer"] = {"method": "real", "data": "digits"}
    figures = dict.fromkeys(("accuracy", "agreement", "agreement_int8", "agreement_neutral", "learnt_on"))
    figures["accuracy"] = {"student": 98.0, "student_int8": None}  # type: ignore[assignment]
    write_json(
        tmp_path / "report.json",
        {**figures, "recipe": before, "data_free": False, "provenance": {"teacher": "abc"}},
    )
    assert read_twin(tmp_path, mine).figures()["accuracy"] == 98.0
