"""Methods of others, by the entry-point group; and real training data as a method, marked as what it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import is_one_sentence, run_cli

from zskd_nni.data import load_images
from zskd_nni.errors import UserError
from zskd_nni.inputs import InputSpec
from zskd_nni.methods.real import METHOD as REAL
from zskd_nni.methods.registry import TransferRequest, find_method, is_data_free, method_names, transfer_source
from zskd_nni.pipeline import Run
from zskd_nni.recipe import load_recipe
from zskd_nni.teacher import Teacher

SMALL = (
    "transfer.size=200",
    "transfer.held_out=60",
    "compression.pruning.steps=10",
    "compression.quantization.steps=10",
    "distillation.steps=20",
    "controls=[]",
)

# What somebody else writes: one module, one class, one entry point.
STRIPES = """
from dataclasses import dataclass

import torch

from zskd_nni.settings import build_settings
from zskd_nni.transfer import StoredSource


@dataclass(frozen=True)
class Options:
    __pydantic_config__ = {"extra": "forbid"}
    width: int = 4


class Stripes:
    name = "stripes"
    presets = ("best",)

    def options(self, preset, given):
        return build_settings(Options, dict(given))

    def source(self, teacher, request):
        draws = torch.Generator().manual_seed(request.seed)
        channels, height, width = teacher.spec.shape
        columns = torch.rand((request.size, channels, 1, width // request.options.width), generator=draws)
        images = columns.repeat_interleave(request.options.width, 3).expand(-1, -1, height, -1).contiguous()
        return StoredSource(images, request.batch_size, request.seed, f"stripes {request.seed}")


METHOD = Stripes()
"""


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package as pip leaves it: a module, and a .dist-info with its entry points."""
    site = tmp_path / "site"
    info = site / "zskd_stripes-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "zskd_stripes.py").write_text(STRIPES)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zskd-stripes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[zskd_nni.methods]\nstripes = zskd_stripes:METHOD\n")
    monkeypatch.syspath_prepend(str(site))
    yield site
    sys.modules.pop("zskd_stripes", None)


def test_a_method_of_somebody_elses_is_found_and_runs(third_party, tmp_path):
    assert {"stripes", "zskd"} <= set(method_names())
    changes = [*SMALL, "transfer.method=stripes", "transfer.width=8"]
    report = Run(load_recipe("digits-prune50", changes), tmp_path / "out", quiet=True).compress()
    assert report["recipe"]["transfer"]["method"] == "stripes"
    assert report["impressions"] is None and report["data_free"]
    assert report["parameters"]["student"] == 35820
    assert (tmp_path / "out" / "student-int8.onnx").exists()


def test_its_options_are_checked(third_party):
    with pytest.raises(UserError, match="'widht'; did you mean 'width'"):
        load_recipe("digits-prune50", ["transfer.method=stripes", "transfer.widht=8"])


def test_without_the_package_there_is_no_such_method():
    with pytest.raises(UserError, match="no method 'stripes'"):
        load_recipe("digits-prune50", ["transfer.method=stripes"])


def test_a_broken_package_is_named(third_party):
    (third_party / "zskd_stripes.py").write_text("raise RuntimeError('no luck')\n")
    with pytest.raises(UserError, match=r"'stripes' \(zskd_stripes:METHOD\) cannot be loaded: no luck"):
        find_method("stripes")


# Real data.


def request(size: int, folder: Path, **changes: object) -> TransferRequest:
    options = REAL.options("best", {"data": "digits"})
    return TransferRequest(size, 32, seed=0, folder=folder, options=options, **changes)


def test_real_images_are_of_the_training_split_and_held_out_ones_are_others(digits_teacher: Teacher, tmp_path: Path):
    learnt = REAL.source(digits_teacher, request(1000, tmp_path)).images
    held_out = REAL.source(digits_teacher, request(400, tmp_path, held_out=True)).images
    spec = InputSpec((1, 32, 32))

    def rows(images: torch.Tensor) -> set[bytes]:
        return {image.numpy().tobytes() for image in images}

    train = load_images("digits", "train")
    test = load_images("digits", "test")
    everything = rows(train.pixels(slice(None), spec))
    assert len(learnt) == 1000 and len(held_out) == 400
    assert rows(learnt) | rows(held_out) <= everything
    assert not rows(learnt) & rows(held_out)
    assert not rows(learnt) & (rows(test.pixels(slice(None), spec)) - everything)
    assert not is_data_free(REAL) and is_data_free(find_method("zskd"))


def test_the_twin_of_a_recipe_says_that_it_is_not_data_free(tmp_path):
    changes = [*SMALL, "transfer.synthesis.shard=150", "transfer.method=real", "transfer.data=digits"]
    report = Run(load_recipe("digits-prune50", changes), tmp_path, quiet=True).compress()
    assert report["data_free"] is False and report["learnt_on"] == "digits"
    assert "NOT data-free" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["impressions"] is None
    assert not (tmp_path / "impressions").exists()


def test_real_without_a_data_set_is_one_sentence(tmp_path):
    done = run_cli("compress", "digits-prune50", "--out", tmp_path / "out", "--set", "transfer.method=real", "--quiet")
    assert done.returncode == 2 and is_one_sentence(done.stderr) and "transfer.data" in done.stderr


def test_one_call_makes_what_a_recipes_transfer_section_makes(digits_teacher, tmp_path):
    options = {"synthesis": {"max_steps": 3, "shard": 20}}
    source = transfer_source(digits_teacher, tmp_path / "a", 40, batch_size=16, seed=3, quiet=True, **options)
    method = find_method("zskd")
    request = TransferRequest(40, 16, 3, tmp_path / "b", method.options("best", options), quiet=True)
    same = method.source(digits_teacher, request)
    assert (source.size, source.batch_size, source.fingerprint) == (40, 16, same.fingerprint)
    draws = torch.Generator().manual_seed(0)
    assert torch.equal(source.batch(0, draws), same.batch(0, draws))
    before = (tmp_path / "a" / "manifest.json").stat().st_mtime_ns
    transfer_source(digits_teacher, tmp_path / "a", 40, batch_size=16, seed=3, quiet=True, **options)
    assert (tmp_path / "a" / "manifest.json").stat().st_mtime_ns == before  # taken up, not made again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "zsdk"}, "no method 'zsdk'.*Did you mean.*'zskd'"),
        ({"preset": "worst"}, "zskd: preset: zskd has paper, author-code, best, not 'worst'"),
        ({"synthesis": {"max_step": 3}}, "zskd: unknown key 'synthesis.max_step'; did you mean 'max_steps'"),
    ],
)
def test_mistakes_in_that_call_are_told(digits_teacher, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        transfer_source(digits_teacher, tmp_path / "a", 40, **options)
    assert not (tmp_path / "a").exists()
