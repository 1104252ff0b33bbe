"""The one training loop: steps, cosine schedule, checkpoint, resume.

Supervised training, distillation and NNI's fused compressions all run through :func:`fit`. Everything random in
step ``s`` is drawn from streams named after the seed and ``s``, so that a resumed run goes on bit by bit on the CPU
as if it had never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zskd_nni.models.local_response_norm import fast_response_norms
from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import remove_leftovers
from zskd_nni.runtime.progress import Progress
from zskd_nni.runtime.rng import derive_seed, generator
from zskd_nni.training.checkpoint import Checkpoint, History, Stateful, load_checkpoint, save_checkpoint
from zskd_nni.training.data_parallel import DataParallel

Loss = Callable[[int, torch.Generator], Tensor]
_LOSS_EVERY = 50
_AGREE_EVERY = 10  # steps after which a team looks whether one of it was asked to stop


class DivergenceError(UserError):
    """Something is no longer finite; :func:`fit` adds which checkpoint was kept."""


def cosine_schedule(optimizer: Optimizer, steps: int, warmup: int = 0) -> LRScheduler:
    """Linear warm-up over ``warmup`` steps, then half a cosine down to 0 at ``steps``."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    loss: Loss,
    *,
    steps: int,
    seed: int,
    label: str = "training",
    checkpoint: Checkpoint | None = None,
    after_step: Callable[[int], None] | None = None,
    extra: Stateful | None = None,
    shared: DataParallel | None = None,
    quiet: bool = False,
) -> History:
    """Take ``steps`` optimiser steps; the last state is the result, no step is picked by its score.

    Args:
        model: what is trained, in training mode already.
        optimizer: stepped once a step.
        scheduler: stepped once a step, or None.
        loss: ``loss(step, generator)`` gives the scalar to minimise; everything it draws comes from ``generator``.
        steps: number of steps, at least 1.
        seed: names the random streams.
        label: shown beside the progress.
        checkpoint: where to keep the state; an existing one of the same run is taken up.
        after_step: called with the number of finished steps.
        extra: more state for the checkpoint.
        shared: with which other processes; ``loss`` then gives this one's weighed part of the loss.
        quiet: no progress.

    Raises:
        DivergenceError: the loss is not finite; names the step and the checkpoint that was kept.
        UserError: the checkpoint belongs to another run.
    """
    try:
        return _fit(
            model,
            optimizer,
            scheduler,
            loss,
            steps,
            seed,
            label,
            checkpoint,
            after_step,
            extra,
            shared or DataParallel(),
            quiet,
        )
    except DivergenceError as error:
        if checkpoint is None or not checkpoint.path.exists():
            raise
        raise DivergenceError(f"{error} The last good checkpoint is kept: {checkpoint.path}.") from error


def _fit(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    loss: Loss,
    steps: int,
    seed: int,
    label: str,
    checkpoint: Checkpoint | None,
    after_step: Callable[[int], None] | None,
    extra: Stateful | None,
    shared: DataParallel,
    quiet: bool,
) -> History:
    team = shared.team
    torch.set_flush_denormal(True)  # as in synthesis: for speed, and because the bits depend on it
    first, history = 0, History()
    if checkpoint is not None and team.leads:
        remove_leftovers(checkpoint.path.parent, checkpoint.path.name)
    if checkpoint is not None and team.first(checkpoint.path.exists):
        first, history = load_checkpoint(checkpoint, model, optimizer, scheduler, extra)
        team.wait()  # for those that still read, before the first writes another
    shared.begin(model)
    started, saved = time.monotonic(), time.monotonic()
    before = history.seconds
    mean = math.nan
    # Where the losses to come are: tensors of two devices cannot be averaged.
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    recent = [torch.tensor(value, device=device) for value in history.pending]

    def diverged(step: int) -> DivergenceError:
        return DivergenceError(
            f"{label.capitalize()} diverged: the loss is no longer finite in the {_LOSS_EVERY} steps up to step {step} "
            f"of {steps}. A smaller learning rate usually mends it."
        )

    def finite() -> bool:
        statistics = (value for name, value in model.named_buffers() if name.endswith(("running_mean", "running_var")))
        return all(bool(torch.isfinite(value).all()) for value in (*model.parameters(), *statistics))

    def save(step: int) -> None:
        if checkpoint is not None and team.leads:
            history.pending = [float(value) for value in recent]
            if not all(map(math.isfinite, history.pending)) or not finite():
                raise diverged(step)  # the last good checkpoint stays
            history.seconds = before + time.monotonic() - started
            save_checkpoint(checkpoint, model, optimizer, scheduler, step, history, extra)

    def check(step: int) -> None:
        """Stop where one is asked to; a team that takes every step together stops after the same one."""
        if not shared.divided:
            signals.check()
        elif step % _AGREE_EVERY == 0:
            signum = team.largest(signals.asked())
            if signum:
                raise signals.Interrupted(signum)

    with Progress(label, steps, "steps", done=first, quiet=quiet or not team.leads) as progress:
        for step in range(first, steps):
            with torch.random.fork_rng(devices=_cuda_devices(model)):
                torch.manual_seed(derive_seed(seed, "layers", step))  # dropout and the like
                try:
                    value = loss(step, generator(seed, "step", step))
                except ValueError as error:
                    if "more than 1 value per channel" not in str(error):
                        raise
                    raise UserError(
                        f"{label.capitalize()}: batch normalisation cannot be trained on a batch of one image; batches "
                        "(distillation.batch) and sets (transfer.size) of at least 2 images are needed."
                    ) from error
                optimizer.zero_grad(set_to_none=True)
                value.backward()
            value = shared.add_gradients(model, optimizer, value)
            recent.append(value.detach())
            done = step + 1
            if done % _LOSS_EVERY == 0 or done == steps:
                mean = float(torch.stack(recent).double().mean())
                if not math.isfinite(mean):
                    raise diverged(done)
                recent.clear()
                history.steps.append(done)
                history.losses.append(mean)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            if after_step is not None:
                after_step(done)
            progress.advance(1, "" if math.isnan(mean) else f"loss {mean:.4f}")
            try:
                check(done)
            except signals.Interrupted:
                save(done)
                raise
            if checkpoint is not None and time.monotonic() - saved >= checkpoint.every:
                save(done)
                saved = time.monotonic()
    if not finite():
        raise diverged(steps)  # by the very last update, which no loss has seen
    history.seconds = before + time.monotonic() - started
    save(steps)
    return history


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Within the block the model trains; afterwards it is in ``eval()``."""
    model.train()
    try:
        with fast_response_norms(model):
            yield
    finally:
        model.eval()
