"""Students trained on another device: their results are those of the CPU, and no step waits for the device."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, apart, small_network, small_teacher
from torch import Tensor, nn

from zskd_nni.data.augmentation import Augmentation, augment
from zskd_nni.data.datasets import LabelledImages
from zskd_nni.data.sources import NoiseSource, StoredSource, TransferSource, cache_on_device
from zskd_nni.methods.zskt.method import PRESETS
from zskd_nni.methods.zskt.source import ZsktSettings, ZsktSource
from zskd_nni.methods.zskt.train import train_zskt
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.research.baselines.kd_at import KdAtSettings, train_kd_at
from zskd_nni.research.baselines.labelled import train_on_labels
from zskd_nni.runtime import signals
from zskd_nni.training.distillation import DistillationSettings, distill
from zskd_nni.training.metrics import mean_transition_error, transition_curves
from zskd_nni.training.supervised import SupervisedSettings, train_supervised

Waits = Callable[[], contextlib.AbstractContextManager[Counter[str]]]

HERE = torch.device("cpu")
EVERYTHING = Augmentation(
    rotation=20, translation=0.2, scale=(0.8, 1.2), shear=10, flip=0.5, contrast=0.3, noise=0.05, erase=0.4
)
GAME: dict[str, Any] = {"rounds": 6, "batch": 16, "latent": 10, "width": 16, "student_steps": 4}
MEMORY: dict[str, Any] = {**PRESETS["best"], "memory": 64, "new_images": 16, "filling": 2, "figures": 8}
SHIFTED = InputSpec((1, 8, 8), mean=(0.3,), std=(0.5,))


def images(count: int = 48) -> Tensor:
    return torch.rand((count, *SMALL.shape), generator=torch.Generator().manual_seed(3))


def labelled(count: int = 80) -> LabelledImages:
    drawn = torch.randint(0, 256, (count, *SMALL.shape), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    return LabelledImages(drawn, drawn.float().mean((1, 2, 3)).long() % 5, "made up")


def teacher_at(place: torch.device, spec: InputSpec = SMALL) -> Teacher:
    return Teacher(small_network(), spec).to(place)


def source_for(kind: str, teacher: Teacher, batch: int = 16) -> TransferSource:
    if kind == "stored":
        return StoredSource(images(), batch, 5, "set", teacher.device)
    if kind == "noise":
        return NoiseSource(teacher.spec, batch)
    game = {**GAME, **(MEMORY if kind == "memory" else {"latents": kind})}
    return ZsktSource(teacher, ZsktSettings(**game), batch, 7)


def close(first: nn.Module, second: nn.Module, tolerance: float = 0.05) -> None:
    """Two short trainings whose sums may round otherwise: not their weights (a bias before BatchNorm goes anywhere),
    but their answers, up to this part of how far these spread."""
    with torch.no_grad():
        expected, answers = (copy.deepcopy(net).cpu().eval()(images()) for net in (first, second))
    assert float((answers - expected).abs().max()) < tolerance * float(expected.std())


@pytest.mark.parametrize("border", ["zeros", "border"])
def test_augmented_images_are_the_same(border: str, device: torch.device) -> None:
    settings = Augmentation(**{**vars(EVERYTHING), "border": border})
    made = [augment(images().to(place), settings, torch.Generator().manual_seed(0)) for place in (HERE, device)]
    assert made[1].device == device
    torch.testing.assert_close(made[1].cpu(), made[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["stored", "noise", "same", "fresh", "memory"])
def test_a_student_learns_the_same(kind: str, device: torch.device) -> None:
    settings = DistillationSettings(
        temperature=4, steps=12, batch=16, warmup=2, features=[["hidden", "hidden"]], augmentation=EVERYTHING
    )
    students, losses = [], []
    for place in (HERE, device):
        student, teacher = small_network(1).to(place), teacher_at(place, SHIFTED)
        losses.append(distill(student, teacher, source_for(kind, teacher), settings, seed=2, quiet=True).losses)
        students.append(student)
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    close(*students)


@pytest.mark.parametrize("preset", ["paper", "fresh"])
def test_belief_matching_as_published(preset: str, device: torch.device) -> None:
    students = []
    for place in (HERE, device):
        students.append(small_network(3).to(place))
        train_zskt(students[-1], teacher_at(place), ZsktSettings(**{**GAME, **PRESETS[preset]}), seed=5, quiet=True)
    close(*students)


def test_belief_matching_in_bfloat16(device: torch.device) -> None:
    if device.type == "elsewhere":
        pytest.skip("a device that is made up has no precision of its own")
    losses = [
        train_zskt(
            small_network(3).to(device), teacher_at(device), ZsktSettings(**GAME, autocast=low), seed=5, quiet=True
        ).losses
        for low in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_baselines_that_read_labels(device: torch.device) -> None:
    students: dict[str, list[nn.Module]] = {"labels": [], "few": [], "teacher": []}
    schedule = DistillationSettings(temperature=4, steps=10, batch=16, warmup=2, augmentation=EVERYTHING)
    for place in (HERE, device):
        for several in students.values():
            several.append(small_network(1).to(place))
        where = str(place)
        train_on_labels(students["labels"][-1], labelled(), SMALL, schedule, device=where, quiet=True)
        few = KdAtSettings(attention=[["conv", "conv"]], optimizer="student")
        train_kd_at(students["few"][-1], teacher_at(place), labelled(), few, schedule, quiet=True)
        recipe = SupervisedSettings(epochs=2, batch=16, augmentation=EVERYTHING)
        train_supervised(students["teacher"][-1], labelled(), SMALL, recipe, device=where, quiet=True)
    for here, there in students.values():
        close(here, there)


@pytest.mark.parametrize("kind", ["stored", "memory"])
def test_stopped_and_gone_on_with(kind: str, device: torch.device, tmp_path: Path) -> None:
    settings = DistillationSettings(temperature=4, steps=60, batch=16, warmup=2, augmentation=EVERYTHING)

    def run(student: nn.Module, **options: Any) -> list[float]:
        teacher = teacher_at(device)
        history = distill(student, teacher, source_for(kind, teacher), settings, quiet=True, **options)
        assert history.steps == [50, 60]
        return history.losses

    whole, calls = small_network(1).to(device), [0]
    losses = run(whole)
    stopped = small_network(1).to(device)

    def stop(done: int) -> None:
        calls[0] = done
        if done == 23:
            os.kill(os.getpid(), signal.SIGTERM)

    kept = tmp_path / "c.pt"
    with pytest.raises(signals.Interrupted), signals.stoppable():
        run(stopped, checkpoint=kept, after_step=stop)
    assert calls[0] == 23
    again = small_network(1).to(device)
    assert run(again, checkpoint=kept) == pytest.approx(losses, rel=1e-3)
    close(whole, again)


@pytest.mark.parametrize("kind", ["stored", "noise", "same", "fresh", "memory"])
def test_no_step_waits_for_the_device(kind: str, device: torch.device, waits: Waits) -> None:
    """The mean of the losses is asked for every 50 steps; between them there is nothing to wait for."""
    counts = []
    for steps in (11, 41):
        teacher, student = teacher_at(device), small_network(1).to(device)
        settings = DistillationSettings(temperature=4, steps=steps, batch=16, warmup=2, augmentation=EVERYTHING)
        source = source_for(kind, teacher)
        with waits() as found:
            distill(student, teacher, source, settings, quiet=True)
        counts.append(found)
    assert counts[1] == counts[0]


def test_no_step_of_a_game_waits(device: torch.device, waits: Waits) -> None:
    counts = []
    for rounds in (2, 8):
        student = small_network(3).to(device)
        settings = ZsktSettings(**{**GAME, "rounds": rounds, "attention": [["conv", "conv"]]})
        teacher = teacher_at(device)
        with waits() as found:
            train_zskt(student, teacher, settings, seed=5, quiet=True)
        counts.append(found)
    assert counts[1] == counts[0]


def test_a_set_is_brought_to_the_device_once_if_there_is_room(device: torch.device) -> None:
    near = cache_on_device(images(), device)
    assert near.device == device
    assert torch.equal(near[torch.arange(48).to(device)].cpu(), images())
    assert cache_on_device(near, device) is near

    class Huge:
        device = torch.device("cpu")

        def __len__(self) -> int:
            return 10**5

        def __getitem__(self, rows: Tensor) -> Tensor:
            return torch.zeros(len(rows), 3, 512, 512)

    huge = Huge()
    assert cache_on_device(huge, device) is huge
    source = StoredSource(huge, 2, 0, "huge", device)
    assert source.batch(0, torch.Generator()).shape == (2, 3, 512, 512)


def test_transitions(device: torch.device, waits: Waits) -> None:
    found, errors = [], []
    for place in (HERE, device):
        student, teacher = small_network(1).to(place), teacher_at(place)
        errors.append(mean_transition_error(student, teacher, images().to(place), steps=10).error)
        with waits() as count:
            transition_curves(student, teacher, images().to(place), torch.zeros(48, dtype=torch.long), steps=30)
        found.append(sum(count.values()))
    assert errors[1] == pytest.approx(errors[0], rel=0.01)
    assert found[1] < 10, "not two for each step"


def test_answers_are_the_same(device: torch.device) -> None:
    teacher = small_teacher()
    moved = copy.deepcopy(teacher).to(device)
    torch.testing.assert_close(moved.predict(images()), teacher.predict(images()), rtol=1e-3, atol=1e-3)
    assert apart(moved, small_network(1).to(device), images().to(device)) == pytest.approx(
        apart(teacher, small_network(1), images()), rel=0.01
    )
