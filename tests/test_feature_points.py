"""Points inside a network: features are recorded and replaced, and no hook stays."""

from __future__ import annotations

import pytest
import torch
from helpers import SMALL, random, small_teacher
from torch import Tensor

from zskd_nni.models.hooks import FeaturePoint, module_at, recording_features, replacing
from zskd_nni.runtime.errors import UserError


def images(count: int = 4, seed: int = 0) -> Tensor:
    return torch.rand((count, *SMALL.shape), generator=random(seed))


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_what_passes_is_what_the_network_computes() -> None:
    teacher = small_teacher()
    x = images()
    with (
        recording_features(teacher.model, FeaturePoint("head", "input")) as before,
        recording_features(teacher.model, FeaturePoint("hidden")) as hidden,
    ):
        logits = teacher(x)
        teacher(x)
    assert len(before) == len(hidden) == 2
    assert torch.equal(before[0], torch.tanh(hidden[0]))
    assert torch.equal(teacher.model.head(before[0]), logits)
    assert hooks_of(teacher.model) == 0


@pytest.mark.parametrize(("path", "side"), [("head", "input"), ("hidden", "output"), ("conv", "output")])
def test_replacing_puts_the_rest_of_the_network_behind_given_features(path: str, side: str) -> None:
    teacher = small_teacher()
    point = FeaturePoint(path, side)
    with recording_features(teacher.model, point) as seen:
        expected = teacher(images(seed=1))
    with replacing(teacher.model, point, seen[0]):
        torch.testing.assert_close(teacher(images(seed=2)), expected)
    assert not torch.allclose(teacher(images(seed=2)), expected)
    assert hooks_of(teacher.model) == 0


def test_hooks_are_gone_when_the_forward_pass_fails() -> None:
    teacher = small_teacher()
    for context in (
        recording_features(teacher.model, FeaturePoint("head")),
        replacing(teacher.model, FeaturePoint("head"), images()),
    ):
        with pytest.raises(RuntimeError), context:
            teacher(torch.rand(2, 3, 8, 8))
    assert hooks_of(teacher.model) == 0


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"The student has no module 'haed'; its last ones: .*head"):
        module_at(small_teacher().model, "haed", "The student")
