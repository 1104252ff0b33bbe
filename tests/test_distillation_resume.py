"""A stopped distillation ends like one that was never stopped, with channels-last memory and the fused optimiser."""

from __future__ import annotations

import pytest
import torch
from helpers import digits_network

from zskd_nni.data.sources import NoiseSource
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.models.zoo import lenet5_half
from zskd_nni.runtime import signals
from zskd_nni.training.distillation import DistillationSettings, distill

STEPS = 20


def train(checkpoint, stop_at=None, monkeypatch=None):
    teacher = Teacher(digits_network(), InputSpec((1, 32, 32)))
    torch.manual_seed(3)
    student = lenet5_half()
    if stop_at is not None:
        calls = iter(range(1, STEPS + 1))

        def check() -> None:
            if next(calls) == stop_at:
                raise signals.Interrupted(2)

        monkeypatch.setattr(signals, "check", check)
        with pytest.raises(signals.Interrupted):
            run(student, teacher, checkpoint)
        monkeypatch.undo()
        torch.manual_seed(4)
        student = lenet5_half()  # a new process knows nothing
    run(student, teacher, checkpoint)
    return student.state_dict()


def run(student, teacher, checkpoint):
    settings = DistillationSettings(steps=STEPS, batch=16, learning_rate=5e-3)
    distill(student, teacher, NoiseSource(teacher.spec, 16), settings, checkpoint=checkpoint, quiet=True)


def test_convolutions_of_many_channels_resume_bit_by_bit(tmp_path, monkeypatch):
    undisturbed = train(tmp_path / "a.safetensors")
    resumed = train(tmp_path / "b.safetensors", stop_at=10, monkeypatch=monkeypatch)
    for name, value in undisturbed.items():
        assert torch.equal(value, resumed[name]), name
