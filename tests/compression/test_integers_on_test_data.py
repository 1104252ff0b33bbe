"""On real test images onnxruntime predicts the classes of NNI's simulation, for each quantizer with an integer file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import require_real_data
from torch import Tensor, nn

from zskd_nni.compression.quantization.qdq_onnx import export_quantized_onnx
from zskd_nni.compression.quantization.quantize import quantize
from zskd_nni.data.datasets import LabelledImages, load_images
from zskd_nni.data.sources import TransferSource
from zskd_nni.methods.registry import transfer_source
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.onnx_export import run_onnx
from zskd_nni.models.teacher import Teacher
from zskd_nni.models.zoo import lenet5
from zskd_nni.models.zoo.trained import trained_weights
from zskd_nni.recipes.compression_config import CompressionRun, QuantizationConfig
from zskd_nni.runtime.tensors import load_weights
from zskd_nni.training.distillation import DistillationSettings
from zskd_nni.training.inference import logits_on
from zskd_nni.training.metrics import accuracy
from zskd_nni.training.supervised import SupervisedSettings, train_supervised

SPEC = InputSpec((1, 32, 32))
SETTINGS = DistillationSettings(temperature=4, steps=30, batch=64, warmup=2, learning_rate=2e-4)
LEAST = 0.995  # of the test images


def int8(scheme: str, granularity: str = "out_channel") -> list[dict[str, Any]]:
    weight = {"quant_dtype": "int8", "quant_scheme": scheme, "granularity": granularity}
    return [
        {
            "op_types": ["Conv2d", "Linear"],
            "target_names": ["_input_", "weight"],
            "quant_dtype": "int8",
            "quant_scheme": scheme,
            "target_settings": {"weight": weight},
        }
    ]


def made_of(teacher: Teacher, folder: Path) -> TransferSource:
    return transfer_source(teacher, folder, size=200, batch_size=64, synthesis={"max_steps": 20}, quiet=True)


@pytest.fixture(scope="module")
def mnist() -> LabelledImages:
    return load_images("mnist", "test", require_real_data())


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    network = lenet5()
    network.load_state_dict(load_weights(trained_weights("lenet5-mnist")))
    return Teacher(network, SPEC)


@pytest.fixture(scope="module")
def source(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> TransferSource:
    return made_of(teacher, tmp_path_factory.mktemp("impressions"))


@pytest.mark.parametrize(
    ("name", "scheme", "steps"),
    [("ptq", "affine", None), ("qat", "affine", 30), ("lsq", "symmetric", 30), ("lsq_plus", "affine", 30)],
)
def test_on_mnists_test_images(
    name: str,
    scheme: str,
    steps: int | None,
    mnist: LabelledImages,
    teacher: Teacher,
    source: TransferSource,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    student = copy.deepcopy(teacher.model).requires_grad_(True)
    config = QuantizationConfig(int8(scheme), quantizer=name, steps=steps or 0, learning_rate=SETTINGS.learning_rate)
    quantization = quantize(student, config, teacher, source, SETTINGS, run=CompressionRun(quiet=True))
    path = tmp_path / "int8.onnx"
    export = export_quantized_onnx(quantization, SPEC, path, mnist.pixels(slice(0, 3000), SPEC), LEAST)
    assert export.agreement >= LEAST
    # Integers for the eye too: they still know their digits.
    some = mnist.subset(slice(3000, 5000))
    assert accuracy(logits_on(lambda images: run_onnx(path, images), some, SPEC), some.labels) > 96


class Normalised(nn.Module):
    """Convolutions with batch normalisation, one of them without a bias, one without an activation behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(1, 8, 5, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(144, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        return self.fc(x.flatten(1))


def test_folded_batch_normalisation_on_the_digits_test_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Normalised()
    train_supervised(network, load_images("digits", "train"), SPEC, SupervisedSettings(epochs=8, batch=64), quiet=True)
    teacher, test = Teacher(network, SPEC), load_images("digits", "test")
    assert accuracy(logits_on(teacher, test, SPEC), test.labels) > 90
    section = QuantizationConfig(quantizer="QATQuantizer", config_list=int8("affine"), fuse_batch_norm=True, steps=30)
    images = made_of(teacher, tmp_path / "impressions")
    quantization = quantize(teacher.student(), section, teacher, images, SETTINGS, run=CompressionRun(quiet=True))
    assert {names[:2] for names in quantization.folds} == {("conv1", "bn1"), ("conv2", "bn2")}
    path = tmp_path / "int8.onnx"
    export = export_quantized_onnx(quantization, SPEC, path, test.pixels(slice(None), SPEC), LEAST)
    assert export.agreement >= LEAST
    assert accuracy(logits_on(lambda images: run_onnx(path, images), test, SPEC), test.labels) > 88
