"""Students narrower than their teacher: regressors of hidden layers, and the teacher's channels to start from."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, SmallNet, random, small_network, small_teacher
from torch import Tensor, nn

from zskd_nni.compression.pruning.teacher_start import start_from_teacher
from zskd_nni.data.sources import StoredSource
from zskd_nni.models.hooks import recording_outputs
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher, load_teacher
from zskd_nni.models.zoo import alexnet, alexnet_half, lenet5, lenet5_half
from zskd_nni.pipeline import Run
from zskd_nni.recipes.load import load_recipe
from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.distillation import DistillationSettings, distill
from zskd_nni.training.hints import find_hints


def narrow_network(seed: int = 1) -> SmallNet:
    """Half of the channels and two thirds of the hidden units of ``small_network``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallNet()
        network.conv, network.norm = nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3)
        network.hidden, network.head = nn.Linear(27, 16), nn.Linear(16, 5)
    return network


def images(count: int = 64) -> Tensor:
    return torch.rand((count, *SMALL.shape), generator=random(3))


def source() -> StoredSource:
    return StoredSource(images(), 16, 5, "set")


def settings(**more: Any) -> DistillationSettings:
    return DistillationSettings(
        **{"temperature": 4, "steps": 60, "batch": 16, "warmup": 2, "learning_rate": 0.01, **more}
    )


def explained(student: nn.Module, teacher: Teacher, layer: str) -> float:
    """Share of the teacher's hidden outputs that a linear map of the student's explains, by least squares."""
    with (
        torch.no_grad(),
        recording_outputs(teacher.model, [layer]) as theirs,
        recording_outputs(student, [layer]) as ours,
    ):
        teacher(images()), student.eval()(images())
    found = ours[layer].movedim(1, -1).flatten(0, -2)
    wanted = theirs[layer].movedim(1, -1).flatten(0, -2)
    found = torch.cat([found, torch.ones(len(found), 1)], 1).double()
    left = wanted - found @ torch.linalg.lstsq(found, wanted.double()).solution
    return 1 - float(left.square().sum() / (wanted - wanted.mean(0)).square().sum())


def test_layers_of_other_widths_are_matched_where_regressors_may_be_trained() -> None:
    teacher = Teacher(alexnet(), InputSpec((3, 32, 32)))
    assert find_hints(alexnet_half(), teacher, "auto") == ()
    hints = find_hints(alexnet_half(), teacher, "auto", regressors=True)
    assert [hint.student for hint in hints] == [f"bn{number}" for number in range(1, 8)]
    assert hints[1].widths == (64, 128)
    lenet = find_hints(lenet5_half(), Teacher(lenet5(), InputSpec((1, 32, 32))), "auto", regressors=True)
    assert [(hint.student, hint.widths) for hint in lenet] == [
        ("conv1", (3, 6)),
        ("conv2", (8, 16)),
        ("fc1", None),
        ("fc2", None),
    ]
    smaller = Teacher(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 5)), SMALL)
    other = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.Flatten(), nn.Linear(18, 5))
    assert find_hints(other, smaller, "auto", regressors=True) == (), "another place in the image is no channel"


def test_regressors_lead_hidden_layers_to_the_teachers() -> None:
    teacher, share = small_teacher(), {}
    for regressors in (False, True):
        student = narrow_network()
        chosen = settings(features="auto", regressors=regressors, feature_weight=5.0, steps=150)
        distill(student, teacher, source(), chosen, quiet=True)
        assert sorted(student.state_dict()) == sorted(narrow_network().state_dict()), "the regressors are thrown away"
        share[regressors] = explained(student, teacher, "hidden")
    assert share[True] > share[False] + 0.05, share


def test_a_training_with_regressors_is_resumed_to_the_bit(tmp_path: Path) -> None:
    teacher, chosen = small_teacher(), settings(features="auto", regressors=True)
    whole, stopped = narrow_network(), narrow_network()
    distill(whole, teacher, source(), chosen, quiet=True)
    options: dict[str, Any] = {"checkpoint": tmp_path / "checkpoint.pt", "quiet": True}

    def stop(done: int) -> None:
        if done == 23:
            raise signals.Interrupted(2)

    with pytest.raises(signals.Interrupted):
        distill(stopped, teacher, source(), chosen, after_step=stop, checkpoint_every=0.0, **options)
    resumed = narrow_network(9)
    distill(resumed, teacher, source(), chosen, **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_student_as_wide_as_its_teacher_starts_as_the_teacher() -> None:
    teacher, student = small_teacher(), small_network(7)
    assert start_from_teacher(student, teacher) == {}
    assert torch.equal(student.eval()(images()), teacher.model(images()))


def test_a_narrower_student_starts_with_the_channels_of_the_largest_norms() -> None:
    teacher, student = load_teacher("lenet5-digits"), lenet5_half()
    weights = copy.deepcopy(teacher.model.state_dict())
    kept = start_from_teacher(student, teacher)
    norms = weights["conv1.weight"].abs().sum((1, 2, 3))
    assert sorted(kept["conv1"].tolist()) == sorted(norms.topk(3).indices.tolist())
    chosen = weights["conv2.weight"][kept["conv2"]][:, kept["conv1"]]
    assert torch.equal(student.conv2.weight, chosen)
    assert torch.equal(student.conv2.bias, weights["conv2.bias"][kept["conv2"]])
    hints = find_hints(student, teacher, "auto", kept)
    assert [hint.student for hint in hints] == ["conv1", "conv2", "fc1", "fc2"], "kept channels need no regressor"
    assert all(torch.equal(value, weights[name]) for name, value in teacher.model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"conv": nn.Conv2d(1, 9, 3, stride=2), "norm": nn.BatchNorm2d(9)}, "student's conv has 9 channels.* only 6"),
        ({"hidden": nn.Sequential(nn.Linear(54, 24))}, "student's hidden.0 has 24 channels.*no such layer"),
        ({"hidden": nn.Linear(54, 24, bias=False)}, r"student's hidden\.bias is missing.*\[24\]"),
    ],
)
def test_another_network_cannot_start_from_the_teacher(change: dict[str, nn.Module], sentence: str) -> None:
    student = small_network()
    for name, layer in change.items():
        setattr(student, name, layer)
    with pytest.raises(UserError, match=re.compile(sentence, re.DOTALL)):
        start_from_teacher(student, small_teacher())


def test_a_recipe_names_the_start_and_the_report_tells_it(tmp_path: Path) -> None:
    changes = [
        "compression.pruning=null",
        "compression.quantization=null",
        "student={model: 'zoo:lenet5_half', start: teacher}",
        *("transfer.size=20", "transfer.held_out=10", "transfer.synthesis.max_steps=2", "distillation.features=auto"),
        *("distillation.steps=3", "distillation.batch=10", "controls=[none]", "evaluation=null"),
    ]
    report = Run(load_recipe("digits-prune50", changes), tmp_path, quiet=True).compress()
    assert report["start"] == {
        "from": "teacher",
        "channels": {"conv1": 3, "conv2": 8, "fc1": 120, "fc2": 84, "fc3": 10},
    }
    assert [pair[1] for pair in report["history"]["features"]] == ["conv1", "conv2", "fc1", "fc2"]
    with pytest.raises(UserError, match="student: start: teacher and weights exclude each other"):
        load_recipe("digits-prune50", ["student={model: 'zoo:lenet5', start: teacher, weights: x.safetensors}"])


def test_channels_kept_of_a_student_from_the_teacher_are_counted_as_the_teachers(tmp_path: Path) -> None:
    changes = [
        "transfer.size=4",
        "transfer.held_out=4",
        "transfer.synthesis.max_steps=1",
        "compression.pruning.steps=0",
    ]
    changes.append("transfer.synthesis.max_steps=1")
    changes += ["student={model: zoo:lenet5_half, start: teacher}", "evaluation=null", "compression.quantization=null"]
    run = Run(load_recipe("digits-prune50", changes), tmp_path / "out", quiet=True)
    pruned = run.students._pruned("student", run.transfer(), train=False)
    theirs = run.teacher.model.get_submodule("conv1").weight[pruned.kept["conv1"]]
    assert torch.equal(pruned.network.get_submodule("conv1").weight, theirs)


@pytest.mark.parametrize("dropout", [True, False])
def test_dropout_rests_only_where_it_is_asked_to(dropout: bool) -> None:
    class Noted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.drop, self.zeros = small_network(), nn.Dropout(0.9), 0

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.drop(torch.ones(100))
            self.zeros += int((hidden == 0).sum()) if self.training else 0
            return self.network(x)

    student = Noted()
    distill(student, small_teacher(), source(), settings(steps=3, dropout=dropout), quiet=True)
    assert (student.zeros > 0) is dropout
    assert student.drop.p == 0.9, "its own again"
