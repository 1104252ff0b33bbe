"""What users of NNI write by habit: ``teacher(batch[0])``, epochs of PTQ, wrapped networks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nni.compression.distillation import DynamicLayerwiseDistiller
from nni.compression.quantization import PtqQuantizer
from torch import Tensor, nn

from zskd_nni.compression.distiller import ZeroShotDistiller
from zskd_nni.compression.evaluator import DataFreeEvaluator, EvaluatorOptions
from zskd_nni.compression.pruning.dependency_config import complete_config_list
from zskd_nni.compression.pruning.speedup import shrink
from zskd_nni.data.sources import NoiseSource
from zskd_nni.models.shared_modules import check_not_wrapped
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.distillation import DistillationSettings

SPEC = (1, 8, 8)
LAYER = [{"op_types": ["Conv2d"], "lambda": 1.0, "apply_method": "mse"}]
INT8 = [{"op_types": ["Conv2d", "Linear"], "target_names": ["_input_", "weight"], "quant_dtype": "int8"}]


class Net(nn.Module):
    """Takes one image without a batch as well, unless it has a BatchNorm."""

    def __init__(self, bn: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8) if bn else nn.Identity()
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn(self.conv1(x))).mean((-2, -1)))


def evaluator(network: nn.Module, **options: Any) -> DataFreeEvaluator:
    teacher = Teacher(network, SPEC)
    rare = EvaluatorOptions(calibration_images=16)
    settings = DistillationSettings(batch=16)
    return DataFreeEvaluator(teacher, NoiseSource(teacher.spec, 16), settings, quiet=True, options=rare, **options)


def distilled(kind: Any, predict: Any, bn: bool) -> dict[str, Tensor]:
    network = Net(bn)
    student = copy.deepcopy(network)
    with torch.no_grad():
        student.conv1.weight.add_(0.05)
    distiller = kind(student, copy.deepcopy(LAYER), evaluator(network), copy.deepcopy(network), predict, 0.0)
    distiller.compress(3, None)
    distiller.unwrap_model()
    return student.state_dict()


@pytest.mark.parametrize("bn", [True, False])
@pytest.mark.parametrize("kind", [ZeroShotDistiller, DynamicLayerwiseDistiller])
def test_the_first_entry_of_a_batch_is_all_of_its_images(kind: Any, bn: bool) -> None:
    expected = distilled(kind, lambda batch, teacher: teacher(batch), bn)
    for predict in (lambda batch, teacher: teacher(batch[0]), lambda batch, teacher: teacher(batch[0].float())):
        actual = distilled(kind, predict, bn)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "predict", [lambda b, t: t(b["images"]), lambda b, t: t(*b, 1, 2), lambda b, t: t(b[0], b[999])]
)
def test_another_form_of_batch_is_answered_with_the_line_to_write(predict: Any) -> None:
    with pytest.raises(UserError, match=r"write teacher_predict=lambda batch, teacher: teacher.batch."):
        distilled(ZeroShotDistiller, predict, True)


@pytest.mark.parametrize(("steps", "epochs"), [(0, None), (3, None), (None, 2)])
@pytest.mark.parametrize("pseudo_labels", [False, True])
def test_a_standalone_ptq_moves_nothing(steps: int | None, epochs: int | None, pseudo_labels: bool) -> None:
    network = Net()
    student = copy.deepcopy(network).train()
    own = evaluator(network, pseudo_labels=pseudo_labels)
    own.source.size = 48
    quantizer = PtqQuantizer(student, INT8, own)
    _, calibration = quantizer.compress(steps, epochs), quantizer.get_calibration_config()
    quantizer.unwrap_model()
    before, after = network.state_dict(), student.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert float(calibration["conv1"]["_input_0"]["scale"]) > 0
    assert student.training


def test_more_steps_of_ptq_are_more_images_that_it_has_seen() -> None:
    class Brighter(NoiseSource):
        """Every step has images of its own brightness."""

        def batch(self, step: int, random: Any = None, student: Any = None) -> Tensor:
            return super().batch(step, random, student) * 0 + min(1.0, 0.1 + step / 10)

    scales = []
    for steps in (0, 8):
        own = evaluator(Net())
        own.source = Brighter(own.teacher.spec, 16)
        quantizer = PtqQuantizer(Net(), INT8, own)
        quantizer.compress(steps, None)
        scales.append(float(quantizer.get_calibration_config()["conv1"]["_input_0"]["scale"]))
    assert scales[1] > 2 * scales[0]


def test_ptq_under_a_distiller_is_trained() -> None:
    network = Net()
    student = copy.deepcopy(network)
    with torch.no_grad():
        student.fc.weight.add_(0.1)
    before = student.fc.weight.detach().clone()
    quantizer = PtqQuantizer(student, INT8, evaluator(network))
    distiller = ZeroShotDistiller.from_compressor(quantizer, [], network)
    distiller.compress(2, None)
    distiller.unwrap_model()
    assert not torch.equal(student.fc.weight, before)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, "wrapped in DataParallel, which hides its layers; pass model.module"),
        (torch.optim.swa_utils.AveragedModel, "wrapped in AveragedModel, .*; pass model.module"),
        (torch.compile, "wrapped in OptimizedModule, .*; pass model._orig_mod"),
        (
            lambda net: nn.Sequential(nn.DataParallel(net)),
            "'0' of the network is wrapped in DataParallel.*model.0.module",
        ),
    ],
)
def test_wrapped_networks_are_refused_with_what_to_pass(wrap: Any, message: str) -> None:
    network, config = wrap(Net()), [{"op_names": ["module.conv1"], "sparse_ratio": 0.5}]
    tries = (
        lambda: check_not_wrapped(network),
        lambda: Teacher(network, SPEC),
        lambda: complete_config_list(network, config, torch.rand(2, *SPEC)),
        lambda: shrink(network, {}, torch.rand(2, *SPEC)),
    )
    for attempt in tries[:3] if wrap is torch.compile else tries:
        with pytest.raises(UserError, match=message):
            attempt()
