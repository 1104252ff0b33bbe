"""The rivals that are written here do what their papers say, and their rows survive a stop."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_on_the_path() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture(params=["alexnet", "lenet5", "resnet20"])
def pair(request: pytest.FixtureRequest):
    return module("rivals.pairs").PAIRS[request.param]


def logits(network: nn.Module, pair) -> torch.Tensor:
    spec = module("rivals.pairs").teacher_of(pair).spec
    with torch.no_grad():
        return network.eval()(spec.normalise(spec.uniform_noise(8, 3)))


def test_equalisation_keeps_what_the_network_computes_and_equalises(pair) -> None:
    teacher = module("rivals.pairs").teacher_of(pair)
    network = teacher.student().requires_grad_(False)
    before = logits(network, pair)
    equalised = [link.only for link in pair.links if link.only]
    for link in equalised:
        module("rivals.quantization").equalise(network, *link)
    assert torch.allclose(logits(network, pair), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    for _, _, reader in equalised:
        changed, weight = network.get_submodule(reader).weight, teacher.model.get_submodule(reader).weight
        assert not torch.equal(changed, weight)


def test_folding_of_equal_channels_changes_nothing(pair) -> None:
    """A network in which every channel of the half one stands twice folds back into it."""
    pruning, pairs = module("rivals.pruning"), module("rivals.pairs")
    wide = copy.deepcopy(pairs.teacher_of(pair).model).requires_grad_(False)
    widths = [len(wide.get_submodule(name).weight) for name in pair.convolutions]
    makers = [maker for link in pair.links for maker in link.makers if maker[0] in pair.convolutions]
    for layer, norm in makers:
        statistics = wide.get_submodule(norm).state_dict().values() if norm else ()
        for value in (*wide.get_submodule(layer).parameters(), *statistics):
            if value.ndim:
                value[1::2] = value[0::2]
    expected = logits(wide, pair)
    small = pruning.folded(pair, wide, 0)
    assert [len(small.get_submodule(name).weight) for name in pair.convolutions] == [width // 2 for width in widths]
    # The response normalisation of AlexNet sees other neighbours in the narrower network.
    assert torch.allclose(logits(small, pair), expected, atol=2e-2 * float(expected.abs().max()))


def test_ranges_of_batch_norm_hold_its_outputs(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    quantization, pairs = module("rivals.quantization"), module("rivals.pairs")
    monkeypatch.setattr(quantization, "NOISE", 20)
    network = pairs.teacher_of(pair).student().requires_grad_(False)
    ranges = quantization.input_ranges(network, pair, "W8A8", 0)
    assert set(ranges) == set(pair.layers) and all(low < high for low, high in ranges.values())
    inputs = quantization._noise_inputs(network, pair, 0)
    for name, value in inputs.items():
        assert value.min() >= ranges[name][0] - 1e-4, name  # where a ReLU ends, whatever the images
        # The upper end is that of the images of the training, and noise is none of them.
        assert (value <= ranges[name][1] + 1e-4).float().mean() > 0.95, name


def test_rows_of_ours_have_options_or_not_whatever_the_recipe_has(pair) -> None:
    recipes = module("rivals.recipes")
    for task in pair.quantized:
        assert not recipes.config_with(pair, task, recipes.PLAIN).refines
        with_options = recipes.config_with(pair, task, recipes.OPTIONS)
        assert (with_options.ranges, with_options.rounding) == ("least_error", "joint") and with_options.correct_biases


def test_rows_are_kept_in_order_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = module("compare_rivals")
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    for task, rival, value in (("W4A4", "ours", 1.0), ("half", "nni", 2.0), ("W4A4", "ours", 3.0)):
        script.Records("lenet5").add({"task": task, "rival": rival, "seed": 0, "accuracy": value})
    rows = script.Records("lenet5")
    assert [row["accuracy"] for row in rows.rows] == [2.0, 3.0]
    assert rows.has("nni", "half", 0) and not rows.has("nni", "half", 1)


def test_the_page_says_when_a_rival_is_ahead() -> None:
    sys.path.insert(0, str(ROOT / "docs" / "_hooks"))
    try:
        page = module("rivals_page")
    finally:
        sys.path.remove(str(ROOT / "docs" / "_hooks"))
    rows = [
        {"task": "W4A4", "rival": rival, "seed": 0, "accuracy": value, "seconds": 1.0}
        for rival, value in (("ours", 80.0), ("squant", 85.0), ("real", 99.0))
    ]
    assert "ours is **behind it** by 5.00" in page.standing(rows)
    rows.append({"task": "W4A4", "rival": "ours-options", "seed": 0, "accuracy": 86.0, "seconds": 1.0})
    assert "**behind it** by 5.00; ours with the options is ahead of it by 1.00" in page.standing(rows)
