"""ZSKT's live generator under NNI: pruned and quantized students, hooks of distillers, resume."""

from __future__ import annotations

import copy
import signal
from pathlib import Path

import pytest
import torch
from helpers import tensors_in
from nni.compression.pruning import AGPPruner, L1NormPruner, TaylorPruner
from nni.compression.quantization import QATQuantizer
from torch import Tensor, nn

from zskd_nni.compression import DataFreeEvaluator, ZeroShotDistiller
from zskd_nni.compression.evaluator import EvaluatorOptions
from zskd_nni.methods.zskt.source import ZsktSettings, ZsktSource
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.models.zoo import lenet5
from zskd_nni.runtime import signals
from zskd_nni.training.distillation import DistillationSettings

torch.set_num_threads(1)
SPEC = InputSpec((1, 32, 32), mean=(0.4,), std=(0.3,))
HALF = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
INT8 = [
    {
        "op_names": ["conv2", "fc1"],
        "target_names": ["weight", "_output_"],
        "quant_dtype": "int8",
        "quant_scheme": "affine",
        "granularity": "default",
    }
]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher(lenet5(), SPEC)


def student_of(kind: str, teacher: Teacher, checkpoint: Path | None = None) -> tuple[dict[str, Tensor], ZsktSource]:
    torch.manual_seed(1)
    source = ZsktSource(teacher, ZsktSettings(rounds=4, student_steps=3, latent=10, width=16), 8, seed=2)
    settings = DistillationSettings(temperature=1.0, steps=10, batch=8, warmup=0)
    evaluator = DataFreeEvaluator(teacher, source, settings, checkpoint=checkpoint, quiet=True)
    student = lenet5()
    if kind == "l1":
        below = L1NormPruner(student, HALF, evaluator)
        below.compress()
    elif kind == "agp taylor":
        below = AGPPruner(TaylorPruner(student, HALF, evaluator, training_steps=2), 3, 3)
    else:
        below = QATQuantizer(student, INT8, evaluator)
    distiller = ZeroShotDistiller.from_compressor(below, [], teacher, temperature=1.0)
    network = distiller.compress(10, None)
    return {name: value.detach().clone() for name, value in network.state_dict().items()}, source


@pytest.mark.parametrize("kind", ["l1", "agp taylor", "qat"])
def test_any_compressed_student_is_what_the_generator_plays_against(teacher, kind, tmp_path, monkeypatch):
    undisturbed, source = student_of(kind, teacher)
    fresh = ZsktSource(teacher, source.settings, 8, seed=2)
    moved = [
        not torch.equal(a, b) for a, b in zip(source.generator.parameters(), fresh.generator.parameters(), strict=True)
    ]
    assert all(moved[:-1]), "the generator has learnt"
    if kind != "qat":
        masks = [value for name, value in undisturbed.items() if "mask" in name and value.ndim == 4]
        assert masks and all(0.3 < float((mask == 0).float().mean()) < 0.7 for mask in masks)

    path, steps = tmp_path / "state.pt", []

    def stop() -> None:
        steps.append(1)
        if len(steps) == 5:
            raise signals.Interrupted(signal.SIGTERM)

    monkeypatch.setattr(signals, "check", stop)
    with pytest.raises(signals.Interrupted):
        student_of(kind, teacher, path)
    resumed, again = student_of(kind, teacher, path)
    assert len(steps) == 10
    assert resumed.keys() == undisturbed.keys()
    assert [name for name, value in resumed.items() if not torch.equal(value, undisturbed[name])] == []
    assert all(
        torch.equal(a, b) for a, b in zip(source.generator.parameters(), again.generator.parameters(), strict=True)
    )


def test_calibration_does_not_train_the_generator(teacher):
    source = ZsktSource(teacher, ZsktSettings(rounds=4, latent=10, width=16), 8, seed=2)
    evaluator = DataFreeEvaluator(teacher, source, quiet=True, options=EvaluatorOptions(calibration_images=20))
    before = copy.deepcopy(source.state_dict())
    network = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))
    evaluator._init_optimizer_helpers(network)
    evaluator.bind_model(network)
    assert evaluator.calibration_set().shape == (20, 1, 32, 32)
    after = dict(tensors_in(source.state_dict()))
    assert after and all(torch.equal(value, after[name]) for name, value in tensors_in(before))
