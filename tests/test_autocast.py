"""Students trained in bfloat16: what runs in it, what stays in float32, and that the result is as good."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import SMALL, random, small_network, small_teacher
from torch import nn

from zskd_nni.data.sources import StoredSource
from zskd_nni.models.hooks import hooked
from zskd_nni.runtime.device import has_fast_bfloat16
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.distillation import DistillationSettings, distill
from zskd_nni.training.metrics import agreement


def trained(autocast: object, steps: int = 60, **options: object) -> tuple[nn.Module, list[float], set[torch.dtype]]:
    """The student, its losses, and the types of its hidden outputs along the way."""
    images = torch.rand((96, *SMALL.shape), generator=random(3))
    student, seen = small_network(3), set()
    settings = DistillationSettings(
        temperature=4, steps=steps, batch=32, learning_rate=1e-2, features="auto", autocast=autocast
    )  # type: ignore[arg-type]
    with hooked(student, ["hidden"], after=lambda _, output: seen.add(output.dtype)):
        source = StoredSource(images, 32, 5, "set")
        history = distill(student, small_teacher(), source, settings, seed=2, quiet=True, **options)  # type: ignore[arg-type]
    return student, history.losses, seen - ({torch.float32} if autocast is True else set())


def test_the_networks_run_in_bfloat16_and_the_weights_stay_in_float32() -> None:
    plain, losses, types = trained(False)
    assert types == {torch.float32}
    student, rounded_losses, types = trained(True)
    assert types == {torch.bfloat16}
    assert {value.dtype for value in student.state_dict().values()} <= {torch.float32, torch.int64}
    assert rounded_losses[-1] == pytest.approx(losses[-1], rel=0.1)
    probe = torch.rand((500, *SMALL.shape), generator=random(4))
    with torch.no_grad():
        assert agreement(student(probe), plain(probe)) > 0.9


def test_auto_is_what_the_hardware_does_fast() -> None:
    student, _, _ = trained("auto", steps=8)
    same, _, _ = trained(has_fast_bfloat16("cpu"), steps=8)
    assert all(
        torch.equal(a, b) for a, b in zip(student.state_dict().values(), same.state_dict().values(), strict=True)
    )


def test_a_run_is_not_resumed_in_another_precision(tmp_path: Path) -> None:
    trained(True, steps=4, checkpoint=tmp_path / "student.pt")
    with pytest.raises(UserError, match=r"student\.pt"):
        trained(False, steps=4, checkpoint=tmp_path / "student.pt")


def test_other_values_are_refused() -> None:
    with pytest.raises(ValueError, match="autocast is true, false or auto, not 'fast'"):
        DistillationSettings(autocast="fast")  # type: ignore[arg-type]
