"""Networks of timm and transformers, and ONNX files as teachers: built, pruned, quantized, saved and read."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import digits_network, random
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni import PruningConfig, QuantizationConfig, load_teacher, prune, quantize
from zskd_nni.compression.quantization.qdq_onnx import export_quantized_onnx
from zskd_nni.data.sources import NoiseSource
from zskd_nni.models.build import build_network
from zskd_nni.models.foreign import network_of_onnx
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.onnx_export import onnx_bytes
from zskd_nni.models.serialization import load_network, save_network
from zskd_nni.models.teacher import Teacher, first_tensor
from zskd_nni.recipes.compression_config import CompressionRun
from zskd_nni.runtime.errors import UserError

DIGITS = InputSpec((1, 32, 32))
COLOUR = InputSpec((3, 32, 32))
HALF = PruningConfig([{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], steps=0)


def needs(package: str) -> Any:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


class Block(nn.Module):
    """What exporters write in many ways: a residual addition, a gate, a mean, a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.gate, self.fc = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1), nn.Linear(16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.hardswish(self.stem(x))
        y = self.norm(self.conv(x))
        x = functional.relu(x + y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True))))
        return self.fc(functional.max_pool2d(x, 8).reshape(len(x), -1))


def block() -> nn.Module:
    torch.manual_seed(0)
    return Block().eval()


def saved(network: nn.Module, spec: InputSpec, folder: Path) -> Path:
    (folder / "teacher.onnx").write_bytes(onnx_bytes(network, spec))
    return folder / "teacher.onnx"


@needs("onnx2torch")
@pytest.mark.parametrize(("make", "spec"), [(digits_network, DIGITS), (block, COLOUR)])
def test_an_onnx_file_is_a_teacher_like_any_other(make: Any, spec: InputSpec, tmp_path: Path) -> None:
    network = make().eval()
    saved(network, spec, tmp_path)
    teacher = load_teacher("teacher.onnx", spec, base=tmp_path)
    images = spec.uniform_noise(5)
    torch.testing.assert_close(teacher(images), network(images), rtol=1e-3, atol=1e-4)
    pruned = prune(teacher.student(), HALF, teacher, None)
    assert pruned.record["parameters_after"] < 0.7 * pruned.record["parameters_before"]
    save_network(pruned.network, "teacher.onnx", {}, tmp_path / "n.safetensors", tmp_path / "n.json", tmp_path)
    (tmp_path / "teacher.onnx").unlink()  # what is saved stands by itself
    assert torch.equal(load_network(tmp_path / "n.json")(images), pruned.network(images))
    config = {"op_types": ["Conv2d", "Linear"], "target_names": ["_input_", "weight"], "quant_dtype": "int8"}
    settings = QuantizationConfig([config], quantizer="PtqQuantizer")
    quantized = quantize(pruned.network, settings, teacher, NoiseSource(spec, 8), run=CompressionRun(quiet=True))
    export_quantized_onnx(quantized, spec, tmp_path / "int8.onnx", spec.uniform_noise(8))
    with pytest.raises(UserError, match="is quantized already"):
        load_teacher("int8.onnx", spec, base=tmp_path)


@needs("onnx2torch")
def test_a_normalisation_in_the_file_is_part_of_the_network(tmp_path: Path) -> None:
    spec = InputSpec((3, 32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    network, images = block(), COLOUR.uniform_noise(3)
    converted = network_of_onnx(saved(network, spec, tmp_path))
    torch.testing.assert_close(converted(images), network(spec.normalise(images)), rtol=1e-3, atol=1e-4)


@needs("onnx2torch")
def test_onnx_files_that_are_no_classifier(tmp_path: Path) -> None:
    import onnx

    path = saved(block(), COLOUR, tmp_path)
    model = onnx.load(str(path))
    model.graph.node[0].op_type = "NonMaxSuppression"
    onnx.save(model, str(tmp_path / "other.onnx"))
    (tmp_path / "damaged.onnx").write_bytes(path.read_bytes()[:200])
    for name, message in {
        "other.onnx": "operator that onnx2torch lacks|cannot be converted", "damaged.onnx": "not a sound|cannot be",
        "absent.onnx": "no file .*absent.onnx",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            build_network(name, base=tmp_path)
    with pytest.raises(UserError, match="ends in a softmax"):
        Teacher(network_of_onnx(saved(nn.Sequential(block(), nn.Softmax(1)), COLOUR, tmp_path)), COLOUR)


def legacy(network: nn.Module, folder: Path, side: int = 16, **options: Any) -> Path:
    """As PyTorch's earlier exporter writes it, of which most files are."""
    path = folder / "legacy.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network.eval(), (torch.rand(1, 3, side, side),), str(path), dynamo=False, **options)
    return path


class Body(nn.Module):
    def __init__(self, body: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)
        self.body = body
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, torch.relu(self.b(torch.relu(self.a(x)))))


def shuffled(net: Any, x: Tensor) -> Tensor:
    count, channels, height, width = x.size()
    x = x.view(count, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(count, -1, height, width)
    return net.fc(x.mean((2, 3)))


def excited(net: Any, x: Tensor) -> Tensor:
    weights = net.gate(x.mean((2, 3))).sigmoid().view(x.size(0), x.size(1), 1, 1)
    return net.fc((x * weights).mean((2, 3)))


BODIES: dict[str, Any] = {
    "Gelu of version 20": lambda: Body(lambda net, x: net.fc(functional.gelu(x).mean((2, 3)))),
    "its approximation": lambda: Body(lambda net, x: net.fc(functional.gelu(x, approximate="tanh").mean((2, 3)))),
    "Mish": lambda: Body(lambda net, x: net.fc(functional.mish(x).mean((2, 3)))),
    "sizes that are computed": lambda: Body(shuffled),
    "sizes in a gate": lambda: Body(excited, gate=nn.Linear(8, 8)),
    "groups of channels": lambda: Body(lambda net, x: net.fc(net.norm(x).mean((2, 3))), norm=nn.GroupNorm(2, 8)),
    "a view of the features": lambda: Body(lambda net, x: net.fc(functional.avg_pool2d(x, 16).view(-1, 8))),
    "an average with dilations": lambda: Body(lambda net, x: net.fc(functional.avg_pool2d(x, 2).mean((2, 3)))),
    "two answers": lambda: Body(lambda net, x: (net.fc(x.mean((2, 3))), x.mean((1, 2, 3)))),
}


@needs("onnx2torch")
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", BODIES)
def test_files_of_the_earlier_exporter(name: str, fixed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, spec = BODIES[name]().eval(), InputSpec((3, 16, 16))
    options = {} if fixed else {"input_names": ["x"], "dynamic_axes": {"x": {0: "N"}}}
    path = legacy(network, tmp_path, opset_version=20, **options)
    teacher = load_teacher(str(path), spec)
    images = spec.uniform_noise(5)  # another number than in the file
    torch.testing.assert_close(teacher(images), first_tensor(network(images)), rtol=1e-3, atol=1e-5)
    pruned = prune(teacher.student(), HALF, teacher, None)
    assert pruned.record["parameters_after"] < 0.7 * pruned.record["parameters_before"]


@needs("onnx2torch")
def test_weights_that_are_equal_and_stored_once(tmp_path: Path) -> None:
    """Batch normalisations that are folded leave equal biases, of which one is stored."""
    import onnx

    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3)]
    network = Body(lambda net, x: net.fc(net.more(x).mean((2, 3))), more=nn.Sequential(*layers))
    path = legacy(network, tmp_path)
    assert "Identity" in {node.op_type for node in onnx.load(str(path)).graph.node}
    images = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(network_of_onnx(path)(images), network(images), rtol=1e-3, atol=1e-5)


@needs("onnx2torch")
def test_weights_in_constants(tmp_path: Path) -> None:
    import onnx

    network = Body(lambda net, x: net.fc(x.mean((2, 3))))
    path = legacy(network, tmp_path)
    model = onnx.load(str(path))
    constants = [onnx.helper.make_node("Constant", [], [each.name], value=each) for each in model.graph.initializer]
    nodes = [*constants, *model.graph.node]
    nodes = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, str(path))
    images = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(network_of_onnx(path)(images), network(images), rtol=1e-3, atol=1e-5)


@needs("timm")
@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "lcnet_035"])
def test_networks_of_timm(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_network(f"timm:{name}", {"num_classes": 5})
    teacher = Teacher(network, InputSpec((3, 64, 64)))
    pruned = prune(teacher.student(), HALF, teacher, None)
    assert pruned.record["parameters_after"] < 0.75 * pruned.record["parameters_before"]
    images = torch.rand((2, 3, 64, 64), generator=random(0))
    save_network(pruned.network, f"timm:{name}", {"num_classes": 5}, tmp_path / "n.safetensors", tmp_path / "n.json")
    assert torch.equal(load_network(tmp_path / "n.json")(images), pruned.network(images))


@needs("timm")
def test_names_and_weights_of_timm() -> None:
    with pytest.raises(UserError, match="timm has no model 'resnet10x'; did you mean"):
        build_network("timm:resnet10x")
    with pytest.raises(UserError, match="weights= is missing"):
        load_teacher("timm:resnet10t", (3, 64, 64))


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("it-ran"),)


@needs("timm")
def test_timm_unpickles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": RunsCode()}, "w.pth")
    with pytest.raises(UserError, match="takes no checkpoint_path; name the file of its weights as weights"):
        build_network("timm:resnet10t", {"checkpoint_path": "w.pth"})
    assert not Path("it-ran").exists()


def folder_of_transformers(folder: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 5}
    network = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, layer_type="basic"))
    network.save_pretrained(folder)
    return folder


@needs("transformers")
def test_a_folder_of_transformers(tmp_path: Path) -> None:
    folder_of_transformers(tmp_path / "mine")
    teacher = load_teacher("transformers:mine", (3, 32, 32), base=tmp_path)
    assert teacher.num_classes == 5
    pruned = prune(teacher.student(), HALF, teacher, None)
    assert pruned.record["parameters_after"] < 0.6 * pruned.record["parameters_before"]
    save_network(pruned.network, "transformers:mine", {}, tmp_path / "n.safetensors", tmp_path / "n.json", tmp_path)
    (tmp_path / "mine" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="weights= is missing"):
        load_teacher("transformers:mine", (3, 32, 32), base=tmp_path)
    (tmp_path / "mine" / "config.json").unlink()
    images = COLOUR.uniform_noise(2)
    assert torch.equal(load_network(tmp_path / "n.json")(images).logits, pruned.network(images).logits)
    with pytest.raises(UserError, match=r"the folder has no config\.json"):
        build_network("transformers:mine", base=tmp_path)


@pytest.mark.parametrize(
    ("package", "reference"),
    [("timm", "timm:resnet10t"), ("transformers", "transformers:mine"), ("onnx2torch", "teacher.onnx")],
)
def test_a_missing_package_is_named(
    package: str, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def absent(name: str, *rest: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return real(name, *rest)

    saved(digits_network(), DIGITS, tmp_path)
    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match=rf"needs the package {package}, .*pip install '\.\["):
        build_network(reference, base=tmp_path)
