"""The one training loop: steps, cosine schedule, checkpoint, resume.

Supervised training, distillation, ZSKT, the baselines and NNI's fused compressions all run through :func:`fit`.
Everything random in step ``s`` is drawn from streams named after the seed and ``s``, so that a resumed run continues
bit by bit on the CPU as if it had never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zskd_nni.models.local_response_norm import fast_response_norms
from zskd_nni.runtime import signals
from zskd_nni.runtime.allocator import keep_freed_memory
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import fingerprint_of, remove_leftovers
from zskd_nni.runtime.gradients import with_gradients
from zskd_nni.runtime.progress import Progress
from zskd_nni.runtime.rng import derive_seed, generator
from zskd_nni.training.checkpoint import Checkpoint, History, Stateful, TrainingState
from zskd_nni.training.data_parallel import DataParallel

Loss = Callable[[int, torch.Generator], Tensor]
_LOSS_EVERY = 50  # steps in a stretch whose mean loss is recorded
_AGREE_EVERY = 10  # steps after which the processes of a team ask each other for a signal


class DivergenceError(UserError):
    """Something is no longer finite; :func:`fit` adds which checkpoint was kept."""


class RunOptions(TypedDict, total=False):
    """Keywords that every training function takes.

    Attributes:
        seed: names the random streams; 0 by default.
        checkpoint: a file to keep the state in; the same call again continues from it. None by default.
        checkpoint_every: seconds between two writes; 30 by default.
        label: shown beside the progress and in messages.
        after_step: called with the number of finished steps; what it changes in the model is in the checkpoint.
        quiet: show no progress; False by default.
    """

    seed: int
    checkpoint: str | Path | None
    checkpoint_every: float
    label: str
    after_step: Callable[[int], None] | None
    quiet: bool


@dataclass(frozen=True)
class TrainingRun:
    """What :func:`fit` needs to know beside the networks and the loss; see :class:`RunOptions` for the rest.

    Attributes:
        steps: number of optimiser steps, at least 1.
        identity: JSON-able, everything that shapes the run beside steps, seed and the model's shapes; the checkpoint
            of a run with another identity is refused.
        extra: more state for the checkpoint.
        shared: the other processes of the training; the loss is then this process's weighted part of the whole loss.
    """

    steps: int
    seed: int = 0
    checkpoint: str | Path | None = None
    checkpoint_every: float = 30.0
    label: str = "training"
    after_step: Callable[[int], None] | None = None
    quiet: bool = False
    identity: Any = None
    extra: Stateful | None = None
    shared: DataParallel = field(default_factory=DataParallel)


def cosine_factor(done: int, total: int) -> float:
    """Half a cosine from 1 at 0 down to 0 at ``total``."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done / max(1, total))))


def cosine_schedule(optimizer: Optimizer, steps: int, warmup: int = 0) -> LRScheduler:
    """Linear warm-up over ``warmup`` steps, then half a cosine down to 0 at ``steps``."""

    def factor(step: int) -> float:
        return (step + 1) / warmup if step < warmup else cosine_factor(step - warmup, steps - warmup)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@with_gradients()
def fit(model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None, loss: Loss, run: TrainingRun) -> History:
    """Take ``run.steps`` optimiser steps; the last state is the result, not the best one.

    Args:
        model: what is trained; in training mode meanwhile, in ``eval()`` afterwards.
        optimizer: stepped once a step.
        scheduler: stepped once a step, or None.
        loss: ``loss(step, generator)`` gives the scalar to minimise; everything it draws comes from ``generator``.
        run: steps, seed, checkpoint and the like.

    Raises:
        DivergenceError: the loss is not finite; names the step and the checkpoint that was kept.
        UserError: the checkpoint belongs to another run.
    """
    torch.set_flush_denormal(True)  # as in synthesis: for speed, and because the bits depend on it
    leads = run.shared.team.leads
    keeper = _CheckpointKeeper(TrainingState(model, optimizer, scheduler, run.extra), run)
    with training_mode(model), keeper.named_in_divergence():
        first, history = keeper.resume()
        run.shared.begin(model)
        monitor = _LossMonitor(model, history, run)
        with Progress(run.label, run.steps, "steps", done=first, quiet=run.quiet or not leads) as progress:
            for step in range(first, run.steps):
                done = step + 1
                monitor.add(done, _compute_gradients(model, optimizer, loss, step, run))
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                if run.after_step is not None:
                    run.after_step(done)
                progress.advance(1, monitor.note)
                try:
                    _check_signals(done, run.shared)
                except signals.Interrupted:
                    keeper.save(done, monitor)
                    raise
                if keeper.is_due():
                    keeper.save(done, monitor)
        monitor.require_finite(run.steps)  # the last update; no loss was computed after it
        keeper.save(run.steps, monitor)
    return history


def _compute_gradients(model: nn.Module, optimizer: Optimizer, loss: Loss, step: int, run: TrainingRun) -> Tensor:
    """Leave the gradients of the whole batch in the parameters; returns the loss."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(run.seed, "layers", step))  # dropout and the like
        try:
            value = loss(step, generator(run.seed, "step", step))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"{run.label.capitalize()}: batch normalisation cannot be trained on a batch of one image; batches "
                "(distillation.batch) and sets (transfer.size) of at least 2 images are needed."
            ) from error
        optimizer.zero_grad(set_to_none=True)
        value.backward()
    return run.shared.add_gradients(model, optimizer, value).detach()


def _check_signals(done: int, shared: DataParallel) -> None:
    """Stop where a signal asked for it; the processes of a divided training all stop after the same step."""
    if not shared.divided:
        signals.check()
    elif done % _AGREE_EVERY == 0 and (signum := shared.team.largest(signals.asked())):
        raise signals.Interrupted(signum)


class _LossMonitor:
    """Records the mean loss of each stretch of steps and stops a training that has diverged.

    Attributes:
        note: the last mean, to show beside the progress.
    """

    def __init__(self, model: nn.Module, history: History, run: TrainingRun) -> None:
        self.model, self.history, self.run = model, history, run
        self.note = ""
        # On the device of the losses to come: tensors of two devices cannot be averaged.
        device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
        self._recent = [torch.tensor(value, device=device) for value in history.pending]

    def add(self, done: int, loss: Tensor) -> None:
        """Record the loss of step ``done``; the mean is checked once per stretch, so that not every step waits."""
        self._recent.append(loss)
        if done % _LOSS_EVERY and done != self.run.steps:
            return
        mean = float(torch.stack(self._recent).double().mean())
        if not math.isfinite(mean):
            raise self._diverged(done)
        self._recent.clear()
        self.history.steps.append(done)
        self.history.losses.append(mean)
        self.note = f"loss {mean:.4f}"

    def require_finite(self, done: int) -> None:
        """Raise :class:`DivergenceError` unless losses, weights and batch statistics are finite."""
        self.history.pending = [float(value) for value in self._recent]
        statistics = (b for name, b in self.model.named_buffers() if name.endswith(("running_mean", "running_var")))
        tensors = (*self.model.parameters(), *statistics, torch.tensor(self.history.pending, dtype=torch.float64))
        if not all(bool(torch.isfinite(value).all()) for value in tensors):
            raise self._diverged(done)

    def _diverged(self, done: int) -> DivergenceError:
        return DivergenceError(
            f"{self.run.label.capitalize()} diverged: the loss is no longer finite in the {_LOSS_EVERY} steps up to "
            f"step {done} of {self.run.steps}. A smaller learning rate usually helps."
        )


class _CheckpointKeeper:
    """Resumes a training from its checkpoint and writes it anew from time to time; does nothing without one."""

    def __init__(self, training: TrainingState, run: TrainingRun) -> None:
        self.training, self.run, self.team = training, run, run.shared.team
        self.checkpoint: Checkpoint | None = None
        if run.checkpoint is not None:
            shapes = {name: list(value.shape) for name, value in training.model.state_dict().items()}
            fingerprint = fingerprint_of([run.identity, run.steps, run.seed, shapes])
            self.checkpoint = Checkpoint(Path(run.checkpoint), fingerprint)
        self._started = self._saved = time.monotonic()

    def resume(self) -> tuple[int, History]:
        """The number of finished steps and their history, with the state restored where there is one."""
        step, history = 0, History()
        if self.checkpoint is not None:
            path = self.checkpoint.path
            if self.team.leads:
                remove_leftovers(path.parent, path.name)
            if self.team.first(self.checkpoint.exists):
                step, history = self.checkpoint.load(self.training)
                self.team.wait()  # for processes that still read, before the first one writes again
        self._saved = time.monotonic()
        self._started = self._saved - history.seconds  # as if the parts before this one had run without a pause
        return step, history

    def is_due(self) -> bool:
        """Whether the last checkpoint is old enough to write another."""
        return self.checkpoint is not None and time.monotonic() - self._saved >= self.run.checkpoint_every

    def save(self, done: int, monitor: _LossMonitor) -> None:
        """Write the state after ``done`` steps; where something is not finite, the last good checkpoint stays."""
        monitor.history.seconds = time.monotonic() - self._started
        if self.checkpoint is not None and self.team.leads:
            monitor.require_finite(done)
            self.checkpoint.save(self.training, done, monitor.history)
        self._saved = time.monotonic()

    @contextmanager
    def named_in_divergence(self) -> Iterator[None]:
        """Within the block a :class:`DivergenceError` names the checkpoint that was kept."""
        try:
            yield
        except DivergenceError as error:
            if self.checkpoint is None or not self.checkpoint.path.exists():
                raise
            raise DivergenceError(f"{error} The last good checkpoint is kept: {self.checkpoint.path}.") from error


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Within the block the model trains; afterwards it is in ``eval()``."""
    keep_freed_memory()
    model.train()
    try:
        with fast_response_norms(model):
            yield
    finally:
        model.eval()
