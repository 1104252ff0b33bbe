"""The training loop: an interrupted training continues bit by bit, and wrong input is refused."""

from __future__ import annotations

import json
import math
import os
import random as chance
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    SMALL,
    random,
    small_network,
    small_teacher,
    start_process,
    train,
    train_stoppably,
    wait_for,
)
from torch import Tensor, nn

from zskd_nni.data.augmentation import Augmentation
from zskd_nni.data.datasets import LabelledImages
from zskd_nni.data.sources import NoiseSource, StoredSource
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.rng import derive_seed, generator
from zskd_nni.runtime.tensors import load_sealed, load_tensors, save_sealed, save_tensors
from zskd_nni.training.checkpoint import Checkpoint, History, TrainingState
from zskd_nni.training.distillation import DistillationSettings, check_student, distill
from zskd_nni.training.loop import DivergenceError, TrainingRun, cosine_schedule, fit, training_mode
from zskd_nni.training.losses import distillation_loss
from zskd_nni.training.supervised import SupervisedSettings, train_supervised


def same_weights(first: nn.Module | dict[str, Tensor], second: nn.Module | dict[str, Tensor]) -> bool:
    a, b = (x.state_dict() if isinstance(x, nn.Module) else x for x in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def undisturbed() -> tuple[nn.Module, list[int], list[float]]:
    network, history = train(None)
    return network, history.steps, history.losses


def test_the_run_learns_and_its_history_is_the_mean_of_fifty_steps(undisturbed) -> None:
    _, steps, losses = undisturbed
    assert steps == [50, 100, 120]
    assert losses[-1] < losses[0]
    network = small_network(7, dropout=0.3).train()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=1e-2)
    seen: list[float] = []

    def loss(step: int, draws: torch.Generator) -> Tensor:
        images = torch.rand((16, *SMALL.shape), generator=draws)
        value = nn.functional.cross_entropy(network(images), (images.mean((1, 2, 3)) * 40).long() % 5)
        seen.append(float(value.detach()))
        return value

    run = TrainingRun(120, seed=11, quiet=True)
    history = fit(network, optimizer, cosine_schedule(optimizer, 120, 10), loss, run)
    assert history.losses == losses
    assert history.losses[0] == pytest.approx(sum(seen[:50]) / 50, rel=1e-6)
    assert history.losses[2] == pytest.approx(sum(seen[100:]) / 20, rel=1e-6)


def test_the_loop_is_plain_optimisation(undisturbed) -> None:
    """The same steps written out, with the named random streams."""
    network = small_network(7, dropout=0.3).train()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=1e-2)
    scheduler = cosine_schedule(optimizer, 120, 10)
    for step in range(120):
        torch.manual_seed(derive_seed(11, "layers", step))
        images = torch.rand((16, *SMALL.shape), generator=generator(11, "step", step))
        loss = nn.functional.cross_entropy(network(images), (images.mean((1, 2, 3)) * 40).long() % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert same_weights(network, undisturbed[0])


def test_global_random_state_is_neither_used_nor_changed(undisturbed) -> None:
    torch.manual_seed(999)
    before = torch.get_rng_state()
    network, _ = train(None)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_weights(network, undisturbed[0])


@pytest.mark.parametrize("stop", [1, 49, 50, 77, 120])
def test_stopped_by_a_signal_and_resumed(undisturbed, tmp_path: Path, stop: int) -> None:
    with pytest.raises(signals.Interrupted) as stopped, signals.stoppable():
        train(tmp_path, stop=stop)
    assert stopped.value.signum == signal.SIGTERM
    assert load_sealed(tmp_path / "run.pt")["step"] == stop
    torch.rand(17)  # the global stream goes on elsewhere
    network, history = train(tmp_path)
    assert same_weights(network, undisturbed[0])
    assert (history.steps, history.losses, history.pending) == (*undisturbed[1:], [])


def test_stopped_many_times(undisturbed, tmp_path: Path) -> None:
    for stop in (13, 14, 60, 99, 100):
        with pytest.raises(signals.Interrupted), signals.stoppable():
            train(tmp_path, stop=stop)
    network, history = train(tmp_path)
    assert same_weights(network, undisturbed[0])
    assert (history.steps, history.losses) == undisturbed[1:]


def test_dropout_matters_here(undisturbed) -> None:
    assert not same_weights(train(None, dropout=0.0)[0], undisturbed[0])


def test_sigterm_in_another_process(undisturbed, tmp_path: Path) -> None:
    result = str(tmp_path / "result.safetensors")
    process = start_process(train_stoppably, str(tmp_path), result, pause=0.02, every=0.05)
    wait_for(lambda: (tmp_path / "run.pt").exists())
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    again = start_process(train_stoppably, str(tmp_path), result)
    again.join()
    assert again.exitcode == 0
    weights, record = load_tensors(result)
    assert same_weights(weights, undisturbed[0])
    assert (json.loads(record["steps"]), json.loads(record["losses"])) == undisturbed[1:]


@pytest.mark.slow
def test_killed_at_random_moments(undisturbed, tmp_path: Path) -> None:
    moments, result, killed = chance.Random(1), tmp_path / "result.safetensors", 0
    checkpoint = tmp_path / "run.pt"
    for _ in range(4):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = start_process(train_stoppably, str(tmp_path), str(result), pause=0.02, every=0.02)
        wait_for(lambda before=before: checkpoint.exists() and checkpoint.stat().st_mtime_ns != before)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        load_sealed(checkpoint)  # always whole
    assert killed >= 3
    final = start_process(train_stoppably, str(tmp_path), str(result))
    final.join()
    assert final.exitcode == 0
    weights, record = load_tensors(result)
    assert same_weights(weights, undisturbed[0])
    assert (json.loads(record["steps"]), json.loads(record["losses"])) == undisturbed[1:]


def test_finished_run_is_not_run_again(undisturbed, tmp_path: Path) -> None:
    train(tmp_path)
    network, history = train(tmp_path, stop=1)  # no step is taken, so nothing stops it
    assert same_weights(network, undisturbed[0])
    assert history.losses == undisturbed[2]


# Checkpoints that do not fit.


@pytest.fixture
def checkpointed(tmp_path: Path) -> Path:
    with pytest.raises(signals.Interrupted), signals.stoppable():
        train(tmp_path, stop=30)
    return tmp_path / "run.pt"


def test_checkpoint_of_another_run_is_refused(checkpointed: Path) -> None:
    content = checkpointed.read_bytes()
    with pytest.raises(UserError, match="belongs to another run"):
        train(checkpointed.parent, identity="another")
    assert checkpointed.read_bytes() == content


def rewrite(path: Path, change) -> None:
    state = load_sealed(path)
    change(state)
    save_sealed(path, state)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(b""),
        lambda path: os.truncate(path, path.stat().st_size - 10),
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: save_tensors(path, {"a": torch.zeros(1)}),
        lambda path: save_tensors(path, {"a": torch.zeros(1)}, {"state": "{"}),
        lambda path: save_sealed(path, ["state"]),
        lambda path: rewrite(path, lambda state: state["model"].pop("head.weight")),
        lambda path: rewrite(path, lambda state: state["model"].update({"head.weight": torch.zeros(2, 2)})),
        lambda path: rewrite(path, lambda state: state["optimizer"]["state"][0].pop("exp_avg_sq")),
        lambda path: rewrite(path, lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(1))),
        lambda path: rewrite(path, lambda state: state["optimizer"]["param_groups"][0].update(lr="x")),
        lambda path: rewrite(path, lambda state: state["optimizer"]["param_groups"][0].pop("betas")),
        lambda path: rewrite(path, lambda state: state["scheduler"].update(last_epoch=None)),
        lambda path: rewrite(path, lambda state: state.pop("step")),
        lambda path: rewrite(path, lambda state: state["history"].update(more=1)),
        lambda path: rewrite(path, lambda state: state["history"].update(steps="x")),
        lambda path: rewrite(path, lambda state: state.update(step=-1)),
        lambda path: rewrite(path, lambda state: state.update(step=float("inf"))),
        lambda path: rewrite(path, lambda state: state["optimizer"].update(param_groups=[])),
    ],
)
def test_corrupt_checkpoints_are_refused(checkpointed: Path, harm) -> None:
    harm(checkpointed)
    with pytest.raises(UserError, match=r"run\.pt"):
        train(checkpointed.parent)


def test_what_a_checkpoint_holds_is_never_run(checkpointed: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(checkpointed.parent / "canary"),)

    rewrite(checkpointed, lambda state: state.update(history=Hostile()))
    with pytest.raises(UserError, match=r"run\.pt holds more than tensors"):
        train(checkpointed.parent)
    assert not (checkpointed.parent / "canary").exists()


@pytest.mark.parametrize("steps", [1, 49, 60])
def test_divergence_names_the_step(steps: int) -> None:
    network = small_network().train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)

    def loss(step: int, draws: torch.Generator) -> Tensor:
        value = network(torch.rand((4, *SMALL.shape), generator=draws)).square().mean()
        return value * float("nan") if step == steps - 1 else value

    expected = {1: 1, 49: 49, 60: 60}[steps]
    with pytest.raises(UserError, match=rf"up to step {expected} of {steps}"):
        fit(network, optimizer, None, loss, TrainingRun(steps, quiet=True))


def test_divergence_names_the_checkpoint_that_was_kept(tmp_path: Path) -> None:
    network = small_network().train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)

    def loss(step: int, draws: torch.Generator) -> Tensor:
        value = network(torch.rand((4, *SMALL.shape), generator=draws)).square().mean()
        return value * float("nan") if step == 70 else value

    kept = tmp_path / "run.pt"
    with pytest.raises(DivergenceError, match=r"up to step 71 of 100.*The last good checkpoint is kept: .*run\.pt"):
        fit(network, optimizer, None, loss, TrainingRun(100, checkpoint=kept, checkpoint_every=0.0, quiet=True))
    assert load_sealed(kept)["step"] == 70


def test_divergence_by_a_real_learning_rate() -> None:
    settings = DistillationSettings(steps=100, batch=8, learning_rate=1e30, warmup=0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))
    with pytest.raises(UserError, match=r"Distillation diverged.*step 50 of 100.*smaller learning rate"):
        distill(student, small_teacher(), NoiseSource(SMALL, 8), settings, quiet=True)


# The schedule.


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0), (100, 10), (7, 3), (1, 0)])
def test_cosine_schedule_by_formula(steps: int, warmup: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = cosine_schedule(optimizer, steps, warmup)
    for step in range(steps):
        if step < warmup:
            expected = (step + 1) / warmup
        else:
            expected = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * expected, abs=1e-12), step
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_training_mode_ends_in_eval_even_after_an_error() -> None:
    network = small_network()
    with pytest.raises(RuntimeError), training_mode(network):
        assert all(module.training for module in network.modules())
        raise RuntimeError
    assert not any(module.training for module in network.modules())


# Random streams.


def test_seeds_depend_on_every_part_and_its_type() -> None:
    parts = [(), (0,), ("0",), (0, 0), (1, "a"), ("1", "a"), (1, "a", 0), ("1a",), (1, "b"), (-1,)]
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(3, "order", 7) == derive_seed(3, "order", 7)
    assert torch.equal(torch.rand(4, generator=generator(1)), torch.rand(4, generator=generator(1)))


# Interruption.


def test_signals_are_noted_and_handlers_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    signals.check()
    with signals.stoppable():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(signals.Interrupted, match="SIGINT"):
            signals.check()
        with pytest.raises(signals.Interrupted, match="SIGTERM"):  # a second one does not wait
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    signals.check()


# Distillation.


def images(count: int = 64) -> Tensor:
    return torch.rand((count, *SMALL.shape), generator=random(3))


def test_distillation_resumes_bit_by_bit(tmp_path: Path) -> None:
    teacher, source = small_teacher(), StoredSource(images(), 16, 5, "set")
    settings = DistillationSettings(
        temperature=4, steps=60, batch=16, warmup=5, augmentation=Augmentation(rotation=10, translation=0.1, noise=0.05)
    )
    whole = small_network(1, dropout=0.2)
    history = distill(whole, teacher, source, settings, seed=2, quiet=True)
    # Signals stop a run between two steps; the student's own forward pass raises one here.
    parts = small_network(1, dropout=0.2)
    calls = [0]

    def stop(*_: object) -> None:
        calls[0] += 1
        if calls[0] == 23:
            os.kill(os.getpid(), signal.SIGTERM)

    handle = parts.register_forward_hook(stop)
    with pytest.raises(signals.Interrupted), signals.stoppable():
        distill(parts, teacher, source, settings, seed=2, checkpoint=tmp_path / "c.pt", quiet=True)
    handle.remove()
    fresh = small_network(1, dropout=0.2)
    resumed = distill(fresh, teacher, source, settings, seed=2, checkpoint=tmp_path / "c.pt", quiet=True)
    assert same_weights(whole, fresh)
    assert resumed.losses == history.losses
    assert not fresh.training


@pytest.mark.parametrize(
    "change",
    [
        {"settings": DistillationSettings(steps=20, batch=16, temperature=5)},
        {"seed": 3},
        {"source": StoredSource(images(), 16, 5, "other")},
        {"source": StoredSource(images(), 16, 6, "set")},  # in another order
        {"teacher": small_teacher(1)},
    ],
)
def test_distillation_refuses_the_checkpoint_of_another(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "c.pt"
    same = {
        "teacher": small_teacher(),
        "source": StoredSource(images(), 16, 5, "set"),
        "settings": DistillationSettings(steps=20, batch=16),
        "seed": 2,
    }

    def run(teacher: Teacher, source: StoredSource, settings: DistillationSettings, seed: int) -> None:
        distill(small_network(1), teacher, source, settings, seed=seed, checkpoint=path, quiet=True)

    run(**same)
    run(**same)
    with pytest.raises(UserError, match="another run"):
        run(**{**same, **change})


def test_distillation_teaches() -> None:
    teacher, data = small_teacher(), images(256)
    settings = DistillationSettings(temperature=4, steps=200, batch=64, learning_rate=1e-2, warmup=5)
    student = small_network(1)
    answers, untrained = teacher.predict(data), student.eval()(data).detach()
    distill(student, teacher, StoredSource(data, 64, 0, "set"), settings, quiet=True)
    with torch.no_grad():
        trained = student(data)
    assert float(distillation_loss(trained, answers, 4)) < 0.05 * float(distillation_loss(untrained, answers, 4))
    assert float((trained.argmax(1) == answers.argmax(1)).float().mean()) > 0.9


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (small_network(classes=4), "4 classes, the teacher 5"),
        (small_network(channels=3), r"cannot take the teacher's input of shape \[1, 8, 8\]"),
    ],
)
def test_students_that_do_not_fit(student: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_student(student, small_teacher())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0}, "temperature must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"steps": 0}, "at least 1"),
        ({"batch": 0}, "at least 1"),
        ({"weight_decay": -1}, "must not be negative"),
        ({"warmup": -1}, "must not be negative"),
    ],
)
def test_distillation_settings_outside_their_range(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationSettings(**arguments)


# Supervised training.


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_supervised_training_learns_and_resumes(tmp_path: Path, optimizer: str) -> None:
    draws = random(0)
    labels = torch.randint(0, 5, (300,), generator=draws)
    pixels = torch.randint(0, 60, (300, 1, 8, 8), generator=draws)
    pixels[torch.arange(300), 0, labels] += 180  # a bright row for each class
    data = LabelledImages(pixels.to(torch.uint8), labels, "rows")
    rate = 5e-3 if optimizer == "adamw" else 0.05
    settings = SupervisedSettings(epochs=6, batch=32, optimizer=optimizer, learning_rate=rate)
    network = small_network(2)
    train_supervised(network, data, SMALL, settings, seed=4, quiet=True)
    with torch.no_grad():
        hits = network(data.pixels(slice(None), SMALL)).argmax(1) == labels
    assert float(hits.float().mean()) > 0.9
    path, parts = tmp_path / "c.pt", small_network(2)
    handle = parts.register_forward_hook(
        lambda module, *_: os.kill(os.getpid(), signal.SIGTERM) if int(module.norm.num_batches_tracked) == 20 else None
    )
    with pytest.raises(signals.Interrupted), signals.stoppable():
        train_supervised(parts, data, SMALL, settings, seed=4, checkpoint=path, quiet=True)
    handle.remove()
    resumed = small_network(2)
    train_supervised(resumed, data, SMALL, settings, seed=4, checkpoint=path, quiet=True)
    assert same_weights(network, resumed)


def test_checkpoint_is_written_at_intervals(tmp_path: Path) -> None:
    network = small_network().train()
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    seen = []

    def loss(step: int, draws: torch.Generator) -> Tensor:
        seen.append((tmp_path / "c.pt").exists())
        return network(torch.rand((4, *SMALL.shape), generator=draws)).square().mean()

    run = TrainingRun(3, checkpoint=tmp_path / "c.pt", checkpoint_every=0, quiet=True)
    fit(network, optimizer, None, loss, run)
    assert seen == [False, True, True]


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4),
        lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1),
        lambda optimizer: torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.9),
    ],
    ids=["step", "one-cycle", "restarts", "cyclic", "multiplicative"],
)
def test_schedules_of_pytorch_resume(tmp_path, make):
    """A user brings any: what a fresh one does not know yet, or cannot be saved, is no reason to refuse."""

    def parts():
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        return model, optimizer, make(optimizer)

    checkpoint = Checkpoint(tmp_path / "run.pt", "same")
    model, optimizer, scheduler = parts()
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    checkpoint.save(TrainingState(model, optimizer, scheduler), 5, History())
    model, optimizer, again = parts()
    assert checkpoint.load(TrainingState(model, optimizer, again))[0] == 5
    assert again.last_epoch == 5
    assert again.get_last_lr() == scheduler.get_last_lr()


def test_a_source_whose_batches_are_not_those_of_the_settings_is_refused() -> None:
    source = StoredSource(images(), 8, 5, "set")
    with pytest.raises(UserError, match="batches of 8 images, the settings ask for 32"):
        distill(small_network(1), small_teacher(), source, DistillationSettings(steps=1, batch=32), quiet=True)
    small = StoredSource(images()[:6], 32, 5, "set")  # all there are
    distill(small_network(1), small_teacher(), small, DistillationSettings(steps=1, batch=32), quiet=True)
