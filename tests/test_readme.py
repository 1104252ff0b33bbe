"""The README says what the result files say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from zskd_nni.models.zoo import wrn

ROOT = Path(__file__).resolve().parent.parent


def benchmark_script(name="packaged_recipes"):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def calibrated_only(record):
    compression = record["recipe"]["compression"]
    return (
        record["recipe"]["student"] is None
        and compression["pruning"] is None
        and compression["quantization"]["quantizer"] == "PtqQuantizer"
    )


def test_the_table_is_that_of_the_result_files():
    names = [line.split("`")[1] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert names, "the README has no table of results"
    assert benchmark_script().table(names) in (ROOT / "README.md").read_text()


def test_a_new_seed_joins_those_of_the_same_recipe_alone():
    def record(seed, steps, accuracy=0):
        return {"recipe": {"seed": seed, "distillation": {"steps": steps}}, "accuracy": accuracy}

    with_record = benchmark_script().with_record
    assert with_record([], record(1, 10)) == [record(1, 10)]
    assert with_record([record(1, 10)], record(0, 10)) == [record(0, 10), record(1, 10)]
    assert with_record([record(0, 10), record(1, 10)], record(1, 10, 9)) == [record(0, 10), record(1, 10, 9)]
    assert with_record([record(0, 10), record(1, 20)], record(2, 10)) == [record(0, 10), record(2, 10)]


@pytest.mark.parametrize("path", benchmark_script().recipe_results(), ids=lambda path: path.stem)
def test_results_have_three_seeds_controls_and_provenance(path):
    records = json.loads(path.read_text())
    assert [record["provenance"]["seed"] for record in records] == [0, 1, 2]
    for record in records:
        assert set(record["controls"]) == set(record["recipe"]["controls"])
        # Where nothing is distilled there is nothing to leave out.
        assert {"none", "noise"} - set(record["controls"]) <= ({"none"} if calibrated_only(record) else set())
        assert record["provenance"]["commit"]
        assert record["provenance"]["selected_on"]
        assert record["accuracy"]["student"] is not None


def test_the_table_of_shrunken_networks_is_that_of_its_result_file():
    script = benchmark_script("shrinking")
    record = json.loads(script.RESULTS.read_text())
    assert [row["network"] for row in record["networks"]] == list(script.NETWORKS)
    assert script.DOCUMENT.read_text() == script.document(record)
    for row in record["networks"]:
        assert row["max_logit_difference"] < 1e-4
        assert row["parameters"]["after"] < 0.6 * row["parameters"]["before"]
        assert row["onnx_bytes"]["after"] < 0.6 * row["onnx_bytes"]["before"]
        assert row["provenance"]["commit"] and not row["provenance"]["commit"].endswith("+changes")


@pytest.mark.parametrize("network", [None, lambda: wrn(depth=10, width=1, in_channels=1)], ids=["plain", "residual"])
def test_the_example_in_python_runs_as_it_stands(tmp_path, monkeypatch, caplog, network):
    """And with a residual network in the place of the one it builds."""
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    (example,) = [block.split("```")[0] for block in blocks if "ZeroShotDistiller" in block]
    assert "size=8000" in example
    assert "2000" in example
    monkeypatch.chdir(tmp_path)
    before, after = example.split("\nteacher = ")
    names = {}
    if network is None:
        exec(before, names)
    else:
        names["model"] = network()
        after = "\n".join([line for line in before.splitlines() if "import" in line]) + "\nteacher = " + after
    if network is None:
        after = "teacher = " + after
    model = names["model"]
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    channels = model.conv1.out_channels
    # Only the sizes are smaller.
    smaller = after.replace("size=8000", "size=60").replace("2000", "4").replace("300", "2")
    exec(smaller, names)  # the README's own code
    assert "Nothing brings a loss" not in caplog.text  # else every score is 0, and the last channels go
    assert isinstance(names["distiller"], names["ZeroShotDistiller"])
    assert names["small"].conv1.out_channels == channels // 2
    assert any(not value.equal(weights[name]) for name, value in model.named_parameters())
    assert (tmp_path / "impressions" / "manifest.json").exists()
