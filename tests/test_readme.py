"""The README has the figures of the result files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from zskd_nni.models.onnx_export import run_onnx
from zskd_nni.models.teacher import Teacher
from zskd_nni.models.zoo import wrn
from zskd_nni.recipes.load import load_recipe

ROOT = Path(__file__).resolve().parent.parent


def benchmark_script(name="packaged_recipes"):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_that_of_the_result_files():
    script, text = benchmark_script(), (ROOT / "README.md").read_text()
    assert script.with_table(text) == text, "python benchmarks/packaged_recipes.py --readme writes the present table"
    rows = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert rows[0].startswith("cifar10-") and rows[-1].startswith("digits-")
    assert {row for row in rows if row.startswith("cifar10-")} == {
        path.stem for path in script.recipe_results() if path.stem.startswith("cifar10-")
    }
    figure = next(line for line in text.splitlines() if line.startswith("| `")).split(" | ")[2]
    assert script.with_table(text.replace(figure, "99.99")) == text  # what is wrong is written anew
    with pytest.raises(SystemExit, match="end of the table"):
        script.with_table("no table")


def test_a_new_seed_joins_those_of_the_same_recipe_alone():
    def record(seed, steps, accuracy=0):
        return {"recipe": {"seed": seed, "distillation": {"steps": steps}}, "accuracy": accuracy}

    with_record = benchmark_script().with_record
    assert with_record([], record(1, 10)) == [record(1, 10)]
    assert with_record([record(1, 10)], record(0, 10)) == [record(0, 10), record(1, 10)]
    assert with_record([record(0, 10), record(1, 10)], record(1, 10, 9)) == [record(0, 10), record(1, 10, 9)]
    assert with_record([record(0, 10), record(1, 20)], record(2, 10)) == [record(0, 10), record(2, 10)]
    recipe = load_recipe("digits-prune50").recipe.described()
    before = {**recipe, "distillation": {k: v for k, v in recipe["distillation"].items() if k != "dropout"}}
    assert len(with_record([{"recipe": before}], {"recipe": {**recipe, "seed": 1}})) == 2  # dropout is a newer key


@pytest.mark.parametrize("path", benchmark_script().recipe_results(), ids=lambda path: path.stem)
def test_results_have_their_seeds_controls_and_provenance(path):
    records, only_calibrates = json.loads(path.read_text()), benchmark_script().only_calibrates
    # One seed alone has no deviation in the tables; the pages say what that means.
    assert [record["provenance"]["seed"] for record in records] in ([0, 1, 2], [0])
    for record in records:
        assert set(record["controls"]) == set(record["recipe"]["controls"])
        # Where nothing is distilled there is nothing to leave out.
        assert {"none", "noise"} - set(record["controls"]) <= ({"none"} if only_calibrates(record) else set())
        assert record["provenance"]["commit"]
        assert record["provenance"]["selected_on"]
        assert record["accuracy"]["student"] is not None


def test_the_table_of_shrunken_networks_is_that_of_its_result_file(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # where one imports another
    script = benchmark_script("shrinking")
    record = json.loads(script.RESULTS.read_text())
    assert [row["network"] for row in record["networks"]] == list(script.NETWORKS)
    assert script.DOCUMENT.read_text() == script.document(record)
    for row in record["networks"]:
        assert row["max_logit_difference"] < 1e-4
        assert row["parameters"]["after"] < 0.6 * row["parameters"]["before"]
        assert row["onnx_bytes"]["after"] < 0.6 * row["onnx_bytes"]["before"]
        assert row["provenance"]["commit"] and not row["provenance"]["commit"].endswith("+changes")
    shrunk = [row for row in record["families"] if "after" in row]
    assert len(shrunk) >= 0.9 * len(record["families"])
    for row in shrunk:
        assert row["max_logit_difference"] < 1e-4, row["network"]
    for row in record["families"]:
        assert "traceback" not in row, row["network"]


def example_of(page):
    (example,) = (ROOT / page).read_text().split("```python\n")[1:]
    return example.split("```")[0]


def run_smaller(example, sizes, names):
    """The page's own code; only the sizes are smaller."""
    for size, smaller in sizes.items():
        assert size in example
        example = example.replace(size, smaller)
    exec(example, names)


def test_the_example_in_python_runs_as_it_stands(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    example, names = example_of("README.md"), {}
    assert len(example.splitlines()) <= 12
    run_smaller(example, {"size=8000": "size=60", "steps=2000": "steps=4", "steps=500": "steps=12"}, names)
    assert "Nothing brings a loss" not in caplog.text  # else every score is 0, and the last channels go
    assert (tmp_path / "impressions" / "manifest.json").exists()
    teacher, pruned = names["teacher"], names["pruned"].network
    assert pruned.conv1.out_channels == teacher.model.conv1.out_channels // 2
    images = torch.rand(3, 1, 32, 32)
    answers = run_onnx("student.onnx", images)
    torch.testing.assert_close(answers, pruned(images).detach(), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(answers, teacher(images), atol=1e-2)
    assert run_onnx("student-int8.onnx", images).shape == (3, 10)
    assert Path("student-int8.onnx").stat().st_size < 0.5 * Path("student.onnx").stat().st_size


def test_the_example_prunes_as_the_recipe_does(monkeypatch, tmp_path):
    """Scoring moves no weight: with no step under the masks, what is left of the student is the teacher's."""
    monkeypatch.chdir(tmp_path)
    example, names = example_of("README.md"), {}
    run_smaller(example.split("export_onnx(p")[0], {"size=8000": "size=60", "steps=2000": "steps=0"}, names)
    kept = {tuple(row) for row in names["teacher"].model.conv1.weight.flatten(1).tolist()}
    left = [tuple(row) for row in names["pruned"].network.conv1.weight.flatten(1).tolist()]
    assert len(left) == len(kept) // 2
    assert kept.issuperset(left)


@pytest.mark.parametrize("network", [None, lambda: wrn(depth=10, width=1, in_channels=1)], ids=["plain", "residual"])
def test_the_example_with_classes_of_nni_runs(tmp_path, monkeypatch, caplog, network):
    """And with a residual network in the place of the one it loads."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/howto/prune-and-quantize.md").read_text()
    example, names = page.split("```python\n")[1].split("```")[0], {}
    if network is not None:
        names["teacher"] = Teacher(network(), (1, 32, 32))
        example = example.replace('teacher = load_teacher("lenet5-mnist")\n', "")
    sizes = {"size=8000": "size=60", "steps=2000": "steps=4", "training_steps=300": "training_steps=2"}
    run_smaller(example, sizes, names)
    assert "Nothing brings a loss" not in caplog.text  # else every score is 0, and the last channels go
    assert isinstance(names["distiller"], names["ZeroShotDistiller"])
    model = names["teacher"].model
    assert names["small"].conv1.out_channels == model.conv1.out_channels // 2
    weights = dict(model.named_parameters())
    assert any(not value.equal(weights[name]) for name, value in names["student"].named_parameters())
    assert (tmp_path / "impressions" / "manifest.json").exists()
