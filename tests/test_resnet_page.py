"""The page on a ResNet quotes the record of its own run. tests/site/test_shown_commands.py runs its lines."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from zskd_nni.recipes.load import load_recipe

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resnet_page", ROOT / "benchmarks" / "resnet_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figures_are_those_of_the_record(script: ModuleType) -> None:
    page, record = script.PAGE.read_text(), json.loads(script.RECORD.read_text())
    assert script.with_table(page, record) == page
    for name, value in record["accuracy"].items():
        assert f" {value:.2f} " in page, name
    damaged = page.replace(f"| student | {record['accuracy']['student']:.2f} |", "| student | 12.34 |")
    assert damaged != page == script.with_table(damaged, record)
    assert f"accuracy {record['accuracy']['teacher']:.2f} % on 360 test images" in page
    with pytest.raises(SystemExit, match="end of the table"):
        script.with_table("no table", record)


def test_the_record_is_of_the_recipe_on_the_page(script: ModuleType, tmp_path: Path) -> None:
    page, record = script.PAGE.read_text(), json.loads(script.RECORD.read_text())
    (shown,) = re.findall(r'```yaml title="my-resnet.yml"\n(.*?)```', page, re.DOTALL)
    (tmp_path / "my-resnet.yml").write_text(shown)
    assert yaml.safe_load(shown)["transfer"]["size"] == record["impressions"]["impressions"]
    loaded = load_recipe(str(tmp_path / "my-resnet.yml")).recipe.model_dump(mode="json")
    for section in ("transfer", "compression", "distillation", "evaluation", "controls", "seed"):
        assert json.loads(json.dumps(loaded[section])) == record["recipe"][section], section
