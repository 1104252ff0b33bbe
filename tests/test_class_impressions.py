"""Class impressions: one-hot targets, all classes equally often, nothing drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import digits_network, random, small_teacher

from zskd_nni.methods.class_impressions import ClassImpressionSettings, ClassTargets
from zskd_nni.methods.registry import TransferRequest, find_method
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher


def linear_teacher(classes: int) -> Teacher:
    return Teacher(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, classes)), InputSpec((1, 2, 2)))


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_one_hot_in_turn(classes: int) -> None:
    plan = ClassTargets(linear_teacher(classes), ClassImpressionSettings())
    parts = torch.cat([plan.targets(first, 50, 300, seed=first) for first in range(0, 300, 50)])
    assert torch.equal(parts.argmax(1), torch.arange(300) % classes)
    assert torch.equal(parts.sort(1).values[:, -2:], torch.tensor([0.0, 1.0]).expand(300, 2))


def test_smoothing() -> None:
    targets = ClassTargets(linear_teacher(5), ClassImpressionSettings(smoothing=0.1)).targets(3, 2, 9, 0)
    np.testing.assert_allclose(
        targets.numpy(), [[0.02, 0.02, 0.02, 0.92, 0.02], [0.02, 0.02, 0.02, 0.02, 0.92]], rtol=1e-6
    )
    for bad in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"smoothing must lie in \[0, 1\)"):
            ClassImpressionSettings(smoothing=bad)


def test_presets_fit_images_as_zskd_does() -> None:
    method = find_method("class-impressions")
    assert method.presets == ("paper", "best", "best-colour")
    for preset in method.presets:
        assert method.options(preset, {}).synthesis == find_method("zskd").options(preset, {}).synthesis
        assert method.options(preset, {}).targets.smoothing == 0
    assert method.options("best", {"targets": {"smoothing": 0.2}}).targets.smoothing == 0.2
    with pytest.raises(ValueError, match="class-impressions has paper, best, best-colour, not 'author-code'"):
        method.options("author-code", {})


def test_the_teacher_sees_the_classes_in_the_impressions(tmp_path: Path) -> None:
    teacher = Teacher(digits_network(), InputSpec((1, 32, 32)))
    method = find_method("class-impressions")
    options = method.options("paper", {"synthesis": {"max_steps": 25}})
    source = method.source(teacher, TransferRequest(40, 40, 0, tmp_path / "i", options, quiet=True))
    seen = teacher(source.images[:].float()).argmax(1)
    assert float((seen == torch.arange(40) % 10).double().mean()) > 0.95
    assert source.batch(0, random(0)).shape == (40, 1, 32, 32)


def test_a_store_is_no_other_methods(tmp_path: Path) -> None:
    teacher, method = small_teacher(), find_method("class-impressions")
    sources = [
        method.source(
            teacher,
            TransferRequest(
                20,
                5,
                0,
                tmp_path / str(smoothing),
                method.options("paper", {"targets": {"smoothing": smoothing}, "synthesis": {"max_steps": 2}}),
                quiet=True,
            ),
        )
        for smoothing in (0.0, 0.1)
    ]
    assert sources[0].fingerprint != sources[1].fingerprint
