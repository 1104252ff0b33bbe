"""What is done to a calibrated network without training: ranges, joint rounding, biases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from zskd_nni import InputSpec, NoiseSource, QuantizationConfig, Teacher, export_quantized_onnx, load_teacher, quantize
from zskd_nni.compression.quantization.quantize import simulated
from zskd_nni.compression.quantization.refinement import correct_biases, joint_rounding, narrow_ranges, rounded

FOUR_BITS = {
    "op_types": ["Conv2d", "Linear"],
    "target_names": ["_input_", "weight"],
    "quant_dtype": "int4",
    "quant_scheme": "affine",
    "target_settings": {"weight": {"quant_dtype": "int4", "quant_scheme": "symmetric", "granularity": "out_channel"}},
}
REFINED = {"ranges": "least_error", "rounding": "joint", "correct_biases": True}
PLAIN = {"ranges": "extremes", "rounding": "nearest", "correct_biases": False}


@pytest.mark.parametrize("shape", [(8, 6, 5, 5), (8, 200)], ids=["convolution", "linear"])
def test_errors_of_joint_rounding_add_up_to_nothing(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2 + 0.2
    values = values.clamp(-7, 7)
    whole = joint_rounding(values, -7, 7)
    assert torch.equal(whole, whole.round()) and whole.abs().max() <= 7
    assert (whole - values).abs().max() < 1
    assert (whole - values).flatten(1).sum(1).abs().max() <= 0.5 + 1e-4
    assert (values.round() - values).flatten(1).sum(1).abs().max() > 1
    if len(shape) > 2:  # a kernel gives one value at most to its channel
        assert (whole - values).flatten(2).sum(2).abs().max() <= 1.5 + 1e-4


def test_joint_rounding_keeps_zeros_and_limits() -> None:
    values = torch.tensor([[0.0, 7.0, 7.0, 0.0, 6.6, 6.6, 6.6, -7.0]])
    whole = joint_rounding(values, -7, 7)
    assert whole[0, [0, 3]].abs().sum() == 0 and whole.abs().max() <= 7
    assert abs(float((whole - values).sum())) <= 0.5


@pytest.mark.parametrize("outlier", [40.0, -40.0])
def test_a_narrower_range_rounds_with_less_error(outlier: float) -> None:
    images = torch.randn(4, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, 0] = outlier
    scale = (images.max() - images.min()) / 14
    entry = {"scale": scale, "zero_point": -7 - (images.min() / scale).round(), "quant_dtype": "int4"}
    calibration = {"0": {"_input_0": dict(entry)}}
    narrow_ranges(nn.Sequential(nn.Conv2d(1, 1, 1)).eval(), calibration, images)
    new = calibration["0"]["_input_0"]
    errors = [
        (rounded(images, one["scale"], one["zero_point"], "int4") - images).square().mean() for one in (entry, new)
    ]
    assert errors[1] < 0.7 * errors[0]
    assert new["scale"].shape == scale.shape and new["zero_point"] == new["zero_point"].round()


def test_corrected_biases_restore_the_means_of_channels() -> None:
    teacher = load_teacher("lenet5-digits")
    images = NoiseSource(teacher.spec, 64)
    quantized = quantize(teacher.student(), QuantizationConfig([FOUR_BITS]), teacher, images)
    batch, seen = teacher.spec.normalise(teacher.spec.uniform_noise(50)), dict[str, torch.Tensor]()
    correct_biases(quantized.network, teacher.model, simulated(quantized), batch)
    for name, model in (("float", teacher.model), ("quantized", simulated(quantized))):
        handle = model.conv2.register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output.mean((0, 2, 3))})
        )
        with torch.no_grad():
            model(batch)
        handle.remove()
    assert torch.allclose(seen["float"], seen["quantized"], atol=1e-4)


def test_a_refined_network_is_nearer_to_the_original_and_can_be_exported(tmp_path) -> None:
    teacher = load_teacher("lenet5-digits")
    images, config = NoiseSource(teacher.spec, 64), QuantizationConfig([FOUR_BITS], calibration_images=128)
    probe = teacher.spec.uniform_noise(100, 5)
    errors = []
    for options in (PLAIN, REFINED):
        quantized = quantize(teacher.student(), replace(config, **options), teacher, images)
        with torch.no_grad():
            logits = simulated(quantized)(teacher.spec.normalise(probe))
            errors.append(float((logits - teacher(probe)).square().mean()))
    assert errors[1] < 0.7 * errors[0]
    export_quantized_onnx(quantized, teacher.spec, tmp_path / "int4.onnx", images, 0.95)


@pytest.mark.parametrize(("quant_dtype", "zero_point"), [("uint8", 128.0), ("int8", 0.0)])
def test_a_symmetric_range_reaches_both_ends(quant_dtype: str, zero_point: float) -> None:
    """Of a uniform distribution no value is worth clipping."""
    images = torch.linspace(-3, 3, 1600).view(1, 1, 40, 40)
    entry = {"scale": torch.tensor(6 / 255), "zero_point": torch.tensor(zero_point), "quant_dtype": quant_dtype}
    calibration = {"0": {"_input_0": {**entry, "quant_scheme": "symmetric"}}}
    narrow_ranges(nn.Sequential(nn.Conv2d(1, 1, 1)).eval(), calibration, images)
    new = calibration["0"]["_input_0"]
    assert new["zero_point"] == zero_point
    assert (rounded(images, new["scale"], new["zero_point"], quant_dtype) - images).abs().max() < 0.03


class _CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        self.norm = nn.BatchNorm2d(1)
        self.up = nn.ConvTranspose2d(1, 3, 2)
        self.fc = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.up(self.norm(self.conv(0.01 * self.conv(x)))).mean((2, 3)))


def _calibrated(network: nn.Module, quant_dtype: str = "int4", granularity: str = "default", **options: Any) -> Any:
    layers = {
        "op_types": ["Conv2d", "BatchNorm2d", "ConvTranspose2d", "Linear"],
        "target_names": ["_input_", "weight"],
        "quant_dtype": quant_dtype,
        "target_settings": {"weight": {"quant_dtype": quant_dtype, "granularity": granularity}},
    }
    spec = InputSpec((1, 8, 8))
    config = QuantizationConfig([layers], calibration_images=32, **options)
    return quantize(network.eval(), config, Teacher(network, spec), NoiseSource(spec, 32))


def test_a_layer_that_is_called_twice_keeps_a_range_for_both_calls() -> None:
    torch.manual_seed(0)
    network = _CalledTwice()
    plain, narrowed = (_calibrated(network, ranges=ranges) for ranges in ("extremes", "least_error"))
    before, after = (each.calibration["conv"]["_input_0"]["scale"] for each in (plain, narrowed))
    assert 0.3 * before < after <= before


def test_biases_of_a_layer_that_is_called_twice_move_once() -> None:
    torch.manual_seed(0)
    network = _CalledTwice()
    corrected = _calibrated(network, **REFINED)
    moved = [
        float((corrected.network.get_parameter(name) - value).abs().max())
        for name, value in network.named_parameters()
        if name.endswith("bias")
    ]
    step = float(corrected.calibration["conv"]["_input_0"]["scale"])
    assert 0 < moved[0] < step
    assert moved[1] == 0 and moved[2] > 0  # of BatchNorm, of the transposed convolution


@pytest.mark.parametrize("granularity", ["out_channel", "in_channel", "default", [2, 2], [1, -1]])
def test_joint_rounding_stays_on_the_grid_of_the_scales(granularity: Any) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Linear(6, 6))
    with torch.no_grad():
        network[2].weight.mul_(torch.linspace(0.1, 2, 6))  # so that scales differ by input
        quantized = _calibrated(network, granularity=granularity, rounding="joint")
    weight = quantized.network[2].weight
    simulation = simulated(quantized)
    seen = []
    simulation[2].register_forward_hook(lambda module, *_: seen.append(module.weight.detach().clone()))
    simulation(torch.rand(2, 1, 8, 8))
    assert torch.allclose(seen[0], weight, atol=1e-6)
    assert not torch.allclose(weight, network[2].weight, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"quantizer": "QATQuantizer"}, "are for PtqQuantizer"), ({"fuse_batch_norm": True}, "exclude fuse_names")],
)
def test_what_cannot_be_refined_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        QuantizationConfig([FOUR_BITS], rounding="joint", **changes)


@pytest.mark.parametrize(
    ("entry", "options", "expected"),
    [
        ({"quant_dtype": "int8"}, {}, ("extremes", "nearest", False)),
        ({"quant_dtype": "int"}, {}, ("extremes", "nearest", False)),
        (FOUR_BITS, {}, ("least_error", "joint", True)),
        (
            {"quant_dtype": "int8", "target_settings": {"weight": {"quant_dtype": "uint4"}}},
            {},
            ("least_error", "joint", True),
        ),
        ({"quant_types": ["weight"], "quant_bits": {"weight": 4}}, {}, ("least_error", "joint", True)),
        ({"quant_types": ["weight"], "quant_bits": 4}, {}, ("least_error", "joint", True)),
        (FOUR_BITS, {"rounding": "nearest", "correct_biases": False}, ("least_error", "nearest", False)),
        ({"quant_dtype": "int8"}, {"rounding": "joint"}, ("extremes", "joint", False)),
        (FOUR_BITS, {"quantizer": "QATQuantizer"}, ("extremes", "nearest", False)),
        (FOUR_BITS, {"fuse_batch_norm": True}, ("extremes", "nearest", False)),
        ({**FOUR_BITS, "fuse_names": [["conv1", "bn1"]]}, {}, ("extremes", "nearest", False)),
    ],
)
def test_few_bits_are_refined_unless_a_key_says_otherwise(
    entry: dict[str, Any], options: dict[str, Any], expected: tuple[str, str, bool]
) -> None:
    config = QuantizationConfig([entry], **options)
    assert (config.ranges, config.rounding, config.correct_biases) == expected


def test_the_default_below_eight_bits_is_what_the_keys_name() -> None:
    teacher = load_teacher("lenet5-digits")
    images = NoiseSource(teacher.spec, 200)
    found = [
        quantize(teacher.student(), QuantizationConfig([FOUR_BITS], **options), teacher, images)
        for options in ({}, REFINED, PLAIN)
    ]
    default, named, plain = (one.network.fc1.weight for one in found)
    assert torch.equal(default, named) and not torch.equal(default, plain)
