"""Methods of other packages, found by entry points; and real training data as a method that is not data-free."""

from __future__ import annotations

import configparser
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import is_one_sentence, run_cli

from zskd_nni.data.datasets import load_images
from zskd_nni.methods.real import METHOD as REAL
from zskd_nni.methods.registry import (
    TransferRequest,
    default_preset,
    find_method,
    is_data_free,
    method_names,
    preset_for,
    transfer_source,
)
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher, load_teacher
from zskd_nni.models.zoo import alexnet
from zskd_nni.pipeline import Run
from zskd_nni.pipeline.report_html import remarks
from zskd_nni.recipes.load import load_recipe
from zskd_nni.recipes.schema import TransferSection
from zskd_nni.runtime.errors import UserError

SMALL = (
    "transfer.size=200",
    "transfer.held_out=60",
    "compression.pruning.steps=10",
    "compression.quantization.steps=10",
    "distillation.steps=20",
    "controls=[]",
)

# What somebody else writes: one module, one class, one entry point. It is the page's, so that the page is right.
PAGE = Path(__file__).resolve().parents[1] / "docs" / "howto" / "own-method.md"


def shown(title: str) -> str:
    """The file of that name as the page shows it."""
    (text,) = re.findall(rf'^```\w+ title="zskd-stripes/{re.escape(title)}"\n(.*?)^```$', PAGE.read_text(), re.S | re.M)
    return text


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package as pip leaves it: a module, and a .dist-info with its entry points."""
    site = tmp_path / "site"
    info = site / "zskd_stripes-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "zskd_stripes.py").write_text(shown("zskd_stripes.py"))
    toml = configparser.ConfigParser()  # as plain as this one is, an ini file can be read in its place
    toml.read_string(shown("pyproject.toml"))
    named = {key: value.strip('"') for key, value in toml["project"].items()}
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {named['name']}\nVersion: {named['version']}\n")
    points = toml['project.entry-points."zskd_nni.methods"'].items()
    lines = ["[zskd_nni.methods]", *(f"{name} = {where.strip(chr(34))}" for name, where in points)]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
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
        ({"preset": "worst"}, "zskd: preset: zskd has paper, author-code, best, best-colour, not 'worst'"),
        ({"synthesis": {"max_step": 3}}, "zskd: unknown key 'synthesis.max_step'; did you mean 'max_steps'"),
    ],
)
def test_mistakes_in_that_call_are_told(digits_teacher, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        transfer_source(digits_teacher, tmp_path / "a", 40, **options)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("method", "preset"),
    [("zskd", "best"), ("sts", "best"), ("class-impressions", "best"), ("ats", "paper"), ("zskt", "best")],
)
def test_a_recipe_without_a_preset_gets_the_default_of_its_method(method: str, preset: str) -> None:
    assert default_preset(find_method(method)) == preset
    section = TransferSection.model_validate({"method": method})
    assert section.preset == preset
    assert section.options() == find_method(method).options(preset, {})
    assert section == TransferSection.model_validate({"method": method, "preset": preset})


def test_a_method_without_best_starts_with_its_first_preset() -> None:
    class Bare:
        name = "bare"
        presets = ("plain", "rich")

    assert default_preset(Bare()) == "plain"  # type: ignore[arg-type]


def test_the_function_takes_the_default_of_the_method_too(digits_teacher: Teacher, tmp_path: Path) -> None:
    source = transfer_source(digits_teacher, tmp_path / "a", 40, method="ats", batch_size=16, quiet=True)
    paper = transfer_source(digits_teacher, tmp_path / "b", 40, method="ats", preset="paper", batch_size=16, quiet=True)
    assert source.fingerprint == paper.fingerprint
    other = transfer_source(
        digits_teacher, tmp_path / "c", 40, method="ats", preset="unbalanced", batch_size=16, quiet=True
    )
    assert source.fingerprint != other.fingerprint


def test_few_real_images_are_learnt_on_but_for_those_held_out(digits_teacher: Teacher, tmp_path: Path) -> None:
    """A twin that asks for more images than there are leaves over what the other request holds out."""

    def rows(images: torch.Tensor) -> set[bytes]:
        return {image.numpy().tobytes() for image in images}

    learnt = REAL.source(digits_teacher, request(2000, tmp_path, reserved=500)).images
    held_out = REAL.source(digits_teacher, request(500, tmp_path, held_out=True)).images
    assert (len(learnt), len(held_out)) == (937, 500)
    assert not rows(learnt) & rows(held_out)


def test_a_twin_passes_over_the_keys_of_the_method_whose_twin_it_is() -> None:
    changes = ["transfer.method=real", "transfer.data=digits", "transfer.sources=[shapes]", "transfer.fill=none"]
    assert load_recipe("digits-prune50", changes).recipe.transfer.options().data == "digits"


def test_a_report_tells_a_ceiling_from_images_of_something_else_and_what_was_measured_on_what_was_learnt(tmp_path):
    def report(folder: str, *changes: str) -> list[str]:
        loaded = load_recipe("digits-prune50", [*SMALL, "transfer.method=ats", "transfer.preset=unbalanced", *changes])
        return remarks(Run(loaded, tmp_path / folder, quiet=True).compress())

    sources = ["transfer.sources=[digits]", "transfer.split=test", "transfer.size=200", "transfer.held_out=20"]
    learnt, leak = report("a", *sources)[:2]
    assert "real images (ats: digits)" in learnt and "upper limit" not in learnt
    assert "images that the student was trained on" in leak
    assert "No student was trained on these images" not in (tmp_path / "a" / "report.html").read_text()


def test_best_stands_for_the_colour_preset_with_a_teacher_of_colour_images() -> None:
    colour = Teacher(alexnet(), InputSpec((3, 32, 32)))
    zskd, ats = find_method("zskd"), find_method("ats")
    assert preset_for(zskd, "best", colour) == "best-colour"
    assert preset_for(zskd, "best", load_teacher("vgg-cifar10")) == "best-colour"
    assert preset_for(zskd, "paper", colour) == "paper"
    assert preset_for(ats, "unbalanced", colour) == "unbalanced"
    assert preset_for(zskd, "best", Teacher(alexnet(in_channels=1), InputSpec((1, 32, 32)))) == "best"
    assert preset_for(zskd, "best", load_teacher("lenet5-digits")) == "best"
    section = load_recipe("cifar10-prune50").recipe.transfer
    assert section.options().synthesis.start == "mixed"
    assert section.options(colour).synthesis.start == "leaves"
