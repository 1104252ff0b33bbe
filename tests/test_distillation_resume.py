"""A distillation that was stopped goes on as if it never had been, channels last and fused optimiser included."""

from __future__ import annotations

import pytest
import torch
from helpers import digits_network

from zskd_nni import interrupt
from zskd_nni.distillation import DistillationSettings, distill
from zskd_nni.inputs import InputSpec
from zskd_nni.teacher import Teacher
from zskd_nni.transfer import NoiseSource
from zskd_nni.zoo import lenet5_half

STEPS = 20


def taught(checkpoint, stop_at=None, monkeypatch=None):
    teacher = Teacher(digits_network(), InputSpec((1, 32, 32)))
    torch.manual_seed(3)
    student = lenet5_half()
    if stop_at is not None:
        calls = iter(range(1, STEPS + 1))

        def check() -> None:
            if next(calls) == stop_at:
                raise interrupt.Interrupted(2)

        monkeypatch.setattr(interrupt, "check", check)
        with pytest.raises(interrupt.Interrupted):
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
    undisturbed = taught(tmp_path / "a.safetensors")
    resumed = taught(tmp_path / "b.safetensors", stop_at=10, monkeypatch=monkeypatch)
    for name, value in undisturbed.items():
        assert torch.equal(value, resumed[name]), name
