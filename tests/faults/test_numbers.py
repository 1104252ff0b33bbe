"""Extreme numbers: the right result or one sentence, never a stored NaN, and an unchanged teacher."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from amounts import LONG
from helpers import SMALL, SmallNet, prepare_torch, small_network
from torch import Tensor, nn

from zskd_nni.data.sources import StoredSource
from zskd_nni.methods.registry import TransferRequest, find_method
from zskd_nni.methods.zskt.settings import ZsktSettings
from zskd_nni.methods.zskt.train import train_zskt
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.tensors import load_tensors
from zskd_nni.synthesis import ImpressionStore
from zskd_nni.training.distillation import DistillationSettings, distill

QUICK: dict[str, dict[str, Any]] = {
    "zskd": {"synthesis": {"max_steps": 4, "shard": 10}},
    "class-impressions": {"synthesis": {"max_steps": 4, "shard": 10}},
    "sts": {"synthesis": {"max_steps": 4, "shard": 10}},
    "ats": {"sources": ["noise-uniform", "shapes"], "candidates": 3, "tries": 1},
    "zskt": {"rounds": 3, "student_steps": 2, "latent": 4, "width": 4},
}


def zeroed(classes: int = 5, rows: slice = slice(None), bias: float = 0.0) -> nn.Module:
    network = small_network(0, classes)
    with torch.no_grad():
        network.head.weight[rows] = 0
        network.head.bias[rows] = bias
    return network


class Overflowing(SmallNet):
    """Sound on a random image, NaN on bright ones."""

    def forward(self, x: Tensor) -> Tensor:
        bright = (x.mean((1, 2, 3)) > 0.6).float() * float("inf")
        return (
            super().forward(x)
            + (bright * 0).nan_to_num(0.0)[:, None]
            + torch.where(bright > 0, torch.nan, 0.0)[:, None]
        )


class Dead(SmallNet):
    """Nothing that it answers depends on the image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0 + self.head.bias


def huge() -> nn.Module:
    network = small_network(0)
    with torch.no_grad():
        network.head.weight.mul_(1e30)
    return network


TEACHERS = {
    "plain": lambda: small_network(0),
    "float16": lambda: small_network(0).half(),
    "bfloat16": lambda: small_network(0).bfloat16(),
    "float64": lambda: small_network(0).double(),
    "training": lambda: small_network(0, dropout=0.5).train(),
    "half in training": lambda: _partly(small_network(0, dropout=0.5)),
    "zero row": lambda: zeroed(rows=slice(2, 3)),
    "all zero": lambda: zeroed(),
    "constant": lambda: zeroed(bias=3.0),
    "dead": lambda: Dead(),
    "thousand classes": lambda: small_network(0, 1000),
    "two classes": lambda: small_network(0, 2),
    "bright is NaN": lambda: Overflowing(),
    "huge logits": huge,
}


def _partly(network: SmallNet) -> nn.Module:
    network.eval()
    network.norm.train()
    network.head.weight.requires_grad_(False)
    return network


def snapshot(network: nn.Module) -> dict[str, Any]:
    """Everything of a user's network that must stay as it is, bit by bit."""
    return {
        "state": {name: (value.dtype, value.clone()) for name, value in network.state_dict().items()},
        "training": [module.training for module in network.modules()],
        "requires_grad": [p.requires_grad for p in network.parameters()],
        "gradients": [p.grad is None for p in network.parameters()],
        "hooks": [
            len(hooks)
            for module in network.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        ],
        "threads": torch.get_num_threads(),
        "random": torch.get_rng_state(),
    }


def unchanged(before: dict[str, Any], network: nn.Module) -> None:
    after = snapshot(network)
    for key in ("training", "requires_grad", "gradients", "hooks", "threads"):
        assert before[key] == after[key], key
    assert torch.equal(before["random"], after["random"])
    for name, (dtype, value) in before["state"].items():
        other = after["state"][name][1]
        assert other.dtype == dtype
        assert torch.equal(
            value.view(torch.uint8) if value.ndim else value, other.view(torch.uint8) if other.ndim else other
        )


def finite_everywhere(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        for name, tensor in load_tensors(path)[0].items():
            assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()), f"{path}: {name}"


def request(method: str, folder: Path, classes: int, **more: Any) -> TransferRequest:
    found = find_method(method)
    given = {key: dict(value) if isinstance(value, dict) else value for key, value in QUICK[method].items()}
    for key, value in more.items():
        given[key] = {**given[key], **value} if isinstance(value, dict) else value
    options = found.options(found.presets[0], given)
    return TransferRequest(max(20, classes), 4, 3, folder, options, quiet=True)


def pairs() -> list[tuple[str, str]]:
    """All teachers with all methods; in the short version each teacher with two of them, taking turns."""
    methods = list(QUICK)
    if LONG:
        return [(kind, method) for kind in TEACHERS for method in methods]
    few = [(kind, methods[(number + turn) % 5]) for number, kind in enumerate(TEACHERS) for turn in (0, 3)]
    return [(kind, method) for kind, method in few if kind != "thousand classes" or method == "ats"]


@pytest.mark.parametrize(("kind", "method"), [pytest.param(*pair, id="-".join(pair)) for pair in pairs()])
def test_each_method_on_each_teacher(kind: str, method: str, tmp_path: Path) -> None:
    """From the teacher to a student that was trained for three steps."""
    prepare_torch()
    torch.manual_seed(3)
    network = TEACHERS[kind]()
    before = snapshot(network)
    student: nn.Module | None = None
    try:
        teacher = Teacher(network, SMALL)
        source = find_method(method).source(teacher, request(method, tmp_path, teacher.num_classes))
        student = small_network(1, teacher.num_classes)
        settings = DistillationSettings(steps=3, batch=4, warmup=0, temperature=4)
        distill(student, teacher, source, settings, checkpoint=tmp_path / "c.pt", quiet=True)
        assert not [m for m in (*teacher.model.modules(), *student.modules()) if m._forward_hooks]
        assert all(bool(torch.isfinite(value).all()) for value in student.state_dict().values())
    except UserError as error:
        assert "\n" not in str(error)
        assert kind not in ("plain", "float16", "bfloat16", "float64", "training", "half in training", "two classes")
    finally:
        unchanged(before, network)
        finite_everywhere(tmp_path)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_the_answers_of_another_precision_are_those_of_its_weights(kind: str) -> None:
    network = TEACHERS[kind]()
    images = torch.rand((8, *SMALL.shape), generator=torch.Generator().manual_seed(1))
    expected = copy.deepcopy(network).float().eval()(images)
    assert torch.allclose(Teacher(network, SMALL)(images), expected, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["head.weight", "norm.running_var", "conv.bias"])
def test_weights_that_are_not_finite_are_named(name: str, value: float) -> None:
    network = small_network(0)
    network.state_dict()[name].view(-1)[1] = value
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        Teacher(network, SMALL)


def test_weights_that_only_float64_holds_are_refused() -> None:
    network = small_network(0).double()
    with torch.no_grad():
        network.head.weight.fill_(1e300)
    with pytest.raises(UserError, match="not finite"):
        Teacher(network, SMALL)


def test_one_class_is_no_classifier() -> None:
    with pytest.raises(UserError, match="at least 2 classes"):
        Teacher(small_network(0, 1), SMALL)


@pytest.mark.parametrize("range_", ["clamp", "free"])
@pytest.mark.parametrize("rate", [1e9, 1e30, 1e-30])
@pytest.mark.parametrize("method", ["zskd", "class-impressions", "sts"])
def test_learning_rates_of_synthesis(method: str, rate: float, range_: str, tmp_path: Path) -> None:
    teacher = Teacher(small_network(0), SMALL)
    asked = request(method, tmp_path, 5, synthesis={"learning_rate": rate, "range": range_})
    try:
        source = find_method(method).source(teacher, asked)
    except UserError as error:
        assert "not finite" in str(error) and "\n" not in str(error)
    else:
        assert bool(torch.isfinite(source.batch(0, torch.Generator())).all())
        ImpressionStore.open(tmp_path).images()
    finite_everywhere(tmp_path)


@pytest.mark.parametrize("rate", [1e9, 1e30])
def test_learning_rates_of_students(rate: float, tmp_path: Path) -> None:
    teacher = Teacher(small_network(0), SMALL)
    source = find_method("ats").source(teacher, request("ats", tmp_path / "set", 5))
    settings = DistillationSettings(steps=60, batch=4, warmup=0, learning_rate=rate)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))
    try:
        distill(student, teacher, source, settings, checkpoint=tmp_path / "c.pt", quiet=True)
    except UserError as error:
        assert "smaller learning rate" in str(error)
    finite_everywhere(tmp_path)


@pytest.mark.parametrize("rates", [(1e9, 1e-3), (1e-3, 1e9), (1e30, 1e30)])
def test_learning_rates_of_zskt(rates: tuple[float, float], tmp_path: Path) -> None:
    teacher, student = Teacher(small_network(0), SMALL), small_network(1)
    settings = ZsktSettings(
        rounds=4,
        student_steps=3,
        batch=4,
        latent=4,
        width=4,
        generator_learning_rate=rates[0],
        student_learning_rate=rates[1],
    )
    try:
        train_zskt(student, teacher, settings, checkpoint=tmp_path / "c.pt", checkpoint_every=0, quiet=True)
    except UserError as error:
        assert "diverged" in str(error)
    finite_everywhere(tmp_path)


class Normed(nn.Module):
    """Batch normalisation of single values, which one image has no deviation of."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.head = nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden(x.flatten(1))))


def test_batches_of_one_image(tmp_path: Path) -> None:
    teacher = Teacher(small_network(0), SMALL)
    images = find_method("ats").source(teacher, request("ats", tmp_path, 5)).images
    source = StoredSource(images, 1, 0, "one by one")
    settings = DistillationSettings(steps=3, batch=1, warmup=0)
    distill(small_network(1), teacher, source, settings, quiet=True)
    with pytest.raises(UserError, match="batch of one image"):
        distill(Normed(), teacher, source, settings, quiet=True)
    with pytest.raises(UserError, match="at least 2 images"):
        find_method("zskt").source(teacher, TransferRequest(1, 1, 0, tmp_path, ZsktSettings(), quiet=True))
