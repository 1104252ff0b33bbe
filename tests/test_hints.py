"""Hidden layers that are matched in addition to the logits: which ones, by which loss, and that the distance falls."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import SMALL, random, small_network, small_teacher
from torch import nn

from zskd_nni.compression.pruning.prune import prune
from zskd_nni.data.sources import NoiseSource
from zskd_nni.models.hooks import recording_outputs
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.models.zoo import alexnet, alexnet_half, lenet5, lenet5_half
from zskd_nni.recipes.compression_config import PruningConfig
from zskd_nni.recipes.load import load_recipe
from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.distillation import DistillationSettings, distill
from zskd_nni.training.hints import Hint, find_hints
from zskd_nni.training.losses import feature_loss


def test_the_loss_is_the_share_of_variance_that_is_missed() -> None:
    teacher = torch.randn((500, 7), generator=random(1)) * torch.linspace(0.5, 3, 7) + 2
    assert float(feature_loss(teacher, teacher)) == 0
    mean = teacher.mean(0, keepdim=True).expand_as(teacher)
    assert float(feature_loss(mean, teacher)) == pytest.approx(1, rel=1e-5)
    wrong = teacher + 1
    slow = sum(
        float(((wrong[:, j] - teacher[:, j]) ** 2).mean()) for j in range(7)
    ) / sum(float(((teacher[:, j] - teacher[:, j].mean()) ** 2).mean()) for j in range(7))  # fmt: skip
    assert float(feature_loss(wrong, teacher)) == pytest.approx(slow, rel=1e-5)
    assert torch.isfinite(feature_loss(wrong, torch.ones_like(teacher)))  # a layer that is dead on this batch


def paths(hints: tuple[Hint, ...]) -> list[tuple[str, str]]:
    return [(hint.teacher, hint.student) for hint in hints]


def test_auto_finds_the_layers_of_equal_shape_but_not_the_classifier() -> None:
    teacher = Teacher(lenet5(), InputSpec((1, 32, 32)))
    assert paths(find_hints(lenet5_half(), teacher, "auto")) == [("fc1", "fc1"), ("fc2", "fc2")]
    assert find_hints(lenet5_half(), teacher, "none") == ()
    assert [hint.student for hint in find_hints(lenet5(), teacher, "auto")] == ["conv1", "conv2", "fc1", "fc2"]
    assert find_hints(alexnet_half(), Teacher(alexnet(), InputSpec((3, 32, 32))), "auto") == ()
    student = small_network().train()
    student.norm.eval()
    find_hints(student, small_teacher(), "auto")
    assert student.training and not student.norm.training, "modes are as they were"
    assert not any(module._forward_hooks for module in student.modules())


def test_auto_matches_the_channels_that_pruning_kept() -> None:
    """The BatchNorm layer behind each layer, if there is one, against the teacher's own channels."""
    teacher = Teacher(alexnet(), InputSpec((3, 32, 32)))
    names = [f"bn{number}" for number in range(1, 8)]
    assert [hint.student for hint in find_hints(alexnet(), teacher, "auto")] == names
    kept = {"bn2": torch.arange(64) * 2, "bn6": torch.arange(255), "conv1": torch.arange(24)}
    (hint,) = find_hints(alexnet_half(), teacher, "auto", kept)
    assert (hint.teacher, hint.student) == ("bn2", "bn2"), "bn6 keeps another number, conv1 is no BatchNorm layer"
    outputs = torch.randn((3, 128, 7, 7), generator=random(2))
    assert torch.equal(hint.teacher_part(outputs), outputs[:, ::2])


def test_a_pruned_student_is_led_back_to_the_channels_it_kept() -> None:
    """The channels of a layer behind the pruned ones, which were the teacher's to the bit, come back."""
    teacher = small_teacher()
    config = PruningConfig([{"op_names": ["conv"], "sparse_ratio": 0.5}])
    pruned = prune(teacher.student(), config, teacher, None)
    assert set(pruned.kept_channels) >= {"conv", "norm"}
    source = NoiseSource(SMALL, 64)
    settings = DistillationSettings(
        temperature=4, steps=150, batch=64, learning_rate=5e-3, warmup=5, features="auto", feature_weight=10
    )
    probe = torch.rand((256, *SMALL.shape), generator=random(9))

    def distance(network: nn.Module) -> float:
        with torch.no_grad(), recording_outputs(teacher.model, ["norm"]) as theirs:
            teacher(probe)
        with torch.no_grad(), recording_outputs(network, ["norm"]) as ours:
            network(SMALL.normalise(probe))
        return float(feature_loss(ours["norm"], theirs["norm"][:, pruned.kept_channels["norm"]]))

    network = copy.deepcopy(pruned.network)
    for parameter in network.conv.parameters():
        parameter.data += 0.3
    before = distance(network)
    distill(network, teacher, source, settings, pruned.kept_channels, quiet=True)
    assert distance(network) < 0.5 * before


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ((("nowhere", "hidden"),), "the teacher has no module 'nowhere'"),
        ((("hidden", "nowhere"),), "the student has no module 'nowhere'"),
        ((("hidden", "conv"),), r"'hidden' gives \[24\] .* 'conv' \[6, 3, 3\]"),
    ],
)
def test_pairs_that_cannot_be_matched_are_refused(pairs: tuple[tuple[str, str], ...], said: str) -> None:
    settings = DistillationSettings(steps=2, batch=4, features=pairs)
    with pytest.raises(UserError, match=said):
        distill(small_network(1), small_teacher(), NoiseSource(SMALL, 4), settings, quiet=True)


def test_matched_layers_come_nearer_than_unmatched_ones_and_unused_settings_change_nothing() -> None:
    teacher = small_teacher()

    def distance(**settings: object) -> tuple[float, nn.Module]:
        student = small_network(3)
        told = DistillationSettings(steps=150, batch=32, learning_rate=5e-3, **settings)  # type: ignore[arg-type]
        distill(student, teacher, NoiseSource(SMALL, 32), told, seed=2, quiet=True)
        images = torch.rand((200, *SMALL.shape), generator=random(4))
        with torch.no_grad(), recording_outputs(teacher.model, ["hidden"]) as wanted:
            teacher(images)
        with torch.no_grad(), recording_outputs(student, ["hidden"]) as seen:
            student(images)
        return float(feature_loss(seen["hidden"], wanted["hidden"])), student

    plain, student = distance()
    matched, other = distance(features="auto", feature_weight=2.0)
    named, _ = distance(features=(("hidden", "hidden"),), feature_weight=2.0)
    assert matched < 0.5 * plain and named < 0.5 * plain
    weightless, same = distance(features="auto", feature_weight=0.0)
    assert weightless == plain
    pairs = zip(student.state_dict().values(), same.state_dict().values(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert not any(module._forward_hooks for module in (*other.modules(), *teacher.model.modules()))


def test_a_stopped_training_with_matched_layers_goes_on_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DistillationSettings(steps=12, batch=8, features="auto")

    def trained_student(checkpoint: Path) -> dict[str, torch.Tensor]:
        student = small_network(3)
        distill(student, small_teacher(), NoiseSource(SMALL, 8), settings, checkpoint=checkpoint, quiet=True)
        return student.state_dict()

    whole = trained_student(tmp_path / "whole.pt")
    calls = iter(range(12))

    def check() -> None:
        if next(calls) == 5:
            raise signals.Interrupted(2)

    monkeypatch.setattr(signals, "check", check)
    with pytest.raises(signals.Interrupted):
        trained_student(tmp_path / "stopped.pt")
    monkeypatch.undo()
    again = trained_student(tmp_path / "stopped.pt")
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_recipes_take_the_keys() -> None:
    loaded = load_recipe("digits-prune50", ["distillation.features=auto", "distillation.feature_weight=2"])
    assert loaded.recipe.distillation.features == "auto"
    loaded = load_recipe("digits-prune50", ["distillation.features=[[fc1, fc1]]"])
    assert loaded.recipe.distillation.features == (("fc1", "fc1"),)
    with pytest.raises(UserError, match="features is none, auto, or pairs"):
        load_recipe("digits-prune50", ["distillation.features=all"])
    with pytest.raises(UserError, match="feature_weight must not be negative"):
        load_recipe("digits-prune50", ["distillation.feature_weight=-1"])
