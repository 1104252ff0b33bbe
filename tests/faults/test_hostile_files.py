"""Malicious files are refused, and nothing in them runs. A canary is a folder that must not appear."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import is_one_sentence, make_store
from test_mutations import command
from torch import nn

from zskd_nni.data.datasets import load_images
from zskd_nni.models import zoo
from zskd_nni.models.build import build_network
from zskd_nni.models.serialization import load_network, save_network
from zskd_nni.recipes.load import load_recipe, recipe_text
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json, write_atomic
from zskd_nni.runtime.locks import only_writer
from zskd_nni.runtime.tensors import load_sealed, load_tensors, load_weights
from zskd_nni.synthesis import ImpressionStore

RECIPE = "digits-prune50"


@pytest.fixture
def canary(tmp_path: Path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "something in the file was run"


class Canary:
    """A pickle of it makes a folder where it is loaded carelessly."""

    def __init__(self, path: Path, way: str = "mkdir") -> None:
        self.path, self.way = path, way

    def __reduce__(self):
        if self.way == "eval":
            return (eval, (f"__import__('os').mkdir({str(self.path)!r})",))
        if self.way == "system":
            return (os.system, (f"mkdir {self.path}",))
        if self.way == "numpy":
            return (np.load, (str(self.path), None, True))
        if self.way == "getattr":
            return (getattr(os, "mkdir"), (str(self.path),))  # noqa: B009
        return (os.mkdir, (str(self.path),))


WAYS = ("mkdir", "eval", "system", "getattr")


def whole(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def old_format(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def forged(value: object) -> bytes:
    """A sound archive of weights whose pickle was exchanged."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole({"a": torch.zeros(1)}))) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickle.dumps(value, 2) if name.endswith("data.pkl") else old.read(name))
    return buffer.getvalue()


MAKERS: dict[str, Callable[[object], bytes]] = {
    "pickle": lambda value: pickle.dumps(value, 2),
    "new pickle": lambda value: pickle.dumps(value, 5),
    "archive": whole,
    "old archive": old_format,
    "forged archive": forged,
    "inside weights": lambda value: whole({"a": torch.zeros(2), "b": value}),
    "as state_dict": lambda value: whole({"state_dict": {"a": value}}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("maker", MAKERS)
def test_pickles_as_weights(tmp_path: Path, canary: Path, maker: str, way: str) -> None:
    """Under every name, with the flag for PyTorch's format and without."""
    content = MAKERS[maker](Canary(canary, way))
    for name in ("w.pt", "w.safetensors", "w.bin", "w"):
        (tmp_path / name).write_bytes(content)
        for allowed in (False, True):
            with pytest.raises(UserError, match=name):
                load_weights(tmp_path / name, allow_pt=allowed)


@pytest.mark.parametrize("maker", MAKERS)
def test_pickles_as_everything_that_is_read(tmp_path: Path, canary: Path, maker: str) -> None:
    """In the place of shards, checkpoints, masks of transfer sets, descriptions, manifests and data."""
    from zskd_nni.methods.ats.transfer_set import TransferSet

    content = MAKERS[maker](Canary(canary))
    path = tmp_path / "file"
    path.write_bytes(content)
    for load in (load_tensors, load_sealed, read_json, load_network):
        with pytest.raises(UserError):
            load(path)
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(UserError, match="data"):
        load_images(str(tmp_path / "data.npz"))
    make_store(tmp_path / "store", size=20, shard=10)
    (tmp_path / "store" / "shard-00000.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not as written"):
        ImpressionStore.open(tmp_path / "store").images()
    for opened, name in ((ImpressionStore, "manifest.json"), (TransferSet, "set.json")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            opened.open(tmp_path)


@pytest.mark.parametrize("kind", ["object array", "zip of pickles"])
def test_arrays_of_objects_as_data(tmp_path: Path, canary: Path, kind: str) -> None:
    path = tmp_path / "data.npz"
    if kind == "object array":
        np.savez(path, images=np.array([Canary(canary)], dtype=object), labels=np.zeros(1, np.int64))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("images.npy", "labels.npy"):
                archive.writestr(name, pickle.dumps(Canary(canary)))
    with pytest.raises(UserError, match=r"data\.npz"):
        load_images(str(path))


def test_torchvisions_old_files_are_not_unpickled(tmp_path: Path, canary: Path) -> None:
    for folder in ("MNIST/processed", "MNIST/raw", "cifar-10-batches-py"):
        (tmp_path / folder).mkdir(parents=True)
    content = whole((Canary(canary), torch.zeros(1)))
    for name in ("training.pt", "test.pt"):
        (tmp_path / "MNIST/processed" / name).write_bytes(content)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / "MNIST/raw" / name).write_bytes(pickle.dumps(Canary(canary)))
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(Canary(canary)))
    for name in ("mnist", "cifar10"):
        with pytest.raises(UserError, match=name):
            load_images(name, "test", tmp_path)


def test_images_that_are_none_and_images_that_are_too_large(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", 0)
    for content in (b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"P6 999999999 999999999 255\n", bomb, os.urandom(500)):
        (folder / "x.png").write_bytes(content)
        with pytest.raises(UserError, match=r"x\.png cannot be read as an image"):
            load_images(str(tmp_path / "images"))


# safetensors.

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def crafted(content: object, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.parametrize(
    "content",
    [
        crafted({"a": ENTRY}, length=2**64 - 1),
        crafted({"a": ENTRY}, length=100_000_001),
        crafted({"a": {**ENTRY, "shape": [-2]}}),
        crafted({"a": {**ENTRY, "shape": [2**63]}}),
        crafted({"a": {**ENTRY, "shape": [[2]]}}),
        crafted({"a": {**ENTRY, "data_offsets": [0, 8, 16]}}),
        crafted({"a": {**ENTRY, "data_offsets": [-8, 0]}}),
        crafted({"a": {**ENTRY, "data_offsets": [0, 2**64]}}),
        crafted({"a": {**ENTRY, "dtype": "__import__('os')"}}),
        crafted({"a": {**ENTRY, "file": "/etc/passwd"}}, b""),
        crafted(b'{"a":' * 2000 + b"1" + b"}" * 2000),
        crafted(b'{"a": ' + json.dumps(ENTRY).encode() + b', "a": ' + json.dumps(ENTRY).encode() + b"}", b"\0" * 9),
        crafted({"__metadata__": {"a": 1}, "a": ENTRY}),
        crafted({"__metadata__": [], "a": ENTRY}),
    ],
)
def test_crafted_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    for load in (load_tensors, load_weights, load_sealed):
        with pytest.raises(UserError, match=r"x\.safetensors"):
            load(tmp_path / "x.safetensors")


def test_a_sparse_file_of_a_terabyte_is_no_shard(tmp_path: Path) -> None:
    with open(tmp_path / "x.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 2**39))
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"x\.safetensors"):
        load_tensors(tmp_path / "x.safetensors")


# YAML and JSON.

TAGS = [
    "!!python/object/apply:os.mkdir ['{canary}']",
    "!!python/object/new:os.mkdir ['{canary}']",
    "!!python/name:os.mkdir",
    "!!python/module:os",
    "!!python/object:helpers.SmallNet {{}}",
    "!!python/tuple [1]",
    "!!python/object/apply:eval [\"__import__('os').mkdir('{canary}')\"]",
    "!os.mkdir '{canary}'",
    "!!binary aGVsbG8=",
    "!!set {{a, b}}",
    "!!timestamp 2001-01-01",
    "!!omap [a: 1]",
    "{{? [1, 2] : 3}}",
    "{{? !!binary aGVsbG8= : 3}}",
]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("place", ["name", "teacher.arguments.x", "compression.pruning.config_list.0.x", "scales"])
def test_tags_in_recipes(tmp_path: Path, canary: Path, tag: str, place: str) -> None:
    value = tag.format(canary=canary)
    with pytest.raises(UserError, match=place.split(".")[0]) as caught:
        load_recipe(RECIPE, [f"{place}={value}"])
    assert "\n" not in str(caught.value)
    (tmp_path / "recipe.yml").write_text(recipe_text(RECIPE)[0] + f"\nselected_on: {value}\n")
    with pytest.raises(UserError, match=r"recipe\.yml"):
        load_recipe(str(tmp_path / "recipe.yml"))


def laughs() -> str:
    """A few hundred bytes that stand for 9^12 values."""
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return "\n".join(lines)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text",
    [
        laughs(),
        "name: &a [*a]",
        "compression: &a {pruning: *a}",
        "name: " + "[" * 5000,
        "name: " + "{a: " * 5000,
        "a: [" + "1, " * 200_000 + "]",
        "? " * 3000,
        "- " * 3000,
    ],
    ids=["laughs", "itself", "itself in itself", "deep list", "deep mapping", "long", "keys", "lists"],
)
def test_recipes_that_are_bombs(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yml").write_text(text)
    with pytest.raises(UserError, match=r"recipe\.yml"):
        load_recipe(str(tmp_path / "recipe.yml"))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, '"\\ud800', "\x00", "NaN,"])
def test_json_that_is_a_bomb(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


# Python objects that a recipe or a description may not name.

OBJECTS = [
    ("os:system", {"command": "mkdir {canary}"}),
    ("os:mkdir", {"path": "{canary}"}),
    ("posix:mkdir", {"path": "{canary}"}),
    ("subprocess:run", {"args": ["mkdir", "{canary}"]}),
    ("subprocess:Popen", {"args": ["mkdir", "{canary}"]}),
    ("builtins:exec", {"source": "import os; os.mkdir('{canary}')"}),
    ("builtins:eval", {}),
    ("pathlib:Path", {}),
    ("importlib:import_module", {"name": "antigravity"}),
    ("runpy:run_path", {"path_name": "{folder}/evil.py"}),
    ("pickle:loads", {}),
    ("torch:load", {"f": "{folder}/evil.pt", "weights_only": False}),
    ("torch.serialization:load", {"f": "{folder}/evil.pt", "weights_only": False}),
    ("torch.hub:load", {"repo_or_dir": "{folder}", "model": "evil", "source": "local"}),
    ("torch.jit:load", {"f": "{folder}/evil.pt"}),
    ("joblib:load", {"filename": "{folder}/evil.pkl"}),
    ("numpy:load", {"file": "{folder}/evil.npy", "allow_pickle": True}),
    ("yaml:unsafe_load", {"stream": "!!python/object/apply:os.mkdir ['{canary}']"}),
    ("nni:load", {"fp": "{folder}/evil.json"}),
    ("sklearn.datasets:load_files", {"container_path": "{folder}"}),
    ("zskd_nni.runtime.files:make_folder", {"path": "{canary}"}),
    ("net.py:system", {"command": "mkdir {canary}"}),
    ("net.py:load", {"f": "{folder}/evil.pt", "weights_only": False}),
    ("net.py:half", {"command": "mkdir {canary}"}),
    ("net.py:Path.mkdir", {}),
    ("net.py:os", {}),
]
NET = (
    "import os\nfrom functools import partial\nfrom os import system\nfrom torch import load\nhalf = partial(system)\n"
)


@pytest.mark.parametrize(("reference", "arguments"), OBJECTS, ids=[reference for reference, _ in OBJECTS])
def test_python_objects_that_make_no_networks(tmp_path: Path, canary: Path, reference: str, arguments: dict) -> None:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    (tmp_path / "hubconf.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    (tmp_path / "evil.pt").write_bytes(whole(Canary(canary)))
    for name in ("evil.pkl", "evil.npy"):
        (tmp_path / name).write_bytes(pickle.dumps(Canary(canary)))
    text = json.dumps(arguments).replace("{canary}", str(canary)).replace("{folder}", str(tmp_path))
    with pytest.raises(UserError, match=r"part of Python itself|is not a network factory|has no|could not be built"):
        build_network(reference, json.loads(text), tmp_path)
    section = {"model": reference, "arguments": json.loads(text), "input": {"shape": [1, 8, 8]}}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump({**yaml.safe_load(recipe_text(RECIPE)[0]), "teacher": section}))
    with pytest.raises(UserError):
        load_recipe(str(tmp_path / "recipe.yml")).teacher()
    # A description of a network names its factory too, and looks more like data than a recipe does.
    save_network(zoo.lenet5(), "zoo:lenet5", {}, tmp_path / "n.safetensors", tmp_path / "n.json")
    description = {**json.loads((tmp_path / "n.json").read_text()), "network": reference, "arguments": json.loads(text)}
    (tmp_path / "n.json").write_text(json.dumps(description))
    with pytest.raises(UserError):
        load_network(tmp_path / "n.json")


def test_factories_that_somebody_means_are_taken(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from functools import partial\nfrom torch import nn\nfrom torchvision.models import resnet18\n"
        "def plain(width=3): return nn.Linear(4, width)\nhalf = partial(plain, width=2)\n"
        "class Maker:\n    def __call__(self): return nn.Linear(4, 5)\nmaker = Maker()\n"
    )
    widths = [build_network(f"net.py:{name}", {}, tmp_path).out_features for name in ("plain", "half", "maker")]
    assert widths == [3, 2, 5]
    for name in ("net.py:resnet18", "torchvision.models:resnet18", "torchvision.models.resnet:resnet18"):
        assert isinstance(build_network(name, {"num_classes": 3}, tmp_path), nn.Module)
    assert isinstance(build_network("helpers:small_network"), nn.Module)


@pytest.mark.parametrize(
    "change",
    [
        "compression.pruning.pruner=os.system",
        "compression.pruning.pruner=__class__",
        "compression.pruning.schedule={name: '../x', interval: 1, total_times: 1}",
        "compression.quantization.quantizer=os:system",
        "compression.quantization.quantizer=Quantizer",
        "compression.distiller={name: 'os:system', config_list: [{a: 1}]}",
        "transfer.method=os:system",
        "transfer.method=../zskd",
        "teacher.model=torchvision:__import__",
        "teacher.model=zoo:__class__",
        "teacher.weights=zoo:../../secret",
        "teacher.weights=zoo:..",
        "teacher.model=zoo:../lenet5",
    ],
)
def test_names_of_something_else(change: str) -> None:
    from zskd_nni.pipeline import Run

    with pytest.raises(UserError):
        Run(load_recipe(RECIPE, [change]), "never-made", quiet=True)
    assert not Path("never-made").exists()


@pytest.mark.parametrize("key", ["weights", "type", "kernel_size", "path"])
def test_descriptions_that_lead_elsewhere(tmp_path: Path, canary: Path, key: str) -> None:
    save_network(zoo.lenet5_half(), "zoo:lenet5", {}, tmp_path / "n.safetensors", tmp_path / "n.json")
    save_network(zoo.lenet5_half(), "zoo:lenet5", {}, tmp_path.parent / "o.safetensors", tmp_path / "o.json")
    description = json.loads((tmp_path / "n.json").read_text())
    layer = description["layers"]["conv1"]
    if key == "weights":
        wrong = [{**description, "weights": name} for name in ("../o.safetensors", "/etc/passwd", "..", "", "a/b", 5)]
    elif key == "type":
        wrong = [
            {**description, "layers": {"conv1": {**layer, "type": kind}}} for kind in ("os.system", "__import__", "", 5)
        ]
    elif key == "kernel_size":
        values = (10**9, [10**6, 10**6], "x", {"a": 1}, None)
        wrong = [{**description, "layers": {"conv1": {**layer, key: value}}} for value in values]
    else:
        names = ("__class__", "conv1.__class__.x", "..", ".", "forward", "_modules.conv1")
        wrong = [{**description, "layers": {name: layer}} for name in names]
    for content in wrong:
        (tmp_path / "n.json").write_text(json.dumps(content))
        with pytest.raises(UserError):
            load_network(tmp_path / "n.json")


# Links and names in folders.


def test_links_in_an_output_folder_are_not_followed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / ".lock").symlink_to(mine)
    with pytest.raises(UserError, match=r"\.lock is a link"), only_writer(folder):
        pass
    (folder / ".lock").unlink()
    pid = os.getpid()
    for name in ("manifest.json", "shard-00000.safetensors"):
        (folder / f".{name}.{pid}.tmp").symlink_to(mine)
    (folder / ".folder.1.tmp").mkdir()
    (folder / ".mine.tmp").write_text("precious")
    make_store(folder, size=20, shard=10)
    write_atomic(folder / "more", "x")
    assert mine.read_text() == (folder / ".mine.tmp").read_text() == "precious"
    assert (folder / ".folder.1.tmp").is_dir()
    (folder / f".more.{pid}.tmp").symlink_to(mine)
    write_atomic(folder / "more", "y")
    assert mine.read_text() == "precious"
    assert (folder / "more").read_text() == "y"
    (folder / "manifest.json").rename(tmp_path / "manifest.json")
    (folder / "manifest.json").symlink_to(tmp_path / "manifest.json")
    (folder / "shard-00000.safetensors").unlink()
    before = (tmp_path / "manifest.json").read_bytes()
    make_store(folder, size=20, shard=10)
    assert (tmp_path / "manifest.json").read_bytes() == before, "what the link leads to is read, not written"


def test_two_names_in_one_folder_have_a_lock_each(tmp_path: Path) -> None:
    with only_writer(tmp_path, "a"), only_writer(tmp_path, "b"):
        (tmp_path / ".b.json.1.tmp").write_text("half")
        with pytest.raises(UserError, match="Another run"), only_writer(tmp_path, "a"):
            pass
    with only_writer(tmp_path, "a"):
        assert (tmp_path / ".b.json.1.tmp").exists()
    with only_writer(tmp_path, "b"):
        assert not (tmp_path / ".b.json.1.tmp").exists()


@pytest.mark.parametrize("name", ["x" * 5000 + ".safetensors", "a\0b.safetensors", "/dev/zero", "/dev/stdin", "loop"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = tmp_path / name
    for load in (load_tensors, load_weights, load_sealed):
        with pytest.raises(UserError):
            load(path)
    content = yaml.safe_load(recipe_text(RECIPE)[0])
    content["teacher"]["weights"] = name
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError):
        load_recipe(str(tmp_path / "recipe.yml")).teacher()


def test_the_command_line_says_so_in_one_sentence(tmp_path: Path, canary: Path) -> None:
    content = {**yaml.safe_load(recipe_text(RECIPE)[0])}
    content["teacher"] = {"model": "os:mkdir", "arguments": {"path": str(canary)}, "input": {"shape": [1, 8, 8]}}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(content))
    code, error = command(["compress", "recipe.yml", "--out", "out"], tmp_path)
    assert code == 2
    assert is_one_sentence(error), error
    assert "part of Python itself" in error
    assert not (tmp_path / "out").exists()


def test_the_canary_sings_where_nobody_takes_care(tmp_path: Path) -> None:
    """The attacks are real: without this package's care each of these ways works."""
    for way in WAYS:
        pickle.loads(pickle.dumps(Canary(tmp_path / way, way)))
        assert (tmp_path / way).is_dir()
    torch.load(io.BytesIO(forged(Canary(tmp_path / "torch"))), weights_only=False)
    assert (tmp_path / "torch").is_dir()
