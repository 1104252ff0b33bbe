"""NNI's quantizers on a transfer source, and the same network in real integers under onnxruntime."""

from __future__ import annotations

import copy
from itertools import pairwise

import onnx
import pytest
import torch
from nni.compression.pruning import L1NormPruner
from nni.compression.quantization import LsqPlusQuantizer, QATQuantizer
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.compression import DataFreeEvaluator, ZeroShotDistiller
from zskd_nni.compression.pruning.speedup import KeptChannels, shrink
from zskd_nni.compression.quantization.calibration import slice_calibration
from zskd_nni.compression.quantization.nni_quantizer import quantizer_class_name, with_fuse_names
from zskd_nni.compression.quantization.qdq_onnx import export_quantized_onnx, quantized_onnx_bytes
from zskd_nni.compression.quantization.quantize import QuantizedNetwork, quantize, simulated, slice_quantization
from zskd_nni.data.sources import StoredSource
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.models.zoo import lenet5
from zskd_nni.recipes.compression_config import CompressionRun, QuantizationConfig
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.distillation import DistillationSettings
from zskd_nni.training.metrics import agreement

torch.set_num_threads(1)
SPEC = InputSpec((1, 32, 32), mean=(0.4,), std=(0.3,))


class NormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.act1 = nn.Conv2d(1, 16, 5), nn.BatchNorm2d(16), nn.ReLU()
        self.pool = nn.MaxPool2d(4)
        self.conv2, self.norm2, self.act2 = nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU()
        self.head = nn.Linear(32 * 5 * 5, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act1(self.norm1(self.conv1(x))))
        return self.head(self.act2(self.norm2(self.conv2(x))).flatten(1))


def config(
    weight: str = "int8", activation: str = "int8", scheme: str = "affine", granularity: str = "default", output=False
) -> list[dict]:
    return [
        {
            "op_types": ["Conv2d", "Linear"],
            "target_names": ["_input_", "weight", *(["_output_"] if output else [])],
            "quant_dtype": activation,
            "quant_scheme": scheme,
            "target_settings": {"weight": {"quant_dtype": weight, "quant_scheme": scheme, "granularity": granularity}},
        }
    ]


FOLDED = [
    {
        "op_names": ["conv1", "conv2"],
        "target_names": ["weight", "_output_"],
        "quant_dtype": "int8",
        "quant_scheme": "affine",
    },
    {"op_names": ["head"], "target_names": ["_input_", "weight"], "quant_dtype": "int8", "quant_scheme": "symmetric"},
]
FOLDS = [["conv1", "norm1", "act1"], ["conv2", "norm2"]]


def examples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten smooth patterns, mixed and in noise: learnt in seconds, but with many images near a decision."""
    generator = torch.Generator().manual_seed(77)
    patterns = functional.interpolate(torch.rand((10, 1, 6, 6), generator=generator), size=32, mode="bilinear")
    generator.manual_seed(seed)
    labels, others = torch.randint(0, 10, (2, count), generator=generator)
    noise = torch.randn((count, 1, 32, 32), generator=generator)
    return (0.6 * patterns[labels] + 0.4 * patterns[others] + 0.15 * noise).clamp(0, 1), labels


def trained(network: nn.Module) -> Teacher:
    generator = torch.Generator().manual_seed(0)
    images, labels = examples(1500, 1)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    network.train()
    for _ in range(150):
        chosen = torch.randint(0, len(images), (64,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(network(SPEC.normalise(images[chosen])), labels[chosen]).backward()
        optimizer.step()
    network.eval()
    teacher = Teacher(network, SPEC)
    test_images, test_labels = examples(500, 2)
    assert (teacher.predict(test_images).argmax(1) == test_labels).float().mean() > 0.7
    return teacher


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    return trained(lenet5())


@pytest.fixture(scope="module")
def norm_teacher() -> Teacher:
    torch.manual_seed(0)
    return trained(NormNet())


TEST = examples(1000, 5)[0]


SOURCE = StoredSource(examples(400, 4)[0], 32, 0, "patterns")
SETTINGS = DistillationSettings(temperature=4.0, warmup=2, learning_rate=5e-4, steps=40)


def evaluator_for(teacher: Teacher) -> DataFreeEvaluator:
    return DataFreeEvaluator(teacher, SOURCE, SETTINGS, quiet=True)


def student_of(teacher: Teacher) -> nn.Module:
    return copy.deepcopy(teacher.model).requires_grad_(True)


def quantized(teacher: Teacher, name: str, config_list: list[dict], **options) -> QuantizedNetwork:
    config = QuantizationConfig(config_list, quantizer=name, **{"steps": 40, "learning_rate": 5e-4, **options})
    return quantize(student_of(teacher), config, teacher, SOURCE, SETTINGS, run=CompressionRun(quiet=True))


@torch.no_grad()
def answers(model: nn.Module, images: Tensor = TEST) -> Tensor:
    return model.eval()(SPEC.normalise(images))


def agrees(quantization: QuantizedNetwork, teacher: Teacher) -> float:
    return agreement(answers(simulated(quantization)), teacher.predict(TEST))


def test_ptq_takes_no_step_and_computes_with_the_ranges_it_saw(teacher):
    result = quantized(teacher, "ptq", config())
    assert all(
        torch.equal(value, teacher.model.state_dict()[name]) for name, value in result.network.state_dict().items()
    )
    entry = result.calibration["fc1"]["weight"]
    weight = teacher.model.fc1.weight
    scale = (weight.max() - weight.min()) / 254
    assert entry["scale"].item() == pytest.approx(scale.item(), rel=1e-6)
    by_hand = torch.round(torch.clamp(entry["zero_point"] + weight / entry["scale"], -127, 127))
    by_hand = (by_hand - entry["zero_point"]) * entry["scale"]
    model = simulated(result)
    answers(model, TEST[:2])
    torch.testing.assert_close(model.fc1.weight, by_hand)
    assert agrees(result, teacher) > 0.98


def test_the_simulation_answers_as_nnis_own_wrapped_network(teacher):
    student = student_of(teacher)
    evaluator = evaluator_for(teacher)
    quantizer = QATQuantizer(student, config(), evaluator)
    distiller = ZeroShotDistiller.from_compressor(quantizer, [], teacher)
    distiller.compress(10, None)
    wrapped = answers(student)
    calibration = quantizer.get_calibration_config()
    distiller.unwrap_model()
    again = simulated(QuantizedNetwork(student, "QATQuantizer", config(), calibration))
    torch.testing.assert_close(answers(again), wrapped)
    assert not torch.equal(answers(student), wrapped)


@pytest.mark.parametrize(
    ("name", "config_list"),
    [
        ("QATQuantizer", config()),
        ("lsq", config(scheme="symmetric")),
        ("lsq_plus", config("uint8", "uint8")),
        ("lsq_plus", config("int8", "int8")),
    ],
)
def test_training_quantizers_keep_the_teachers_answers(teacher, name, config_list):
    result = quantized(teacher, name, config_list, steps=30)
    assert agrees(result, teacher) > 0.97
    assert not any(hasattr(module, "_nni_wrapper") for module in result.network.modules())
    changed = [
        name
        for name, value in result.network.state_dict().items()
        if not torch.equal(value, teacher.model.state_dict()[name])
    ]
    assert len(changed) == 10


def test_training_beats_nnis_own_calibration_where_bits_are_few(teacher):
    few = config("int3", "int8", "symmetric")
    calibrated = agrees(
        quantized(teacher, "ptq", few, ranges="extremes", rounding="nearest", correct_biases=False), teacher
    )
    learnt = agrees(quantized(teacher, "qat", few, steps=100), teacher)
    assert learnt > calibrated + 0.02


def test_starting_from_the_ranges_is_what_makes_signed_lsq_plus_work(teacher):
    with_ranges = agrees(quantized(teacher, "lsq_plus", config(), steps=1), teacher)
    student = student_of(teacher)
    quantizer = LsqPlusQuantizer(student, config(), evaluator_for(teacher))
    distiller = ZeroShotDistiller.from_compressor(quantizer, [], teacher)
    distiller.compress(1, None)
    calibration = quantizer.get_calibration_config()
    distiller.unwrap_model()
    without = agrees(QuantizedNetwork(student.eval(), "LsqPlusQuantizer", config(), calibration), teacher)
    assert with_ranges > 0.97 and without < 0.5


def test_learnt_scales_stay_positive(teacher):
    result = quantized(teacher, "lsq", config(scheme="symmetric"), learning_rate=2e-2)
    before = quantized(teacher, "ptq", config(scheme="symmetric")).calibration
    for path, targets in result.calibration.items():
        for target, entry in targets.items():
            ratio = entry["scale"] / before[path][target]["scale"]
            assert 0.6 < ratio.item() < 1.7, (path, target)


@pytest.mark.parametrize(
    ("name", "config_list"),
    [
        (
            "dorefa",
            [{"op_names": ["conv2"], "target_names": ["weight"], "quant_dtype": "int8", "quant_scheme": "affine"}],
        ),
        ("bnn", [{"op_names": ["fc1"], "target_names": ["weight"], "quant_dtype": None}]),
    ],
)
def test_quantizers_that_change_weights_are_simulated_but_not_exported(teacher, name, config_list):
    result = quantized(teacher, name, config_list, steps=3)
    model = simulated(result)
    answers(model)
    path = config_list[0]["op_names"][0]
    values = model.get_submodule(path).weight.unique()
    assert values.abs().max() <= 1.0 + 1e-6 and len(values) == 2 if name == "bnn" else len(values) <= 255
    with pytest.raises(UserError, match="cannot be exported"):
        quantized_onnx_bytes(result, SPEC)


def test_folds_may_be_named_apart_and_as_lists(norm_teacher):
    network = student_of(norm_teacher)
    together = with_fuse_names(network, FOLDED, FOLDS)
    assert together[0]["fuse_names"] == [("conv1", "norm1", "act1"), ("conv2", "norm2")]
    assert "fuse_names" not in FOLDED[0] and "fuse_names" not in together[1]
    assert with_fuse_names(network, [{**FOLDED[0], "fuse_names": FOLDS}]) == together[:1]
    with pytest.raises(UserError, match="no config of config_list selects 'pool'"):
        with_fuse_names(network, FOLDED, [["pool", "norm1"]])


def test_mistakes_are_told(teacher):
    with pytest.raises(UserError, match="'QatQuantizer'; the nearest is 'QATQuantizer'"):
        quantizer_class_name("QatQuantizer")
    with pytest.raises(UserError, match="did you mean 'quant_dtype'"):
        quantized(teacher, "qat", [{"op_types": ["Conv2d"], "quant_dtyp": "int8"}])
    with pytest.raises(UserError, match="16 bits"):
        quantized_onnx_bytes(quantized(teacher, "ptq", config("int16")), SPEC)


def test_a_network_that_answers_nan_is_refused(teacher):
    student = student_of(teacher)
    student.fc3.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        quantize(student, QuantizationConfig(config()), teacher, SOURCE, run=CompressionRun(quiet=True))


def test_scales_by_channel_are_cut_as_the_channels_are():
    entry = {
        "scale": torch.arange(4.0).view(4, 1, 1, 1),
        "zero_point": torch.zeros(4, 1, 1, 1),
        "quant_dtype": "int8",
        "tracked_max": torch.tensor(3.0),
    }
    by_input = {"scale": torch.arange(3.0).view(1, 3, 1, 1), "zero_point": torch.tensor(1.0)}
    calibration = {"conv": {"weight": entry, "_input_0": by_input, "_output_0": {"scale": torch.tensor(2.0)}}}
    mask = torch.ones(4, 3, 2, 2)
    mask[[0, 2]] = 0
    mask[:, 1] = 0
    kept = KeptChannels(inputs=torch.tensor([0, 2]), outputs=torch.tensor([1, 3]))
    for given in ({"conv": {"weight": mask, "bias": None}}, {"conv": kept}):
        cut = slice_calibration(calibration, given)["conv"]
        assert cut["weight"]["scale"].flatten().tolist() == [1.0, 3.0] and cut["weight"]["scale"].shape == (2, 1, 1, 1)
        assert cut["weight"]["tracked_max"] == 3.0 and cut["weight"]["quant_dtype"] == "int8"
        assert cut["_input_0"]["scale"].flatten().tolist() == [0.0, 2.0] and cut["_input_0"]["zero_point"] == 1.0
        assert cut["_output_0"]["scale"] == 2.0
    assert entry["scale"].shape == (4, 1, 1, 1)
    assert slice_calibration(calibration, {})["conv"]["weight"]["scale"].shape == (4, 1, 1, 1)
    with pytest.raises(UserError, match="channel 9"):
        slice_calibration(calibration, {"conv": KeptChannels(torch.tensor([0]), torch.tensor([9]))})


def test_pruned_quantized_distilled_and_shrunken_the_simulation_stays(teacher):
    """One fused run of pruner, QAT and distiller; the smaller network computes what the masked one did."""
    student = student_of(teacher)
    evaluator = evaluator_for(teacher)
    pruner = L1NormPruner(student, [{"op_names": ["conv1", "conv2", "fc1"], "sparse_ratio": 0.5}], evaluator)
    pruner.compress()
    config_list = config(granularity="out_channel", scheme="symmetric")
    quantizer = QATQuantizer.from_compressor(pruner, config_list)
    distiller = ZeroShotDistiller.from_compressor(quantizer, [], teacher, temperature=4.0)
    distiller.compress(20, None)
    wrapped = answers(student)
    masks, calibration = pruner.get_masks(), quantizer.get_calibration_config()
    distiller.unwrap_model()
    whole = QuantizedNetwork(student.eval(), "QATQuantizer", config_list, calibration)
    small = shrink(student, masks, evaluator.get_dummy_input())
    assert small.parameters_after < 0.5 * small.parameters_before
    with pytest.raises(UserError, match="slice the calibration"):
        simulated(QuantizedNetwork(small.model, "QATQuantizer", config_list, calibration))
    result = slice_quantization(whole, small.model, small.kept)
    assert len(result.calibration["conv2"]["weight"]["scale"]) == 8
    smaller = answers(simulated(result))
    assert agreement(smaller, wrapped) > 0.99
    torch.testing.assert_close(smaller, wrapped, rtol=0.05, atol=0.05 * wrapped.abs().max().item())
    data = quantized_onnx_bytes(result, SPEC)
    assert len(data) < 0.6 * len(quantized_onnx_bytes(whole, SPEC))


@pytest.mark.parametrize(
    ("name", "config_list"),
    [
        ("ptq", config()),
        ("ptq", config("int4", granularity="out_channel")),
        ("ptq", config("uint8", "uint4", output=True)),
        ("qat", config(scheme="symmetric", granularity="out_channel", output=True)),
        ("qat", config("int4", "int8", "symmetric", "out_channel")),
        ("lsq", config(scheme="symmetric")),
        ("lsq_plus", config("uint8", "uint8")),
        ("lsq_plus", config("int4", "int8", granularity="out_channel")),
    ],
)
def test_onnxruntime_answers_as_nnis_simulation(teacher, tmp_path, name, config_list):
    result = quantized(teacher, name, config_list, steps=20)
    path = tmp_path / "student.onnx"
    coarse = config_list[0]["quant_dtype"] == "uint4"  # a level is 1/15 of the range, and many logits are equal
    export = export_quantized_onnx(result, SPEC, path, TEST, 0.98 if coarse else 0.995)
    assert export.max_logit_difference < (0.2 if coarse else 0.05)
    assert export.bytes == path.stat().st_size < 0.3 * export.float_bytes
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    weights = [entry for entry in model.graph.initializer if len(entry.dims) >= 2 and max(entry.dims[1:]) > 1]
    stored = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    assert len(weights) == 5 and {entry.data_type for entry in weights} <= stored
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") == 5 * (2 if "_output_" in config_list[0]["target_names"] else 1)
    assert not any(node.metadata_props for node in model.graph.node)
    bits = config_list[0]["target_settings"]["weight"]["quant_dtype"]
    if bits == "int4":
        values = onnx.numpy_helper.to_array(max(weights, key=lambda entry: entry.dims[-1]))
        assert values.min() >= -7 and values.max() <= 7


@pytest.mark.parametrize("widths", [(16, 10), (16, 16, 10), (16, 16, 16, 10)])
@pytest.mark.parametrize("targets", [["_input_", "weight"], ["_input_", "weight", "_output_"]])
def test_large_products_of_integers_are_added_exactly(tmp_path, widths, targets):
    """On processors without VNNI, onnxruntime by itself cuts sums off at 16 bits."""
    layers = [nn.Linear(before, after, bias=False) for before, after in pairwise(widths)]
    for layer in layers:
        nn.init.constant_(layer.weight, 1.0)
    spec = InputSpec((1, 4, 4))
    teacher = Teacher(nn.Sequential(nn.Flatten(), *layers), spec)
    images = 0.8 + 0.2 * torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    config = QuantizationConfig(
        [{"op_types": ["Linear"], "target_names": targets, "quant_dtype": "int8", "quant_scheme": "symmetric"}]
    )
    result = quantize(teacher.student(), config, teacher, StoredSource(images, 32, 0, "bright"), SETTINGS)
    export = export_quantized_onnx(result, spec, tmp_path / "network.onnx", images, 0.0)
    assert export.max_logit_difference < 0.01


@pytest.mark.parametrize("name", ["ptq", "qat"])
def test_folded_batchnorm_is_gone_from_the_file(norm_teacher, tmp_path, name):
    result = quantized(norm_teacher, name, FOLDED, fuse_names=FOLDS, steps=20)
    assert agrees(result, norm_teacher) > 0.97
    export = export_quantized_onnx(result, SPEC, tmp_path / "student.onnx", TEST)
    assert export.agreement >= 0.995 and export.max_logit_difference < 0.05
    kinds = {node.op_type for node in onnx.load(tmp_path / "student.onnx").graph.node}
    assert "BatchNormalization" not in kinds and {"Conv", "QuantizeLinear", "DequantizeLinear"} <= kinds
    assert isinstance(result.network.norm1, nn.BatchNorm2d)


class Split(nn.Module):
    """Splits its channels by widths that it reads of its layers, as a public report's network does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left, self.right = nn.Conv2d(1, 12, 3, 2), nn.Conv2d(4, 4, 3, 2), nn.Conv2d(8, 4, 3, 2)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        widths = [self.left.in_channels, self.right.in_channels]
        left, right = torch.split(torch.relu(self.conv(x)), widths, dim=1)
        both = torch.cat([self.left(left), self.right(right)], 1).mean((2, 3))
        return self.head(both.view(-1, self.head.weight.shape[1]))


def test_what_a_network_reads_of_its_layers_is_there_in_integers(tmp_path):
    teacher = Teacher(Split(), SPEC)
    images = torch.rand(8, 1, 32, 32)
    quantization = quantized(teacher, "PtqQuantizer", config())
    assert export_quantized_onnx(quantization, SPEC, tmp_path / "q.onnx", images, 0).agreement == 1


def test_a_file_need_not_agree_better_than_the_simulation_with_itself(teacher, tmp_path):
    unreachable = 1.01  # as 0.98 is where a level of 4 bits hangs on the last digit of a sum
    written = export_quantized_onnx(
        quantized(teacher, "ptq", config()), SPEC, tmp_path / "student.onnx", TEST[:200], unreachable
    )
    assert written.agreement == 1
    assert (tmp_path / "student.onnx").exists()


def test_a_file_that_answers_otherwise_is_not_written(teacher, tmp_path, monkeypatch):
    result = quantized(teacher, "ptq", config())
    whole = simulated(result)
    monkeypatch.setattr("zskd_nni.compression.quantization.qdq_onnx.simulated", lambda quantization: whole)
    result.calibration["fc1"]["_input_0"]["scale"] = torch.tensor(500.0)
    with pytest.raises(UserError, match=r"agree on .* the file was not written"):
        export_quantized_onnx(result, SPEC, tmp_path / "student.onnx", TEST[:200])
    assert not list(tmp_path.iterdir())
