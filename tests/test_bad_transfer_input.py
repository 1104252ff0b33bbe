"""Values of a recipe's transfer section that cannot work: compress gives one sentence and exit code 2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import is_one_sentence, run_cli
from typer.testing import CliRunner

from zskd_nni import cli
from zskd_nni.data.datasets import load_images
from zskd_nni.models.zoo import lenet5
from zskd_nni.pipeline import Run
from zskd_nni.recipes.load import load_recipe, recipe_text
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.tensors import save_tensors

RECIPE = """
name: small
teacher: {{model: "zoo:lenet5", weights: "{weights}", input: {{shape: [1, 32, 32]}}}}
student: {{model: "zoo:lenet5_half"}}
transfer: {{method: {method}, preset: paper, size: 40, held_out: 20, {keys}}}
distillation: {{steps: 60, batch: 16, learning_rate: {rate}, warmup: 0}}
evaluation: {{data: digits, any_teacher: true}}
controls: []
"""


def compress(folder: Path, method: str, keys: str, weights: str = "zoo:lenet5-digits", rate: float = 1e-3) -> str:
    """What the command says about such a recipe; it must be a sentence."""
    recipe = folder / "small.yml"
    recipe.write_text(RECIPE.format(weights=weights, method=method, keys=keys, rate=rate))
    result = CliRunner().invoke(
        cli.app, ["compress", str(recipe), "--out", str(folder / "out"), "--threads", "1", "--quiet"]
    )
    assert isinstance(result.exception, UserError), result.output
    sentence = " ".join(str(result.exception).split())
    assert is_one_sentence(f"Error: {sentence}\n")
    assert not (folder / "out" / "report.json").exists()
    return sentence


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    assert "pictures holds no images" in compress(tmp_path, "ats", "sources: [pictures]")


def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(b"no picture")
    assert "1.png cannot be read as an image" in compress(tmp_path, "ats", "sources: [pictures]")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "ATS has no source" in compress(tmp_path, "ats", "sources: [nowhere]")


def test_a_teacher_that_puts_everything_into_one_class(tmp_path: Path) -> None:
    network = lenet5()
    with torch.no_grad():
        network.fc3.bias.copy_(torch.tensor([0.0] * 3 + [1e4] + [0.0] * 6))
    save_tensors(tmp_path / "one.safetensors", network.state_dict())
    sentence = compress(tmp_path, "ats", "candidates: 2", weights="one.safetensors")
    assert "ATS cannot balance shapes: the teacher puts all 40 candidates into class 3" in sentence
    assert "0: 0, 1: 0, 2: 0, 3: 40" in sentence


def test_a_generator_that_diverges(tmp_path: Path) -> None:
    sentence = compress(tmp_path, "zskt", "rounds: 6, width: 4", rate=1e30)
    assert "ZSKT's generator diverged" in sentence
    assert "student step 10" in sentence


def test_attention_layers_have_no_place_in_a_recipe(tmp_path: Path) -> None:
    sentence = compress(tmp_path, "zskt", "width: 4, attention: [[conv1, conv2]]")
    assert sentence.startswith("transfer.attention: as a recipe's source ZSKT has no part in the student's loss")


def test_a_layer_that_is_not_there(tmp_path: Path) -> None:
    assert "no module 'conv9'" in compress(tmp_path, "sts", "targets: {layer: conv9}")


def test_a_held_out_set_that_cannot_be_is_said_before_the_long_work(tmp_path: Path) -> None:
    changes = ["transfer.preset=author-code", "transfer.size=200", "transfer.held_out=30"]  # ten classes, two betas
    with pytest.raises(UserError, match="30"):
        Run(load_recipe("digits-prune50", changes), tmp_path / "out", quiet=True).compress()
    assert not (tmp_path / "out" / "impressions").exists()


def test_synthesize_finds_images_beside_the_recipe(tmp_path: Path) -> None:
    labels = np.zeros(60, dtype=np.int64)
    np.savez(
        tmp_path / "mine.npz", images=np.random.default_rng(0).integers(0, 255, (60, 8, 8), np.uint8), labels=labels
    )
    recipe = yaml.safe_load(recipe_text("digits-prune50")[0])
    recipe["transfer"] = {"method": "ats", "preset": "unbalanced", "sources": ["mine.npz"], "size": 40}
    (tmp_path / "mine.yml").write_text(yaml.safe_dump(recipe))
    done = run_cli("synthesize", tmp_path / "mine.yml", "--out", tmp_path / "out", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "40 images of ats" in done.stdout


def test_a_download_that_fails_is_not_advised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.MNIST", fail)
    with pytest.raises(UserError, match=r"torchvision could not fetch the data set mnist .*no network"):
        load_images("mnist", "test", tmp_path, download=True)
    with pytest.raises(UserError, match="--download lets torchvision fetch it there"):
        load_images("mnist", "test", tmp_path)
