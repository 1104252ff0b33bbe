"""The README says what the result files say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def benchmark_script():
    spec = importlib.util.spec_from_file_location("packaged_recipes", ROOT / "benchmarks" / "packaged_recipes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_that_of_the_result_files():
    names = [line.split("`")[1] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert names, "the README has no table of results"
    assert benchmark_script().table(names) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda path: path.stem)
def test_results_have_three_seeds_controls_and_provenance(path):
    records = json.loads(path.read_text())
    assert [record["provenance"]["seed"] for record in records] == [0, 1, 2]
    for record in records:
        assert set(record["controls"]) == {"none", "noise"}
        assert record["provenance"]["commit"]
        assert record["provenance"]["selected_on"]
        assert record["accuracy"]["student"] is not None
