"""ZSKT against the released code's loop written out; stops, students of NNI, divergence."""

from __future__ import annotations

import copy
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, SmallNet, apart, random, small_network, small_teacher, stop_after, tensors_in
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.data.sources import TransferSource
from zskd_nni.methods.registry import TransferRequest, find_method
from zskd_nni.methods.zskt.generator import new_generator
from zskd_nni.methods.zskt.source import ZsktSettings, ZsktSource
from zskd_nni.methods.zskt.train import train_zskt
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.rng import generator
from zskd_nni.runtime.tensors import load_sealed, save_sealed
from zskd_nni.training.distillation import DistillationSettings, distill

SHIFTED = InputSpec((1, 8, 8), mean=(0.3,), std=(0.5,))
SHORT: dict[str, Any] = {"rounds": 6, "batch": 16, "latent": 10, "width": 16, "student_steps": 4}


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(settings: ZsktSettings, dropout: float = 0.0, **options: Any) -> nn.Module:
    student = small_network(3, dropout=dropout)
    train_zskt(student, small_teacher(), settings, seed=5, quiet=True, **options)
    return student


def test_in_bfloat16_the_game_goes_the_same_way() -> None:
    students = [small_network(3) for _ in range(2)]
    histories = [
        train_zskt(student, small_teacher(), ZsktSettings(**SHORT, autocast=autocast), seed=5, quiet=True)
        for student, autocast in zip(students, (False, True), strict=True)
    ]
    assert not same_weights(*students)
    assert histories[1].losses == pytest.approx(histories[0].losses, rel=0.05)
    assert all(value.dtype == torch.float32 for value in students[1].parameters())


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match="even number of channels, not 7"):
        ZsktSettings(width=7)


# The game, against the released code's loop.


def reference(settings: ZsktSettings, pairs: list[tuple[str, str]], fresh: bool) -> tuple[nn.Module, nn.Module]:
    """``solver.py`` of the released code, in its own words, with the package's random streams."""
    teacher, student = small_teacher().model, small_network(3).train()
    make = new_generator(SMALL, 5, latent=settings.latent, width=settings.width)
    opt_g = torch.optim.Adam(make.parameters(), lr=1e-3)
    opt_s = torch.optim.Adam(student.parameters(), lr=2e-3)
    n = settings.rounds
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(opt, n) for opt in (opt_g, opt_s)]

    def noise(turn: int, number: int) -> Tensor:
        return torch.randn((settings.batch, settings.latent), generator=generator(5, "latents", turn, number))

    def kl(s: Tensor, t: Tensor) -> Tensor:  # F.kl_div's default reduction, on probabilities
        p = functional.softmax(t, 1)
        return (p * (p.log() - functional.log_softmax(s, 1))).sum() / p.numel()

    def at(a: Tensor) -> Tensor:
        return functional.normalize(a.pow(2).mean(1).view(a.size(0), -1))

    def run(model: SmallNet, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        acts = {"conv": model.conv(x)}
        acts["norm"] = model.norm(acts["conv"])
        hidden = model.drop(model.act(acts["norm"]).flatten(1))
        return model.head(torch.tanh(model.hidden(hidden))), acts

    for turn in range(n):
        z = noise(turn, 0)
        for _ in range(settings.generator_steps):
            x = make(z)
            loss = -kl(run(student, x)[0], run(teacher, x)[0])
            opt_g.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(make.parameters(), settings.clip)
            opt_g.step()
        with torch.no_grad():
            x = make(z)
        for inner in range(settings.student_steps):
            if fresh:
                with torch.no_grad():
                    x = make(noise(turn, inner + 1))
            with torch.no_grad():
                t_logits, t_acts = run(teacher, x)
            s_logits, s_acts = run(student, x)
            loss = kl(s_logits, t_logits)
            for ours, theirs in pairs:
                loss = loss + settings.attention_weight * (at(s_acts[theirs]) - at(t_acts[ours])).pow(2).mean()
            opt_s.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), settings.clip)
            opt_s.step()
        for schedule in schedules:
            schedule.step()
    return student, make


@pytest.mark.parametrize(
    ("changes", "pairs"),
    [
        ({}, [("norm", "norm")]),
        ({"latents": "fresh"}, [("norm", "norm")]),
        ({"generator_steps": 2, "clip": 0.05}, [("conv", "norm"), ("norm", "conv")]),
        ({"attention": "none"}, []),
    ],
    ids=["same latents", "fresh latents", "two generator steps, clipped", "no attention"],
)
def test_the_game_is_the_released_codes(changes: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
    settings = ZsktSettings(**{**SHORT, "attention": tuple(pairs) or "none", **changes})
    expected, _ = reference(settings, pairs, settings.latents == "fresh")
    student = trained(settings)
    assert not student.training
    moved = 0.0
    for (name, value), right, before in zip(
        student.state_dict().items(),
        expected.state_dict().values(),
        small_network(3).state_dict().values(),
        strict=True,
    ):
        if name in ("conv.bias", "norm.running_mean"):
            continue  # a bias before batch statistics has no gradient but rounding, which Adam takes for one
        torch.testing.assert_close(value, right, rtol=2e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}")
        moved = max(moved, float((value.float() - before.float()).abs().max()))
    assert moved > 0.02


def test_options_change_the_game() -> None:
    base = trained(ZsktSettings(**SHORT))
    for change in (
        {"latents": "fresh"},
        {"attention": "none"},
        {"divergence": "images"},
        {"attention_distance": "norm"},
        {"temperature": 3.0},
        {"clip": 0.01},
        {"generator_range": "input"},
    ):
        assert not same_weights(trained(ZsktSettings(**SHORT, **change)), base), change


def test_the_student_learns_and_the_generator_looks_for_trouble() -> None:
    teacher, student = small_teacher(), small_network(3)
    probe = torch.randn((500, *SMALL.shape), generator=random(1))
    before = apart(teacher, student, probe)
    settings = ZsktSettings(rounds=60, batch=32, latent=10, width=16, student_steps=5, attention="none")
    train_zskt(student, teacher, settings, seed=0, quiet=True)
    assert apart(teacher, student, probe) < 0.5 * before
    # Against a student that stands still, the generator's images become worse and worse.
    source = ZsktSource(teacher, ZsktSettings(rounds=10**6, latent=10, width=16, student_steps=1), 32, 0)
    still, seen = small_network(9), []
    for step in range(40):
        source.batch(step, random(0), still)
        seen.append(float(source.divergence))
    assert sum(seen[-5:]) > 1.5 * sum(seen[:5])


# Stopping and going on.


@pytest.mark.parametrize("latents", ["same", "fresh"])
@pytest.mark.parametrize("stop", [1, 8, 11, 23])
def test_stopped_and_resumed_bit_by_bit(tmp_path: Path, latents: str, stop: int) -> None:
    settings = ZsktSettings(**SHORT, latents=latents)
    undisturbed, file = trained(settings, dropout=0.3), tmp_path / "run.pt"
    with pytest.raises(signals.Interrupted), signals.stoppable():
        trained(settings, dropout=0.3, checkpoint=file, after_step=stop_after(stop))
    state = load_sealed(file)
    assert state["step"] == stop
    assert state["scheduler"]["last_epoch"] == stop
    assert state["extra"]["generator"]
    assert state["extra"]["optimizer"]["state"]
    assert state["optimizer"]["state"]
    torch.rand(11)
    assert same_weights(trained(settings, dropout=0.3, checkpoint=file), undisturbed)
    final = dict(tensors_in(load_sealed(file)))
    trained(settings, dropout=0.3, checkpoint=tmp_path / "other.pt")
    other = dict(tensors_in(load_sealed(tmp_path / "other.pt")))
    assert final.keys() == other.keys()
    assert all(torch.equal(final[name], other[name]) for name in final)


def test_a_checkpoint_of_another_game_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    trained(ZsktSettings(**SHORT), checkpoint=file)
    with pytest.raises(UserError, match="belongs to another run"):
        trained(ZsktSettings(**SHORT, latents="fresh"), checkpoint=file)
    with pytest.raises(UserError, match="belongs to another run"):
        trained(ZsktSettings(**SHORT, attention="none"), checkpoint=file)


class Bursting(nn.Module):
    """A student whose answers turn into NaN at some call in training."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.inner, self.at, self.calls = small_network(3), at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return self.inner(x) * (float("nan") if self.calls == self.at else 1.0)


# A round of 4 student steps has 5 forward passes of the student, the first for the generator.
@pytest.mark.parametrize(("at", "message", "step"), [(8, "student's loss", 5), (11, "generator diverged", 8)])
def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, at: int, message: str, step: int
) -> None:
    file = tmp_path / "run.pt"
    with pytest.raises(UserError, match=message) as raised:
        train_zskt(
            Bursting(at),
            small_teacher(),
            ZsktSettings(**SHORT),
            checkpoint=file,
            checkpoint_every=0.0,
            quiet=True,
        )
    assert f"step {step}" in str(raised.value)
    assert "last good checkpoint is kept" in str(raised.value)
    assert str(file) in str(raised.value)
    state = load_sealed(file)
    assert state["step"] == step
    assert all(torch.isfinite(value).all() for _, value in tensors_in(state))


def test_a_gradient_that_is_not_finite_is_divergence_too(tmp_path: Path) -> None:
    student = small_network(3)
    student.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(UserError, match=r"student's gradient is not finite in step 0\.$"):
        train_zskt(student, small_teacher(), ZsktSettings(**SHORT), checkpoint=tmp_path / "r.pt", quiet=True)
    assert torch.isfinite(student.head.weight).all()


# Attention layers.


def test_networks_without_a_common_size_go_without() -> None:
    other = nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    train_zskt(other, small_teacher(), ZsktSettings(**{**SHORT, "rounds": 1}), quiet=True)


def test_attention_layers_that_do_not_match() -> None:
    other = nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    teacher = small_teacher()

    def asked(*pairs: tuple[str, str]) -> None:
        before = copy.deepcopy(other.state_dict())
        with_pairs = ZsktSettings(**SHORT, attention=pairs)
        try:
            train_zskt(other, teacher, with_pairs, quiet=True)
        finally:
            assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())

    with pytest.raises(UserError, match=r"the teacher's 'norm' \(3 x 3\) and the student's '1' \(4 x 4\)"):
        asked(("norm", "1"))
    with pytest.raises(UserError, match=r"The student has no module 'group1'; its last ones: 0, 1, 2, 3"):
        asked(("norm", "group1"))
    with pytest.raises(UserError, match=r"The teacher has no module 'group1'"):
        asked(("group1", "0"))
    with pytest.raises(UserError, match=r"The student's layer '3' has no attention map: it gives \[2, 5\]"):
        asked(("norm", "3"))


def test_students_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="has 7 classes"):
        train_zskt(small_network(classes=7), small_teacher(), quiet=True)


# A live source.


def test_it_is_a_transfer_source_in_the_value_range_of_the_teacher() -> None:
    teacher = Teacher(small_network(), SHIFTED)
    source = ZsktSource(teacher, ZsktSettings(latent=10, width=16), 16, 0)
    assert isinstance(source, TransferSource)
    assert source.size is None
    images = source.batch(0, random(0), small_network(1))
    assert images.shape == (16, 1, 8, 8)
    assert source.images is not None
    torch.testing.assert_close(teacher.spec.normalise(images), source.images, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_images_of_a_round_come_back_as_they_lay_in_memory(tmp_path: Path, channels: int) -> None:
    """Sums depend on it: a student that begins with a BatchNorm would learn other last bits after a resume."""
    teacher = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 5)), InputSpec((channels, 8, 8)))
    settings = ZsktSettings(latent=10, width=16, student_steps=3)
    source, other = (ZsktSource(teacher, settings, 16, 0) for _ in range(2))
    source.batch(0, random(0), teacher.model)
    save_sealed(tmp_path / "state.pt", source.state_dict())
    other.load_state_dict(load_sealed(tmp_path / "state.pt"))
    assert source.images is not None
    assert other.images is not None
    assert torch.equal(source.images, other.images)
    assert source.images.stride() == other.images.stride()


def test_rounds_of_a_live_source() -> None:
    source = ZsktSource(small_teacher(), ZsktSettings(latent=10, width=16, student_steps=3), 16, 0)
    student = small_network(1).train()
    batches = [source.batch(step, random(0), student) for step in range(6)]
    assert torch.equal(batches[0], batches[2])
    assert torch.equal(batches[3], batches[5])
    assert not torch.equal(batches[2], batches[3])
    fresh = ZsktSource(small_teacher(), ZsktSettings(latent=10, width=16, student_steps=3, latents="fresh"), 16, 0)
    batches = [fresh.batch(step, random(0), student) for step in range(4)]
    assert min(float((a - b).abs().mean()) for a, b in combinations(batches, 2)) > 0.1


def test_the_student_is_left_alone() -> None:
    source = ZsktSource(small_teacher(), ZsktSettings(latent=10, width=16), 16, 0)
    student = small_network(1).eval()
    before, calls = copy.deepcopy(student.state_dict()), []
    student.head.weight.grad = torch.ones_like(student.head.weight)
    student.hidden.register_forward_hook(lambda *_: calls.append(1))
    source.batch(0, random(0), student)
    assert calls == []
    assert len(student.hidden._forward_hooks) == 1
    assert torch.equal(student.head.weight.grad, torch.ones_like(student.head.weight))
    assert student.conv.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    student(torch.zeros(1, 1, 8, 8))
    assert calls == [1]


def test_without_a_student_or_gradients_it_only_makes_images() -> None:
    source = ZsktSource(small_teacher(), ZsktSettings(latent=10, width=16), 16, 0)
    student = small_network(1).train()
    source.batch(0, random(0), student)
    before = dict(tensors_in(source.state_dict()))
    with torch.no_grad():
        first = source.batch(0, random(7), student)
    assert torch.equal(first, source.batch(5, random(7)))
    assert not torch.equal(first, source.batch(5, random(8)))
    after = dict(tensors_in(source.state_dict()))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_its_state_goes_on_where_it_was() -> None:
    settings = ZsktSettings(latent=10, width=16, student_steps=3, rounds=10)
    first, second = (ZsktSource(small_teacher(), settings, 16, 0) for _ in range(2))
    student = small_network(1).train()
    for step in range(5):
        first.batch(step, random(0), student)
    second.load_state_dict(first.state_dict())
    twin = copy.deepcopy(student)
    for step in range(5, 14):
        assert torch.equal(first.batch(step, random(0), student), second.batch(step, random(0), twin)), step
    with pytest.raises(UserError, match="no generator"):
        second.load_state_dict({"a": torch.zeros(1)})


def test_step_zero_begins_anew() -> None:
    source = ZsktSource(small_teacher(), ZsktSettings(latent=10, width=16, student_steps=2), 16, 0)
    first = [source.batch(step, random(0), small_network(1)) for step in range(4)]
    again = [source.batch(step, random(0), small_network(1)) for step in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("stop", [4, 7])
@pytest.mark.parametrize(
    "more",
    [{}, {"memory": 40, "new_images": 15, "filling": 1, "figures": 8, "class_weight": 0.3, "renewed": True}],
    ids=["images of the round", "a memory"],
)
def test_distillation_on_a_live_source_resumes_bit_by_bit(tmp_path: Path, stop: int, more: dict[str, Any]) -> None:
    def trained_student(checkpoint: Path | None, stop: int | None = None) -> nn.Module:
        settings = ZsktSettings(latent=10, width=16, student_steps=3, rounds=4, **more)
        source = ZsktSource(small_teacher(), settings, 16, 0)
        student = small_network(3, dropout=0.3)
        distill(
            student,
            small_teacher(),
            source,
            DistillationSettings(steps=12, batch=16),
            checkpoint=checkpoint,
            after_step=stop_after(stop),
            quiet=True,
        )
        return student

    undisturbed, file = trained_student(None), tmp_path / "d.pt"

    with pytest.raises(signals.Interrupted), signals.stoppable():
        trained_student(file, stop)
    assert (load_sealed(file)["extra"]["memory"] is not None) == bool(more)
    assert same_weights(trained_student(file), undisturbed)


def test_a_generator_that_diverges_stops_its_caller() -> None:
    source = ZsktSource(small_teacher(), ZsktSettings(latent=10, width=16, student_steps=2), 16, 0)
    student = small_network(1)
    source.batch(0, random(0), student)
    with torch.no_grad():
        student.head.weight.fill_(float("nan"))
    before = dict(tensors_in(source.state_dict()))
    with pytest.raises(UserError, match=r"generator diverged.*round 1 \(student step 2\)"):
        source.batch(2, random(0), student)
    weights = [name for name in before if name.startswith("generator.") and name.endswith("weight")]
    assert all(torch.equal(before[name], source.state_dict()[name]) for name in weights)


def test_hundred_classes() -> None:
    torch.manual_seed(0)
    teacher = Teacher(small_network(0, classes=100), SMALL)
    student = small_network(3, classes=100)
    train_zskt(student, teacher, ZsktSettings(**{**SHORT, "rounds": 2}), quiet=True)
    assert torch.isfinite(student(torch.rand(2, 1, 8, 8))).all()


# The method.


def test_presets_and_settings() -> None:
    method = find_method("zskt")
    assert method.presets == ("paper", "fresh", "best")
    paper, fresh = method.options("paper", {}), method.options("fresh", {})
    assert (paper.latents, fresh.latents) == ("same", "fresh")
    assert (paper.generator_steps, paper.student_steps, paper.batch, paper.latent) == (1, 10, 128, 100)
    assert (paper.generator_learning_rate, paper.student_learning_rate, paper.clip) == (1e-3, 2e-3, 5)
    assert paper.width == 128
    assert (paper.attention_weight, paper.temperature, paper.rounds) == (250, 1, 80_000)
    pairs = method.options("paper", {"attention": [["a", "b"], ["c", "d"]], "rounds": 7})
    assert (pairs.attention, pairs.rounds) == ((("a", "b"), ("c", "d")), 7)
    with pytest.raises(ValueError, match=r"unknown key 'round'; did you mean 'rounds'"):
        method.options("paper", {"round": 3})
    with pytest.raises(ValueError, match="zskt has paper, fresh, best, not 'worst'"):
        method.options("worst", {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"batch": 1}, "batch must be at least 2"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"attention_weight": -1.0}, "attention_weight must not be negative"),
        ({"latents": "new"}, "latents is one of same, fresh, not 'new'"),
        ({"divergence": "mean"}, "divergence is one of"),
        ({"attention": "all"}, "attention is auto, none, or pairs"),
    ],
)
def test_settings_outside_their_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZsktSettings(**arguments)


def test_the_method_makes_a_live_source(tmp_path: Path) -> None:
    method = find_method("zskt")
    request = TransferRequest(100, 12, 3, tmp_path / "i", method.options("fresh", {"rounds": 5}), quiet=True)
    source = method.source(small_teacher(), request)
    assert isinstance(source, ZsktSource)
    assert (source.batch_size, source.seed, source.size) == (12, 3, None)
    other = method.source(small_teacher(), TransferRequest(1, 12, 4, tmp_path, request.options, quiet=True))
    assert other.fingerprint != source.fingerprint
    with pytest.raises(UserError, match="batches of at least 2"):
        method.source(small_teacher(), TransferRequest(1, 1, 3, tmp_path, request.options, quiet=True))
