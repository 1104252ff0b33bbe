"""Networks that cannot be teachers are refused with what would be right; so are networks that give probabilities."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.network_kinds import check_kind
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.tensors import load_weights

SPEC = InputSpec((3, 8, 8))
IMAGES = torch.rand(2, 3, 8, 8)


def net(*end: nn.Module, outputs: int = 10) -> nn.Sequential:
    layers = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, outputs))
    return nn.Sequential(*layers, *end).eval()


def within(part: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 1), part)


def quantized() -> nn.Module:
    quantization = torch.ao.quantization
    network = nn.Sequential(quantization.QuantStub(), net(), quantization.DeQuantStub()).eval()
    network.qconfig = quantization.default_qconfig
    prepared = quantization.prepare(network)
    prepared(IMAGES)
    return quantization.convert(prepared)


def prepared() -> nn.Module:
    network = net().train()
    network.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(network)


def integers() -> nn.Module:
    network = net()
    network[4].weight = nn.Parameter(torch.ones(10, 16, dtype=torch.int8), requires_grad=False)
    return network


def on_meta(whole: bool) -> nn.Module:
    network = net()
    return network.to("meta") if whole else nn.Sequential(*network[:4], network[4].to("meta"))


def hooked(kept: Callable[[Tensor], Any]) -> nn.Module:
    network = net()
    network[0].register_forward_hook(lambda module, _, output: setattr(module, "seen", kept(output)))
    network(IMAGES)
    return network


def exported() -> Any:
    return torch.export.export(net(), (IMAGES,))


KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "scripted": (lambda: torch.jit.script(net()), "is TorchScript (RecursiveScriptModule)"),
    "traced": (lambda: torch.jit.trace(net(), IMAGES), "is TorchScript (TopLevelTracedModule)"),
    "scripted part": (lambda: within(torch.jit.script(net())), "is TorchScript at '1'"),
    "scripted function": (lambda: torch.jit.script(scripted_function), "is TorchScript (ScriptFunction)"),
    "exported": (exported, "is an exported program, which"),
    "exported module": (lambda: exported().module(), "is an exported program, which"),
    "unflattened": (lambda: torch.export.unflatten(exported()), "is an exported program, which"),
    "exported part": (lambda: within(exported().module()), "is an exported program at '1'"),
    "dynamic": (lambda: torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}), "quantized already at '4'"),
    "static": (quantized, "quantized already at '0' (Quantize)"),
    "prepared": (prepared, "is prepared for quantization"),
    "integers": (integers, "holds Parameter of torch.int8"),
    "lazy": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), "a lazy layer at '1' (LazyLinear)"),
    "lazy statistics": (lambda: nn.Sequential(nn.LazyBatchNorm2d(), net()), "a lazy layer at '0' (LazyBatchNorm2d)"),
    "meta": (lambda: on_meta(True), "has no weights: 'weight' at '0'"),
    "a part on meta": (lambda: on_meta(False), "has no weights: 'weight' at '4'"),
    "hook": (lambda: hooked(lambda output: output), "'0' keeps a tensor of a forward pass in the attribute 'seen'"),
    "hook with a list": (lambda: hooked(lambda output: [output]), "in the attribute 'seen'"),
    "a function": (lambda: scripted_function, "is a function, not an nn.Module"),
    "a class": (lambda: nn.Flatten, "is the class Flatten, not a network; make one first"),
    "a state dict": (lambda: net().state_dict(), "is a dict, such as of weights"),
    "a name": (lambda: "lenet5-digits", "is the text 'lenet5-digits'"),
    "a path": (lambda: Path("teacher.onnx"), "is the text 'teacher.onnx'"),
    "nothing": (lambda: None, "is a NoneType, not an nn.Module"),
}  # fmt: skip


def scripted_function(x: Tensor) -> Tensor:
    return x.flatten(1)


@pytest.mark.parametrize("name", KINDS)
def test_kinds_that_cannot_teach(name: str) -> None:
    make, sentence = KINDS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = make()
    with pytest.raises(UserError) as refusal:
        Teacher(made, SPEC)
    text = str(refusal.value)
    assert text.startswith("The teacher ") and sentence in text and "\n" not in text
    assert ";" in text or "not an nn.Module" in text  # what would be right


def test_networks_in_floating_point_are_taken() -> None:
    torch.manual_seed(0)
    stubs = nn.Sequential(torch.ao.quantization.QuantStub(), net(), torch.ao.quantization.DeQuantStub()).eval()
    once = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    once(IMAGES)
    for network in (net(), net().half(), net().double(), stubs, once, torch.fx.symbolic_trace(net())):
        check_kind(network)
        assert Teacher(network, SPEC).num_classes == 10
    assert Teacher(hooked(lambda output: output.detach()), SPEC).num_classes == 10


# Files of the same kinds, given as weights.


def test_files_of_compiled_networks(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(net()), tmp_path / "scripted.pt")
    torch.export.save(exported(), tmp_path / "exported.pt2")
    for name in ("w.onnx", "w.h5", "w.engine"):
        (tmp_path / name).write_bytes(b"something")
    told = {
        "scripted.pt": "is TorchScript", "exported.pt2": "is an exported program", "w.onnx": "is an ONNX file",
        "w.h5": "TensorFlow", "w.engine": "TensorRT",
    }  # fmt: skip
    for name, sentence in told.items():
        with pytest.raises(UserError, match=sentence):
            load_weights(tmp_path / name, allow_pt=True)


# Endings.


class Ending(nn.Module):
    def __init__(self, end: Callable[[Tensor], Tensor], outputs: int = 10) -> None:
        super().__init__()
        self.net, self.end = net(outputs=outputs), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.net(x))


SOFTMAX: list[Callable[[], nn.Module]] = [
    lambda: net(nn.Softmax(1)),
    lambda: net(nn.Softmax(dim=-1), nn.Identity()),
    lambda: Ending(lambda z: functional.softmax(z, 1)),
    lambda: Ending(lambda z: z.softmax(-1)),
    lambda: Ending(lambda z: torch.softmax(z / 0.1, 1)),
    lambda: Ending(lambda z: z.log_softmax(1).exp()),
    lambda: Ending(lambda z: z.exp() / z.exp().sum(1, keepdim=True)),
]
SIGMOIDS: list[Callable[[], nn.Module]] = [
    lambda: net(nn.Sigmoid()),
    lambda: Ending(torch.sigmoid),
    lambda: Ending(lambda z: z.sigmoid()),
]


@pytest.mark.parametrize("make", SOFTMAX)
def test_probabilities_are_no_logits(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    with pytest.raises(UserError, match=r"ends in a softmax.*sum to 1.*Return those from forward"):
        Teacher(make(), SPEC)


def test_the_module_at_the_end_is_named() -> None:
    with pytest.raises(UserError, match=r"ends in a softmax \('5'\)"):
        Teacher(net(nn.Softmax(1)), SPEC)


class Attention(nn.Module):
    """A softmax in the middle, a function at the end."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attend, self.softmax, self.net, self.end = nn.Conv2d(3, 1, 1), nn.Softmax(2), net(), end

    def forward(self, x: Tensor) -> Tensor:
        weights = self.softmax(self.attend(x).flatten(1).unsqueeze(1)).view(len(x), 1, *x.shape[2:])
        return self.end(self.net(x * weights))


def test_a_softmax_that_is_not_at_the_end_is_not_named() -> None:
    assert Teacher(Attention(lambda z: z), SPEC).num_classes == 10
    with pytest.raises(UserError, match=r"ends in a softmax: its answers"):
        Teacher(Attention(lambda z: z.softmax(1)), SPEC)
    with pytest.raises(UserError, match=r"ends in a softmax \('5'\)"):
        Teacher(net(nn.Softmax(1), nn.Identity()), SPEC)


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        (lambda z: z.double(), "answers in torch.float64 though its weights are float32; return logits.float()"),
        (lambda z: z.half(), "answers in torch.float16 though"),
        (lambda z: z.argmax(1), "answers in whole numbers (torch.int64), such as the chosen classes"),
        (lambda z: functional.one_hot(z.argmax(1), 10), "answers in whole numbers"),
        (lambda z: functional.one_hot(z.argmax(1), 10).float(), "answers with 1 for one class and 0 for the others"),
        (lambda z: functional.gumbel_softmax(z, hard=True), "answers with 1 for one class and 0 for the others"),
        (lambda z: z.softmax(0), "a softmax over the images of a batch (dim=0)"),
        (lambda z: z[:, :, None, None], "of shape [2, 10, 1, 1]; a classifier returns (N, classes). Let forward"),
        (lambda z: z.unsqueeze(-1), "of shape [2, 10, 1]; a classifier returns (N, classes). Let forward"),
        (lambda z: z[:, 0], "a tensor of shape [2], one number an image: a binary classifier"),
        (lambda z: z[:, 0].sigmoid(), "one number an image, between 0 and 1 as after a sigmoid: a binary classifier"),
        (lambda z: z.sum(), "returns a tensor of shape [] for 2 images"),
    ],
)
def test_what_answers_are_is_told(end: Callable[[Tensor], Tensor], sentence: str) -> None:
    torch.manual_seed(0)
    network = Ending(end)
    nn.init.constant_(network.net[4].bias, -9.0)
    with pytest.raises(UserError) as refusal:
        Teacher(network, SPEC)
    assert str(refusal.value).startswith("The teacher ") and sentence in str(refusal.value)


@pytest.mark.parametrize("make", SIGMOIDS)
def test_one_probability_a_class_is_no_logit(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(UserError, match=r"ends in a sigmoid.*one probability a class"):
        Teacher(make(), SPEC)


@pytest.mark.parametrize("end", [lambda z: z, torch.sigmoid, lambda z: z.sigmoid()])
def test_one_output_is_told(end: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    network = Ending(end, outputs=1)
    nn.init.constant_(network.net[4].bias, -9.0)
    sigmoid = "between 0 and 1 as after a sigmoid: " if bool((network(IMAGES) > 0).all()) else ""
    with pytest.raises(UserError, match=f"one number an image.*{re.escape(sigmoid)}.*two outputs"):
        Teacher(network, SPEC)


@pytest.mark.parametrize("end", [lambda z: z.log_softmax(1), lambda z: functional.log_softmax(z, -1), nn.LogSoftmax(1)])
def test_a_log_softmax_is_as_good_as_logits(end: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    network = Ending(end)
    teacher = Teacher(network, SPEC)
    assert (teacher.classifier_path, teacher.num_classes) == ("net.4", 10)
    for temperature in (1.0, 20.0):
        torch.testing.assert_close(
            (teacher(IMAGES) / temperature).softmax(1), (network.net(IMAGES) / temperature).softmax(1)
        )
