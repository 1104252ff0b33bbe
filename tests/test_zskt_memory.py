"""ZSKT's ``best``: memory, classes and BatchNorm statistics against a plain loop; resume and divergence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, apart, random, small_network, small_teacher, tensors_in
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.data.procedural import start_images
from zskd_nni.methods.registry import TransferRequest, default_preset, find_method
from zskd_nni.methods.zskt.generator import ImageGenerator, new_generator
from zskd_nni.methods.zskt.source import ZsktSettings, ZsktSource
from zskd_nni.methods.zskt.train import train_zskt
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.rng import generator
from zskd_nni.training.distillation import DistillationSettings, distill
from zskd_nni.training.losses import total_variation

SHIFTED = InputSpec((1, 8, 8), mean=(0.3,), std=(0.5,))
SHORT: dict[str, Any] = {
    "generator_range": "bounded",
    "divergence": "images",
    "memory": 40,
    "new_images": 15,
    "filling": 1,
    "generator_steps": 2,
    "student_steps": 3,
    "class_weight": 0.7,
    "batch_statistics": 0.4,
    "total_variation": 0.01,
    "adversarial_weight": 1.3,
    "latent": 10,
    "width": 8,
}


def source_of(teacher: Teacher | None = None, batch: int = 16, **changes: Any) -> ZsktSource:
    return ZsktSource(teacher or small_teacher(), ZsktSettings(**{**SHORT, **changes}), batch, 0)


# The generator.


def test_a_generator_that_is_told_the_class() -> None:
    make = ImageGenerator(SMALL, 7, 8, classes=5)
    assert make(torch.randn(3, 12)).shape == (3, 1, 8, 8)
    source = source_of()
    z = source._draw_latents(12, random(3))
    meant = z[:, 10:].argmax(1)
    assert z.shape == (12, 15)
    assert torch.equal(z[:, 10:], functional.one_hot(meant, 5).float())
    assert sorted(torch.bincount(meant, minlength=5).tolist()) == [2, 2, 2, 3, 3]  # dealt out in turn


def test_nothing_is_told_where_classes_do_not_count() -> None:
    assert source_of(class_weight=0.0)._draw_latents(4, random(0)).shape == (4, 10)


# A round, in other words.


def slow_rounds(settings: ZsktSettings, student: nn.Module, turns: int, renewed: bool) -> Tensor:
    """What lies in the memory after the filling and so many rounds against a student that stands still."""
    teacher = small_teacher()
    make = new_generator(SMALL, 0, latent=10, width=8, classes=5, output_range="bounded")
    adam = torch.optim.Adam(make.parameters(), lr=1e-3)
    made = []
    for turn in range(-settings.filling, turns):
        stream = ("filling", turn + settings.filling) if turn < 0 else ("latents", turn)
        draw = generator(0, *stream, 0)
        z = torch.randn((15, 10), generator=draw)
        first = int(torch.randint(5, (), generator=draw))
        meant = torch.tensor([(first + i) % 5 for i in range(15)])
        z = torch.cat([z, torch.eye(5)[meant]], 1)
        if renewed:
            layer = make.layers[0]
            for weight in (layer.weight, layer.bias):
                weight.data = (2 * torch.rand(weight.shape, generator=draw) - 1) / 15**0.5
                adam.state.pop(weight, None)
        for _ in range(settings.generator_steps):
            x = make(z)
            conv = teacher.model.get_submodule("conv")(x)
            norm = teacher.model.get_submodule("norm")
            answers = teacher.model(x)
            loss = settings.class_weight * -answers.log_softmax(1)[torch.arange(15), meant].mean()
            loss = loss + settings.batch_statistics * (
                (conv.mean((0, 2, 3)) - norm.running_mean).norm()
                + (conv.var((0, 2, 3), unbiased=False) - norm.running_var).norm()
            )
            loss = loss + settings.total_variation * total_variation(x).mean()
            if turn >= 0:
                p, q = answers.softmax(1), copy.deepcopy(student).eval()(x).softmax(1)
                loss = loss - settings.adversarial_weight * (p * (p / q).log()).sum(1).mean()
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(make.parameters(), settings.clip)
            adam.step()
        with torch.no_grad():
            made.append(make(z))
    return torch.cat(made)


@pytest.mark.parametrize("renewed", [False, True])
def test_rounds_fill_the_memory_as_written_out(renewed: bool) -> None:
    source, student = source_of(renewed=renewed, memory=100, rounds=10**9), small_network(1).train()
    batches = [source.batch(step, random(step), student) for step in range(6)]
    expected = slow_rounds(source.settings, student, 2, renewed)
    assert source.memory is not None
    assert source.memory.kept == len(expected) == 45
    torch.testing.assert_close(source.memory.images[:45].float(), expected, rtol=2e-3, atol=2e-3)
    for step, batch in enumerate(batches):  # drawn from what there was at that step
        rows = torch.randint(30 if step < 3 else 45, (16,), generator=random(step))
        assert torch.equal(batch, source.memory.images[rows].float())


def test_the_first_layer_is_drawn_anew_each_round_and_the_others_learn_on() -> None:
    source, student = source_of(renewed=True), small_network(1).train()
    layers: list[list[Tensor]] = []
    for step in (0, 3, 6):
        source.batch(step, random(0), student)
        layers.append([source.generator.layers[index].weight.detach().clone() for index in (0, 4)])
    assert float((layers[1][0] - layers[0][0]).abs().mean()) > 0.05
    assert 0 < float((layers[1][1] - layers[0][1]).abs().mean()) < 0.02
    assert all(group["lr"] == source.settings.generator_learning_rate for group in source.optimizer.param_groups)


def test_the_oldest_images_leave_first() -> None:
    source, student = source_of(memory=40, filling=0), small_network(1).train()
    made = []
    for step in (0, 3, 6, 9):
        source.batch(step, random(0), student)
        assert source.memory is not None
        made.append(source.memory.images[[(15 * len(made) + i) % 40 for i in range(15)]].clone())
    assert source.memory is not None
    assert source.memory.kept == 40
    kept = torch.cat(made)[-40:]
    assert {tuple(row.flatten().tolist()) for row in source.memory.images} == {
        tuple(row.flatten().tolist()) for row in kept
    }


def test_a_round_larger_than_the_memory_leaves_its_last_images() -> None:
    source, student = source_of(memory=10, filling=0), small_network(1).train()
    source.batch(0, random(0), student)
    assert source.memory is not None
    assert source.memory.kept == 10
    batch = source.batch(1, random(0), student)
    assert len(batch) == 16
    assert len({tuple(row.flatten().tolist()) for row in batch}) <= 10


def test_figures_stay_in_the_memory() -> None:
    teacher = Teacher(small_network(), SHIFTED)
    source, student = source_of(teacher, batch=200, figures=30, memory=40), small_network(1).train()
    drawn, _ = start_images("mixed", 30, SHIFTED, generator(0, "figures"))
    figures = SHIFTED.normalise(drawn).half()
    for step, room in ((0, 30), (3, 40), (9, 40)):
        batch = source.normalised(step, random(step), student)
        assert source.memory is not None
        assert torch.equal(source.memory.images[40:], figures)
        rows = {tuple(row.flatten().tolist()) for row in torch.cat([source.memory.images[:room], figures]).float()}
        seen = {tuple(row.flatten().tolist()) for row in batch}
        assert seen <= rows
        assert 0.3 < len(seen & {tuple(row.flatten().tolist()) for row in figures.float()}) / len(seen) < 0.7
    taken_up = source_of(teacher, batch=200, figures=30, memory=40)
    taken_up.load_state_dict(source.state_dict())
    assert torch.equal(source.normalised(10, random(10), student), taken_up.normalised(10, random(10), student))


def test_terms_change_the_images() -> None:
    def memory(**changes: Any) -> Tensor:
        source = source_of(generator_steps=30, filling=0, **changes)
        source.batch(0, random(0), small_network(1))
        assert source.memory is not None
        return source.memory.images[:15].float()

    def variation(images: Tensor) -> float:
        return float(total_variation(images).mean())

    base = memory()
    for change in ({"adversarial_weight": 9.0}, {"batch_statistics": 0.0}, {"generator_range": "input"}):
        assert not torch.equal(memory(**change), base), change
    assert variation(memory(total_variation=1.0)) < 0.8 * variation(memory(total_variation=0.0))
    teacher = small_teacher()
    sure = [teacher(memory(class_weight=weight, adversarial_weight=0.0)).softmax(1).amax(1) for weight in (0.01, 10.0)]
    assert float(sure[1].mean()) > float(sure[0].mean())


def test_filling_without_a_term_is_an_untrained_generators() -> None:
    source = source_of(class_weight=0.0, batch_statistics=0.0, total_variation=0.0)
    untrained = copy.deepcopy(source.generator)
    source.batch(0, random(0), small_network(1))
    z = torch.randn((15, 10), generator=generator(0, "filling", 0, 0))
    assert source.memory is not None
    with torch.no_grad():
        assert torch.equal(source.memory.images[:15], untrained(z).half())
    assert not torch.equal(source.generator.layers[0].weight, untrained.layers[0].weight)


def test_a_teacher_without_batch_norms() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), SMALL)
    batches = []
    for weight in (0.0, 5.0):
        source = source_of(teacher, batch_statistics=weight)
        batches.append(source.batch(0, random(0), small_network(1)))
    assert torch.equal(*batches)


# The student.


def test_the_students_statistics_are_those_of_what_it_learns_on() -> None:
    source, student = source_of(), small_network(1).train()
    student.drop.eval()  # a part of it may be frozen
    before, calls = copy.deepcopy(student.state_dict()), []
    student.hidden.register_forward_hook(lambda *_: calls.append(1))
    source.batch(0, random(0), student)
    assert calls == []
    assert (student.training, student.norm.training, student.drop.training) == (True, True, False)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert student.conv.weight.grad is None


def test_without_gradients_images_come_from_the_memory() -> None:
    source, student = source_of(), small_network(1)
    with torch.no_grad():
        fresh = source.batch(0, random(7), student)  # nothing is there yet
    source.batch(0, random(0), student)
    before = source.state_dict()
    with torch.no_grad():
        first = source.batch(0, random(7), student)
    assert not torch.equal(first, fresh)
    assert torch.equal(first, source.batch(5, random(7)))
    rows = {tuple(row.flatten().tolist()) for row in before["memory"]["images"].float()}
    assert {tuple(row.flatten().tolist()) for row in first} <= rows
    after = dict(tensors_in(source.state_dict()))
    assert all(torch.equal(value, after[name]) for name, value in tensors_in(before))


def test_images_are_in_the_value_range_of_a_normalising_teacher() -> None:
    teacher = Teacher(small_network(), SHIFTED)
    batch = source_of(teacher).batch(0, random(0), small_network(1))
    assert 0 <= float(batch.min()) < float(batch.max()) <= 1.001


def test_a_student_learns_on_it() -> None:
    teacher, student = small_teacher(), small_network(3)
    probe = torch.rand((500, *SMALL.shape), generator=random(1))
    before = apart(teacher, student, probe)
    source = source_of(batch=32, memory=400, new_images=32, filling=3, student_steps=5)
    distill(student, teacher, source, DistillationSettings(steps=200, batch=32, temperature=2), quiet=True)
    assert apart(teacher, student, probe) < 0.5 * before


def test_the_papers_game_may_have_a_memory_too() -> None:
    settings = ZsktSettings(**SHORT, rounds=4, batch=16, attention="none")
    students = [small_network(3) for _ in range(2)]
    for student in students:
        train_zskt(student, small_teacher(), settings, seed=5, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(*(s.state_dict().values() for s in students), strict=True))
    assert not torch.equal(students[0].head.weight, small_network(3).head.weight)


# Stopping and going on.


@pytest.mark.parametrize("steps", [1, 5, 13])
def test_its_state_goes_on_where_it_was(steps: int) -> None:
    first, second = source_of(), source_of()
    student = small_network(1).train()
    for step in range(steps):
        first.batch(step, random(step), student)
    second.load_state_dict(first.state_dict())
    for step in range(steps, steps + 9):
        ours, theirs = (source.batch(step, random(step), student) for source in (first, second))
        assert torch.equal(ours, theirs), step


def test_step_zero_begins_anew() -> None:
    source = source_of()
    first = [source.batch(step, random(step), small_network(1)) for step in range(7)]
    again = [source.batch(step, random(step), small_network(1)) for step in range(7)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# The settings.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory": -1}, "memory must not be negative"),
        ({"memory": 10, "new_images": 1}, "new_images must be at least 2"),
        ({"filling": 3}, "of images for the memory, and memory is 0"),
        ({"new_images": 30}, "of images for the memory, and memory is 0"),
        ({"figures": 30}, "of images for the memory, and memory is 0"),
        ({"class_weight": float("nan")}, "class_weight must not be negative"),
        ({"adversarial_weight": -0.5}, "adversarial_weight must not be negative"),
        ({"generator_range": "clamp"}, "generator_range is one of unit, input, bounded"),
    ],
)
def test_settings_outside_their_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZsktSettings(**arguments)


def test_best_is_what_a_recipe_gets(tmp_path: Path) -> None:
    method = find_method("zskt")
    assert default_preset(method) == "best"
    best = method.options("best", {"width": 8, "memory": 50, "new_images": 10, "filling": 1, "generator_steps": 1})
    assert (best.memory, best.renewed, best.generator_range) == (50, True, "bounded")
    assert min(best.class_weight, best.batch_statistics, best.adversarial_weight) > 0
    source = method.source(small_teacher(), TransferRequest(100, 12, 3, tmp_path, best, quiet=True))
    assert source.batch(0, random(0), small_network(1)).shape == (12, 1, 8, 8)


def test_every_setting_is_in_the_fingerprint() -> None:
    changed = {"renewed": True, "memory": 41, "class_weight": 0.61, "temperature": 2.0, "attention": (("a", "b"),)}
    prints = [source_of().fingerprint, *(source_of(**{name: value}).fingerprint for name, value in changed.items())]
    assert source_of().fingerprint == prints[0]
    assert len(set(prints)) == 6
