"""The papers' networks: counts, shapes at every stage, the order of layers, and the trained weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import digits_network
from torch import nn
from torch.nn import functional

from zskd_nni.data.datasets import load_images
from zskd_nni.models import zoo
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.zoo.trained import trained_names, trained_weights, training_record
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import sha256_of_file
from zskd_nni.training.inference import logits_on
from zskd_nni.training.metrics import accuracy


def outputs_of(network: nn.Module, channels: int) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shape without the batch of every leaf's output, and the order in which leaves were called."""
    shapes: dict[str, tuple[int, ...]] = {}
    order: list[str] = []

    def note(name: str):
        def hook(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            shapes[name] = tuple(output.shape[1:])
            order.append(name)

        return hook

    for name, module in network.named_modules():
        module.register_forward_hook(note(name))
    with torch.no_grad():
        network.eval()(torch.rand(2, channels, 32, 32))
    return shapes, order


@pytest.mark.parametrize(
    ("name", "arguments", "count"),
    [
        ("lenet5", {}, 61_706),
        ("lenet5_half", {}, 35_820),
        ("alexnet", {}, 1_659_178),
        ("alexnet_half", {}, 417_434),
        ("resnet20", {}, 272_474),
        ("vgg", {}, 1_434_042),
        ("wrn", {"depth": 16, "width": 1}, 175_066),
        ("wrn", {"depth": 16, "width": 2}, 691_674),
        ("wrn", {"depth": 40, "width": 1}, 563_930),
        ("wrn", {"depth": 40, "width": 2}, 2_243_546),
    ],
)
def test_parameter_counts(name: str, arguments: dict[str, int], count: int) -> None:
    assert sum(p.numel() for p in zoo.FACTORIES[name](**arguments).parameters()) == count


@pytest.mark.parametrize(("factory", "first", "second"), [(zoo.lenet5, 6, 16), (zoo.lenet5_half, 3, 8)])
def test_lenet_shapes(factory, first: int, second: int) -> None:
    shapes, _ = outputs_of(factory(), 1)
    expected = {
        "conv1": (first, 28, 28),
        "pool1": (first, 14, 14),
        "conv2": (second, 10, 10),
        "pool2": (second, 5, 5),
        "flatten": (second * 25,),
        "fc1": (120,),
        "fc2": (84,),
        "fc3": (10,),
    }
    assert {name: shapes[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("factory", "widths", "hidden"),
    [(zoo.alexnet, (48, 128, 192, 192, 128), (512, 256)), (zoo.alexnet_half, (24, 64, 96, 96, 64), (256, 128))],
)
def test_alexnet_shapes(factory, widths: tuple[int, ...], hidden: tuple[int, int]) -> None:
    shapes, _ = outputs_of(factory(), 3)
    sides = (15, 7, 7, 7, 3)
    expected = {f"bn{i}": (w, s, s) for i, (w, s) in enumerate(zip(widths, sides, strict=True), 1)}
    expected |= {"flatten": (widths[-1] * 9,), "bn6": (hidden[0],), "bn7": (hidden[1],), "fc8": (10,)}
    assert {name: shapes[name] for name in expected} == expected


def test_alexnet_order_of_layers_is_the_authors() -> None:
    _, order = outputs_of(zoo.alexnet(), 3)
    assert " ".join(order[:-1]) == (
        "conv1 relu1 norm1 pool1 bn1 conv2 relu2 norm2 pool2 bn2 conv3 relu3 bn3 conv4 relu4 bn4 "
        "conv5 relu5 pool5 bn5 flatten fc6 relu6 drop6 bn6 fc7 relu7 drop7 bn7 fc8"
    )


def test_alexnet_constants_are_the_authors() -> None:
    network = zoo.alexnet()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(norms) == 7
    assert all(m.eps == 1e-3 and m.momentum == 0.001 for m in norms)
    assert network.drop6.p == network.drop7.p == 0.5
    biases = {f"conv{i}": getattr(network, f"conv{i}").bias.unique().tolist() for i in range(1, 6)}
    assert biases == {"conv1": [0], "conv2": [1], "conv3": [0], "conv4": [1], "conv5": [1]}


def test_response_norm_is_tensorflows() -> None:
    """x / (bias + alpha * sum over d - 2 .. d + 2 of x^2) ^ beta with alpha 1e-4, by hand in float64."""
    x = torch.randn(2, 7, 3, 3, generator=torch.Generator().manual_seed(0)) * 40
    values = x.double().numpy()
    expected = np.empty_like(values)
    for d in range(7):
        energy = np.square(values[:, max(0, d - 2) : d + 3]).sum(1)
        expected[:, d] = values[:, d] / (1.0 + 1e-4 * energy) ** 0.75
    assert np.abs(expected / values).min() < 0.6, "the test must reach where the norm bites"
    for layer in (zoo.alexnet().norm1, zoo.alexnet_half().norm2):
        np.testing.assert_allclose(layer(x).numpy(), expected, rtol=2e-5)


@pytest.mark.parametrize(("depth", "width"), [(16, 1), (16, 2), (40, 2)])
def test_wrn_shapes_and_depth(depth: int, width: int) -> None:
    network = zoo.wrn(depth, width)
    shapes, _ = outputs_of(network, 3)
    expected = {
        "conv1": (16, 32, 32),
        "group1": (16 * width, 32, 32),
        "group2": (32 * width, 16, 16),
        "group3": (64 * width, 8, 8),
        "pool": (64 * width, 1, 1),
        "fc": (10,),
    }
    assert {name: shapes[name] for name in expected} == expected
    threes = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(threes) == depth - 3, "the depth also counts the three shortcuts"
    assert all(m.bias is None for m in network.modules() if isinstance(m, nn.Conv2d))


def test_wrn_block_by_hand() -> None:
    """The residual path starts behind the first activation where the width changes, before it elsewhere."""
    network = zoo.wrn(16, 2).eval()
    x = torch.randn(2, 16, 8, 8)

    def norm(layer: nn.BatchNorm2d, values: torch.Tensor) -> torch.Tensor:
        shape = (1, -1, 1, 1)
        scale = layer.weight / torch.sqrt(layer.running_var + layer.eps)
        return (values - layer.running_mean.view(shape)) * scale.view(shape) + layer.bias.view(shape)

    first, second = network.group1[0], network.group1[1]
    with torch.no_grad():
        activated = norm(first.bn1, x).relu()
        inner = functional.conv2d(activated, first.conv1.weight, padding=1)
        inner = functional.conv2d(norm(first.bn2, inner).relu(), first.conv2.weight, padding=1)
        y = inner + functional.conv2d(activated, first.shortcut.weight)
        torch.testing.assert_close(first(x), y)
        inner = functional.conv2d(norm(second.bn1, y).relu(), second.conv1.weight, padding=1)
        inner = functional.conv2d(norm(second.bn2, inner).relu(), second.conv2.weight, padding=1)
        assert second.shortcut is None
        torch.testing.assert_close(second(y), inner + y)


@pytest.mark.parametrize("depth", [4, 9, 17, 18, 41])
def test_wrn_refuses_other_depths(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"6 n \+ 4.*{depth}"):
        zoo.wrn(depth, 1)


@pytest.mark.parametrize("name", sorted(zoo.FACTORIES))
def test_other_channels_and_classes(name: str) -> None:
    channels = 2
    network = zoo.FACTORIES[name](num_classes=7, in_channels=channels).eval()
    assert network(torch.rand(3, channels, 32, 32)).shape == (3, 7)


@pytest.mark.parametrize("name", trained_names())
def test_trained_weights_are_as_described(name: str) -> None:
    described = training_record(name)
    assert described["name"] == name
    assert sha256_of_file(trained_weights(name)) == described["sha256"]
    assert {"network", "arguments", "input", "data", "accuracy", "settings", "provenance"} <= set(described)


def test_digits_teacher_reaches_its_described_accuracy() -> None:
    data = load_images("digits", "test")
    logits = logits_on(digits_network().eval(), data, InputSpec((1, 32, 32)))
    assert accuracy(logits, data.labels) == pytest.approx(training_record("lenet5-digits")["accuracy"], abs=0.3)
    assert accuracy(logits, data.labels) > 97


def test_unknown_trained_weights_name_the_known_ones() -> None:
    with pytest.raises(UserError, match="lenet5-digits"):
        trained_weights("lenet5-nothing")
