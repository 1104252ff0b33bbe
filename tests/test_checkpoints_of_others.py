"""Checkpoints as training scripts write them: the state dict is found, its names are matched, and both are reported."""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from zskd_nni.models.build import load_into, load_named_weights
from zskd_nni.models.state_dicts import fit
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.tensors import is_averaged, load_state_dicts, save_tensors


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


State = dict[str, Any]


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def averaged(state: State) -> State:
    """Another network's weights, to tell the two apart."""
    return {name: value + 1 for name, value in state.items()}


def with_counts(state: State) -> State:
    """As profilers leave a network."""
    return {**state, "total_ops": torch.zeros(1), "fc.total_params": torch.zeros(1, dtype=torch.float64)}


PLAIN: dict[str, Callable[[State], Any]] = {
    "pytorch-cifar": lambda w: {"net": under("module.", w), "acc": 93.1, "epoch": 1},
    "the tutorial": lambda w: {"model_state_dict": w, "optimizer_state_dict": {"state": {}}, "loss": 0.1},
    "torchvision's references": lambda w: {"model": w, "optimizer": adam_of(), "args": argparse.Namespace(lr=0.1)},
    "numpy's numbers": lambda w: {"state_dict": w, "best": np.float64(0.9), "curve": np.arange(3.0), "n": np.int64(3)},
    "paths": lambda w: {"state_dict": w, "args": argparse.Namespace(data=PosixPath("/data"), names=["a"])},
    "torch.compile": lambda w: under("_orig_mod.", w),
    "compiled and parallel": lambda w: under("module._orig_mod.", w),
    "parallel and compiled": lambda w: {"model": under("_orig_mod.module.", w)},
    "Lightning": lambda w: {"state_dict": under("model.", w), "epoch": 3, "hparams": {"lr": 0.1}},
    "Lightning with a loss": lambda w: {"state_dict": {**under("net.", w), "criterion.weight": torch.ones(10)}},
    "a part in parallel": lambda w: {k.replace("features.", "features.module."): v for k, v in w.items()},
    "AveragedModel": lambda w: {**under("module.", w), "n_averaged": torch.tensor(3)},
    "a profiler": with_counts,
    "several levels": lambda w: {"trainer": {"model": {"state_dict": under("module.backbone.", w)}}},
    "without counters": lambda w: {k: v for k, v in w.items() if not k.endswith("num_batches_tracked")},
    "a list": lambda w: [{"epoch": 3}, under("module.", w)],
    "a tuple in a dict": lambda w: {"saved": (3, {"model": w})},
    "a number among the weights": lambda w: {**w, "epoch": 3},
}
AVERAGED: dict[str, Callable[[State], Any]] = {
    "timm": lambda w: {"state_dict": averaged(w), "state_dict_ema": w},
    "torchvision's references": lambda w: {"model": averaged(w), "model_ema": under("module.", w)},
    "ema": lambda w: {"ema": {"decay": 0.9, "module": under("module.", w)}, "model": averaged(w)},
    "in one dict": lambda w: {"state_dict": {**under("model.", averaged(w)), **under("ema_model.module.", w)}},
    "swa": lambda w: {
        "state_dict": averaged(w),
        "swa_state_dict": {**under("module.", w), "n_averaged": torch.ones(1)},
    },
    # Averages of the parameters alone do not make a network: the others do.
    "a shadow of parameters": lambda w: {"ema": {"shadow": {"fc.weight": w["fc.weight"]}}, "model": w},
}


def adam_of() -> State:
    network = Net()
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("name", [*PLAIN, *(f"averaged: {name}" for name in AVERAGED)])
def test_the_weights_are_found(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved, network = Net(), Net()
    make = AVERAGED[name.removeprefix("averaged: ")] if name.startswith("averaged") else PLAIN[name]
    torch.save(make(saved.state_dict()), tmp_path / "w.pt")
    with caplog.at_level(logging.WARNING, "zskd_nni"):
        load_named_weights(network, "w.pt", tmp_path, allow_pt=True)
    assert all(
        torch.equal(value, network.state_dict()[key])
        for key, value in saved.state_dict().items()
        if not key.endswith("num_batches_tracked")
    )
    assert len(caplog.messages) <= 1


def said(content: Any, folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    torch.save(content, folder / "w.pt")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "zskd_nni"):
        load_named_weights(Net(), "w.pt", folder, allow_pt=True)
    return " ".join(caplog.messages)


def test_what_was_found_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = Net().state_dict()
    assert said(weights, tmp_path, caplog) == ""
    assert said({"net": under("module.", weights), "acc": 1.0}, tmp_path, caplog) == (
        "w.pt: the weights are those under 'net'; 'module.' is taken off their names."
    )
    both = said({"state_dict": weights, "state_dict_ema": weights}, tmp_path, caplog)
    assert both == "w.pt: the weights are those under 'state_dict_ema'; the file also has 'state_dict'."
    beside = said({"state_dict": {**under("model.", weights), "loss.weight": torch.ones(1)}}, tmp_path, caplog)
    assert "'model.' is taken off their names; loss.weight are passed over" in beside


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"fc.weight": torch.zeros(2, 2)}}, r"under 'model' do not fit.*fc\.weight is \[2, 2\], not"),
        ({"epoch": 3, "optimizer": {"lr": 0.1}}, "holds no state dict .* but epoch, optimizer; save"),
        ({"optimizer": {"state": {"exp_avg": torch.zeros(3)}}}, "holds no state dict"),
        (np.arange(3.0), "holds no state dict .* but ndarray; save"),
        ({}, "holds nothing; save model"),
        ([], "holds nothing; save model"),
        ([3, "a"], "holds no state dict .* but list; save"),
        ({"fc.weight": np.zeros((10, 8))}, "holds arrays of NumPy in the place of tensors"),
        (Net(), r"an object of \w*test_checkpoints_of_others\.Net"),
        ({"state_dict": {**Net().state_dict(), "extra.weight": torch.zeros(1)}}, r"extra\.weight not of this network"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=message):
        load_named_weights(Net(), "w.pt", tmp_path, allow_pt=True)


@pytest.mark.parametrize(
    ("wrap", "sentence"),
    [
        (nn.utils.parametrizations.weight_norm, "belongs to a parametrisation: .*remove_parametrizations"),
        (nn.utils.parametrizations.spectral_norm, "belongs to a parametrisation: .*remove_parametrizations"),
        (nn.utils.weight_norm, r"fc\.weight_g belongs to weight_norm: .*remove_weight_norm"),
        (nn.utils.spectral_norm, r"belongs to spectral_norm: .*remove_spectral_norm"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"belongs to a mask of .*prune\.remove"),
    ],
)  # fmt: skip
def test_weights_in_parts_are_told_with_what_makes_them_plain(
    wrap: Callable[[nn.Module], nn.Module], sentence: str
) -> None:
    saved = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrap(saved.fc)
    with pytest.raises(UserError, match=sentence):
        load_into(Net(), saved.state_dict(), "w.pt")


class Called:
    """What a pickle calls with which arguments and state, written by hand."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


def test_values_beside_the_weights_are_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float64 whose bytes are also the address of an object, which NumPy would make of such a file."""
    address = (3, "<", None, ("a",), {"a": (Called(np.dtype, ("O",)), 0)}, -1, -1, 0)
    kind = Called(np.dtype, ("f8", False, True), address)
    reconstruct = np.arange(1).__reduce__()[0]
    array = Called(reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), kind, False, b"A" * 8))
    torch.save({"w.x": torch.zeros(1), "array": array, "path": PosixPath("/data")}, tmp_path / "w.pt")
    before, load, read = torch.serialization.get_safe_globals(), torch.load, []

    def watched(*arguments: Any, **named: Any) -> Any:
        read.append(load(*arguments, **named))
        return read[-1]

    monkeypatch.setattr(torch, "load", watched)
    assert list(load_state_dicts(tmp_path / "w.pt", allow_pt=True)[""]) == ["w.x"]
    (content,) = read
    assert not isinstance(content["array"], np.ndarray) and vars(content["array"]) == {}
    assert not isinstance(content["path"], Path) and vars(content["path"]) == {}
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_prefixes_in_safetensors(tmp_path: Path) -> None:
    saved, network = Net(), Net()
    save_tensors(tmp_path / "w.safetensors", under("module.model.", saved.state_dict()))
    assert list(load_state_dicts(tmp_path / "w.safetensors")) == [""]
    load_named_weights(network, "w.safetensors", tmp_path)
    assert torch.equal(saved.fc.weight, network.fc.weight)


def test_a_network_whose_own_names_look_like_wrappers() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Net()
            self.model = nn.Linear(3, 3)

    saved, network = Outer(), Outer()
    for content in (saved.state_dict(), under("module.", saved.state_dict()), under("model.", saved.state_dict())):
        network = Outer()
        load_into(network, content, "here")
        assert torch.equal(saved.module.fc.weight, network.module.fc.weight)
        assert torch.equal(saved.model.weight, network.model.weight)


def test_words_for_averages() -> None:
    assert all(map(is_averaged, ["ema", "state_dict_ema", "model.ema", "ema_model.", "swa_state_dict", "averaged"]))
    assert not any(map(is_averaged, ["model", "schema", "gemma.weight", "avgpool", "state_dict"]))


class Versioned(nn.Module):
    """Asks for the version that it was saved with, as torchvision's MNASNet does."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.seen: Any = None

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        self.seen = metadata.get("version")
        if self.seen not in (1, 2):
            raise ValueError(f"version should be 1 or 2, not {self.seen}")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_versions_of_modules_are_handed_on(tmp_path: Path) -> None:
    saved = nn.Sequential(Versioned(), Versioned())
    older = copy.deepcopy(saved.state_dict())
    older._metadata["1"]["version"] = 1
    torch.save({"state_dict": OrderedDict(older)}, tmp_path / "plain.pt")
    torch.save({"net": older}, tmp_path / "older.pt")
    save_tensors(tmp_path / "w.safetensors", saved.state_dict())
    for name, versions in (("older.pt", (2, 1)), ("plain.pt", (2, 2)), ("w.safetensors", (2, 2))):
        network = nn.Sequential(Versioned(), Versioned())
        load_named_weights(network, name, tmp_path, allow_pt=True)
        assert (network[0].seen, network[1].seen) == versions, name
        assert torch.equal(network[1].fc.weight, saved[1].fc.weight)


def test_a_module_that_refuses_its_weights_is_a_sentence() -> None:
    network = Versioned()
    weights = OrderedDict(network.state_dict())
    weights._metadata = {"": {"version": 3}}  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="cannot be loaded into Versioned: version should be"):
        load_into(network, weights, "here")


def test_the_fit_of_two_networks_in_one_dict_is_the_one_with_less_before_it() -> None:
    weights = Net().state_dict()
    found = fit(weights, {**under("student.net.", weights), **under("net.", weights)})
    assert found.complete and found.prefix == "net." and len(found.beside) == len(weights) - 1


def test_of_two_prefixes_of_one_length_the_first_in_the_file_counts() -> None:
    for first, second in (("student.", "teacher."), ("teacher.", "student."), ("a.", "b."), ("b.", "a.")):
        weights = Net().state_dict()
        assert fit(weights, {**under(first, weights), **under(second, weights)}).prefix == first
