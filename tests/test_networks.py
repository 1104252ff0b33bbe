"""Naming, building, saving and loading networks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import SmallNet, digits_network, small_network
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zskd_nni.models import zoo
from zskd_nni.models.build import build_network, load_into
from zskd_nni.models.serialization import describe_layer, load_network, save_network
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import sha256_of_file
from zskd_nni.runtime.tensors import load_tensors, save_tensors

FACTORY = """
from torch import nn
class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.layer = nn.Linear(4, width)
    def forward(self, x):
        return self.layer(x)
def not_a_network():
    return 5
def broken():
    raise RuntimeError("on purpose")
constant = 3
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FACTORY)
    return path


# Naming.


def test_every_form_of_a_name(user_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(build_network("zoo:lenet5"), zoo.LeNet5)
    assert build_network("zoo:wrn", {"depth": 16, "width": 1}).fc.in_features == 64
    assert build_network("torchvision:resnet18", {"num_classes": 7}).fc.out_features == 7
    assert isinstance(build_network("torch.nn:Linear", {"in_features": 2, "out_features": 3}), nn.Linear)
    assert build_network(f"{user_file}:Net", {"width": 5}).layer.out_features == 5
    assert build_network("mine.py:Net", base=user_file.parent).layer.out_features == 3
    monkeypatch.chdir(user_file.parent)
    assert build_network("mine.py:Net").layer.out_features == 3


@pytest.mark.parametrize(
    ("reference", "arguments", "message"),
    [
        ("lenet5", {}, "A network is named as zoo:NAME"),
        (":lenet5", {}, "A network is named as"),
        ("zoo:", {}, "A network is named as"),
        ("zoo:lenet", {}, "no network 'lenet'; it has .*lenet5"),
        ("zoo:lenet5", {"classes": 3}, "could not be built with .*classes"),
        ("zoo:wrn", {"depth": 17}, "6 n"),
        ("torchvision:resnet19", {}, "no model 'resnet19'"),
        ("no.such.module:Net", {}, "'no.such.module' cannot be imported"),
        ("torch.nn:Linaer", {}, "has no 'Linaer'"),
        ("torch.nn:Linear", {}, "could not be built"),
        ("math:sqrt", {"x": 3}, "part of Python itself"),
        ("absent.py:Net", {}, "no file"),
        ("mine.py:not_a_network", {}, "returned int, not a network"),
        ("mine.py:broken", {}, "on purpose"),
        ("mine.py:constant", {}, "could not be built"),
        ("mine.py:Absent", {}, "has no 'Absent'"),
    ],
)
def test_wrong_names(user_file: Path, reference: str, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_network(reference, arguments, user_file.parent)


@pytest.mark.parametrize("text", ["def f(:\n", "import no_such_module_here\n", "1 / 0\n"])
def test_files_that_cannot_be_imported(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.py").write_text(text)
    before = set(sys.modules)
    with pytest.raises(UserError, match=r"bad\.py cannot be imported"):
        build_network("bad.py:f", base=tmp_path)
    assert not {name for name in set(sys.modules) - before if name.startswith("zskd_nni_user")}


# Loading weights.


def test_weights_are_loaded_whole() -> None:
    source, target = small_network(1), small_network(2)
    load_into(target, source.state_dict(), "here")
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def test_weights_of_data_parallel_and_without_counters() -> None:
    source, target = small_network(1), small_network(2)
    wrapped = {f"module.{k}": v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    load_into(target, wrapped, "here")
    assert torch.equal(source.head.weight, target.head.weight)


def test_a_network_with_a_part_called_module() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(3, 2)

    source, target = Wrapper(), Wrapper()
    load_into(target, source.state_dict(), "here")
    assert torch.equal(source.module.weight, target.module.weight)
    load_into(target, {f"module.{name}": value for name, value in source.state_dict().items()}, "here")


def test_weights_that_do_not_fit_are_named() -> None:
    network = small_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = dict(small_network(1).state_dict())
    del state["head.bias"]
    state["haed.bias"] = torch.zeros(5)
    state["hidden.weight"] = torch.zeros(2, 2)
    expected = (
        r"in here do not fit.*head\.bias missing; haed\.bias not of this network; hidden\.weight is \[2, 2\], not"
    )
    with pytest.raises(UserError, match=expected):
        load_into(network, state, "here")
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    with pytest.raises(UserError, match=r"and 7 more missing"):
        load_into(network, {}, "here")


# Saving and loading.


def assert_round_trip(network: nn.Module, reference: str, arguments: dict, folder: Path, images: Tensor) -> dict:
    description = folder / "net.json"
    save_network(network, reference, arguments, folder / "net.safetensors", description, extra={"classes": 10})
    loaded = load_network(description)
    assert not any(module.training for module in loaded.modules())
    with torch.no_grad():
        assert torch.equal(loaded(images), network.eval()(images))
    content = json.loads(description.read_text())
    assert content["classes"] == 10
    assert content["sha256"] == sha256_of_file(folder / "net.safetensors")
    return content


def test_plain_networks_round_trip(tmp_path: Path) -> None:
    content = assert_round_trip(digits_network(), "zoo:lenet5", {}, tmp_path, torch.rand(4, 1, 32, 32))
    assert content["layers"] == {}
    network = zoo.wrn(16, 1)
    network.train()(torch.rand(8, 3, 32, 32))
    assert_round_trip(network, "zoo:wrn", {"depth": 16, "width": 1}, tmp_path, torch.rand(4, 3, 32, 32))


def test_shrunken_networks_round_trip(tmp_path: Path) -> None:
    network = zoo.lenet5()
    network.conv1 = nn.Conv2d(1, 2, 5)
    network.conv2 = nn.Conv2d(2, 7, 5, bias=False)
    network.fc1 = nn.Linear(7 * 25, 33)
    network.fc2 = nn.Linear(33, 84, bias=False)
    content = assert_round_trip(network, "zoo:lenet5", {}, tmp_path, torch.rand(4, 1, 32, 32))
    assert sorted(content["layers"]) == ["conv1", "conv2", "fc1", "fc2"]


def test_shrunken_normalisation_and_nested_layers_round_trip(tmp_path: Path) -> None:
    network = zoo.wrn(16, 1)
    block = network.group2[0]
    block.conv1 = nn.Conv2d(16, 9, 3, stride=2, padding=1, bias=False)
    block.bn2 = nn.BatchNorm2d(9, eps=1e-3, momentum=0.02)
    block.conv2 = nn.Conv2d(9, 32, 3, padding=1, bias=False)
    network.train()(torch.rand(8, 3, 32, 32))
    arguments = {"depth": 16, "width": 1}
    content = assert_round_trip(network, "zoo:wrn", arguments, tmp_path, torch.rand(4, 3, 32, 32))
    assert sorted(content["layers"]) == ["group2.0.bn2", "group2.0.conv1", "group2.0.conv2"]
    assert load_network(tmp_path / "net.json").group2[0].bn2.momentum == 0.02


LAYERS = [
    nn.Linear(3, 4, bias=False),
    nn.Conv1d(4, 6, 3, groups=2),
    nn.Conv2d(4, 6, (3, 5), stride=(1, 2), padding=(1, 0), dilation=2, padding_mode="reflect"),
    nn.Conv2d(4, 6, 3, padding="same"),
    nn.Conv3d(2, 3, 3),
    nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2, dilation=3),
    nn.BatchNorm1d(5, affine=False),
    nn.BatchNorm2d(5, eps=1e-3, momentum=None, track_running_stats=False),
    nn.InstanceNorm2d(5, affine=True),
    nn.LayerNorm((4, 5), elementwise_affine=False),
    nn.GroupNorm(2, 6),
    nn.PReLU(3),
]


class Holder(nn.Module):
    """The factory makes a layer of another size in the place of each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in LAYERS)


@pytest.mark.parametrize("index", range(len(LAYERS)), ids=[type(layer).__name__ for layer in LAYERS])
def test_every_kind_of_layer_is_described_whole(tmp_path: Path, index: int) -> None:
    network = Holder()
    network.layers[index] = LAYERS[index]
    save_network(network, "test_networks:Holder", {}, tmp_path / "n.safetensors", tmp_path / "n.json")
    loaded = load_network(tmp_path / "n.json").layers[index]
    assert repr(loaded) == repr(LAYERS[index])
    assert describe_layer(loaded) == describe_layer(LAYERS[index])
    assert loaded.state_dict().keys() == LAYERS[index].state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in LAYERS[index].state_dict().items())


def test_half_and_training_networks_are_saved_as_they_are(tmp_path: Path) -> None:
    network = small_network(dropout=0.5).train()
    save_network(network, "helpers:SmallNet", {"dropout": 0.5}, tmp_path / "n.safetensors", tmp_path / "n.json")
    assert network.training
    loaded = load_network(tmp_path / "n.json")
    assert isinstance(loaded, SmallNet)
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(loaded(images), network.eval()(images))


def test_a_relative_factory_file_is_found_from_the_description(tmp_path: Path, user_file: Path) -> None:
    network = build_network("mine.py:Net", {"width": 4}, user_file.parent)
    out = tmp_path / "out"
    out.mkdir()
    save_network(network, "mine.py:Net", {"width": 4}, out / "n.safetensors", out / "n.json", user_file.parent)
    assert load_network(out / "n.json").layer.out_features == 4
    user_file.unlink()
    assert load_network(out / "n.json").layer.out_features == 4, "its source lies beside it"
    (copied,) = out.rglob("mine.py")
    copied.unlink()
    with pytest.raises(UserError, match=r"no file .*mine\.py"):
        load_network(out / "n.json")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    network = zoo.lenet5()
    network.conv1 = nn.Conv2d(1, 3, 5)
    network.conv2 = nn.Conv2d(3, 16, 5)
    save_network(network, "zoo:lenet5", {}, tmp_path / "n.safetensors", tmp_path / "n.json")
    return tmp_path / "n.json"


def tamper(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "zskd_nni network 2"}, "does not describe a network"),
        ({"weights": "../n.safetensors"}, "name of a file beside it"),
        ({"weights": "/etc/passwd"}, "name of a file beside it"),
        ({"weights": "sub/n.safetensors"}, "name of a file beside it"),
        ({"weights": ".."}, "beside it|no file"),
        ({"weights": ""}, "beside it|no file"),
        ({"weights": None}, "beside it"),
        ({"weights": "absent.safetensors"}, "no file"),
        ({"weights": "n.json"}, "not a valid safetensors"),
        ({"sha256": "0" * 64}, "checksum differs"),
        ({"sha256": None}, "checksum differs"),
        ({"network": "zoo:alexnet"}, "do not fit|no layer"),
        ({"network": "zoo:nothing"}, "no network 'nothing'"),
        ({"network": None}, "'network' must be"),
        ({"network": 5}, "'network' must be"),
        ({"arguments": [1]}, "'arguments' must be"),
        ({"arguments": {"num_classes": 11}}, "do not fit"),
        ({"layers": {}}, r"conv1\.weight is \[3, 1, 5, 5\], not \[6, 1, 5, 5\]"),
        ({"layers": [1]}, "'layers' must be"),
        ({"layers": None}, "'layers' must be"),
        ({"layers": {"conv9": {"type": "Linear"}}}, "has no layer 'conv9'"),
        ({"layers": {"": {"type": "Linear", "in_features": 1, "out_features": 1}}}, "layer ''"),
        ({"layers": {"conv1": "x"}}, "'conv1'"),
        ({"layers": {"conv1": {"type": "Sequential"}}}, "not a layer known"),
        ({"layers": {"conv1": {"type": ["x"]}}}, "not a layer known"),
        ({"layers": {"conv1": {"type": "Linear", "in_features": 1, "out_features": 1, "device": "x"}}}, "not a layer"),
        ({"layers": {"conv1": {"type": "Linear", "in_features": "1", "out_features": 1}}}, "cannot be built"),
        ({"layers": {"conv1": {"type": "Linear", "in_features": -1, "out_features": 1}}}, "cannot be built"),
        (
            {"layers": {"conv1": {"type": "Linear", "in_features": 25, "out_features": 3}}},
            "is described with",
        ),
        ({"layers": {"conv1": {"type": "Linear", "in_features": 10**9, "out_features": 10**9}}}, "is described with"),
    ],
)
def test_tampered_descriptions_are_refused(saved: Path, changes: dict[str, object], message: str) -> None:
    load_network(saved)
    tamper(saved, **changes)
    with pytest.raises(UserError, match=message):
        load_network(saved)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.text(max_size=6) | st.just("conv1"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["format", "network", "arguments", "layers", "weights", "sha256"]), json_values, st.booleans())
def test_any_value_anywhere_is_refused_or_loads(saved: Path, key: str, value: object, inside: bool) -> None:
    original = saved.read_text()
    content = json.loads(original)
    if inside:
        content["layers"]["conv1"][key if key != "format" else "out_channels"] = value
    else:
        content[key] = value
    saved.write_text(json.dumps(content))
    try:
        assert isinstance(load_network(saved), nn.Module)
    except UserError:
        pass
    finally:
        saved.write_text(original)


def test_exchanged_and_damaged_weights_are_refused(saved: Path) -> None:
    weights = saved.with_name("n.safetensors")
    tensors, _ = load_tensors(weights)
    tensors["fc3.bias"] += 1
    save_tensors(weights, tensors)
    with pytest.raises(UserError, match="checksum differs"):
        load_network(saved)
    weights.write_bytes(b"")
    with pytest.raises(UserError, match="not a valid safetensors"):
        load_network(saved)
    weights.unlink()
    with pytest.raises(UserError, match="no file"):
        load_network(saved)
