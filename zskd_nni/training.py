"""The one training loop: steps, cosine schedule, checkpoint, resume.

Supervised training, distillation and NNI's fused compressions all run through :func:`fit`. Everything random in
step ``s`` is drawn from streams named after the seed and ``s``, so that a resumed run goes on bit by bit on the CPU
as if it had never stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zskd_nni import interrupt
from zskd_nni.data_parallel import DataParallel
from zskd_nni.errors import UserError
from zskd_nni.files import load_sealed, remove_leftovers, save_sealed
from zskd_nni.progress import Progress
from zskd_nni.response_norm import fast_response_norms
from zskd_nni.seeds import derive_seed, generator

Loss = Callable[[int, torch.Generator], Tensor]
_LOSS_EVERY = 50
_AGREE_EVERY = 10  # steps after which a team looks whether one of it was asked to stop
_LIKE_PARAMETERS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


class DivergenceError(UserError):
    """Something is no longer finite; :func:`fit` adds which checkpoint was kept."""


@dataclass
class History:
    """The loss along a run: mean over each stretch of 50 steps."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    pending: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """Where a run keeps its state, and what it must match to be taken up again.

    Attributes:
        path: a safetensors file.
        fingerprint: of everything that shapes the run; a checkpoint of another run is refused.
        every: seconds between two writes.
    """

    path: Path
    fingerprint: str
    every: float = 30.0


class Stateful(Protocol):
    """State beside model, optimiser and schedule: a streaming source, NNI's compressors."""

    def state_dict(self) -> dict[str, Tensor]:
        """What must be saved, by name."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what :meth:`state_dict` gave; called before the model's state is put back."""
        ...


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
            interrupt.check()
        elif step % _AGREE_EVERY == 0:
            signum = team.largest(interrupt.asked())
            if signum:
                raise interrupt.Interrupted(signum)

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
            except interrupt.Interrupted:
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


def save_checkpoint(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    step: int,
    history: History,
    extra: Stateful | None = None,
) -> None:
    """Write model, optimiser, schedule, extra state and history into one safetensors file, atomically."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    if extra is not None:
        tensors.update({f"extra.{name}": value for name, value in extra.state_dict().items()})
    optimizer_state = optimizer.state_dict()
    plain: dict[str, dict[str, Any]] = {}
    for index, entry in optimizer_state["state"].items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                plain.setdefault(str(index), {})[name] = value
    groups = [{k: v for k, v in group.items() if _is_plain(v)} for group in optimizer_state["param_groups"]]
    state = {
        "fingerprint": checkpoint.fingerprint,
        "step": step,
        "optimizer": {"state": plain, "groups": groups},
        "scheduler": None if scheduler is None else {k: v for k, v in scheduler.state_dict().items() if _is_plain(v)},
        "history": vars(history),
    }
    save_sealed(checkpoint.path, tensors, {"state": json.dumps(state)})


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(entry) for entry in value)
    return value is None or isinstance(value, int | float | str | bool)


def _fits(saved: Any, known: Any) -> bool:
    """Whether a value of a saved schedule is of the kind that a fresh one has there, if it has any yet."""
    if known is None:
        return True
    if isinstance(known, list | tuple):
        return isinstance(saved, list) and len(saved) == len(known) and all(map(_fits, saved, known))
    if isinstance(known, int | float) and not isinstance(known, bool):
        return isinstance(saved, int | float) and not isinstance(saved, bool)
    return type(saved) is type(known)


def load_checkpoint(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    extra: Stateful | None = None,
) -> tuple[int, History]:
    """Put a saved state back; returns the number of finished steps and the history.

    Raises:
        UserError: the file is damaged, or belongs to another run.
    """
    tensors, metadata = load_sealed(checkpoint.path)
    try:
        state = json.loads(metadata["state"])
        if state["fingerprint"] != checkpoint.fingerprint:
            raise UserError(
                f"The checkpoint {checkpoint.path} belongs to another run (its recipe, teacher or seed differ). "
                "Use another output folder, or remove the file to start over."
            )
        if extra is not None:
            extra.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("extra.")})
        weights = {name[6:]: value for name, value in tensors.items() if name.startswith("model.")}
        model.load_state_dict(weights)
        optimizer_state = optimizer.state_dict()
        entries: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in state["optimizer"]["state"].items()}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                entries.setdefault(int(index), {})[key] = value
        for group, saved in zip(optimizer_state["param_groups"], state["optimizer"]["groups"], strict=True):
            group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved.items()})
        if len({frozenset(entry) for entry in entries.values()}) > 1:
            raise ValueError("the optimiser's state is not whole")
        optimizer_state["state"] = entries
        optimizer.load_state_dict(optimizer_state)
        for weight, entry in optimizer.state.items():
            other = [k for k, v in entry.items() if isinstance(v, Tensor) and v.numel() not in (1, weight.numel())]
            if other:
                raise ValueError(f"the optimiser's {other[0]} is not of its weight's shape")
        lay_out_like_parameters(optimizer)
        if scheduler is not None:
            saved, known = state["scheduler"], scheduler.state_dict()
            other = [key for key, value in saved.items() if key in known and not _fits(value, known[key])]
            other += [key for key in saved if key not in known and hasattr(scheduler, key)]  # a method's name
            other += [key for key, value in known.items() if _is_plain(value) and key not in saved]
            if other:
                raise ValueError(f"the schedule's state is not whole: {', '.join(sorted(other))}")
            scheduler.load_state_dict(state["scheduler"])
        return _counted(state["step"]), _history(state["history"])
    except UserError:
        raise
    except Exception as error:  # what somebody wrote may be wrong in any way
        raise UserError(
            f"The checkpoint {checkpoint.path} does not fit this run ({' '.join(str(error).split())[:200]}). "
            "Remove the file to start over."
        ) from error


def _counted(step: Any) -> int:
    if type(step) is not int or step < 0:
        raise ValueError(f"{step!r} is no number of steps")
    return step


def _history(state: dict[str, Any]) -> History:
    history = History(**state)
    lists = (history.steps, history.losses, history.pending)
    figures = [figure for entries in lists if isinstance(entries, list) for figure in entries]
    whole = all(isinstance(entries, list) for entries in lists)
    if not whole or not all(type(figure) in (int, float) for figure in (*figures, history.seconds)):
        raise ValueError("its history is not one")
    # A number may be too large for a float, which is an OverflowError here and not in the middle of a training.
    history.losses, history.pending = list(map(float, history.losses)), list(map(float, history.pending))
    history.seconds = float(history.seconds)
    return history


def lay_out_like_parameters(optimizer: Optimizer) -> None:
    """Give moments their parameters' memory layout: a file has them contiguous, fused kernels take them in order."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if not isinstance(value, Tensor):
                    continue
                if name in _LIKE_PARAMETERS and value.shape != parameter.shape:
                    raise ValueError(f"{name} is of shape {list(value.shape)}, not {list(parameter.shape)}")
                if value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter.detach(), dtype=value.dtype).copy_(value)


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Within the block the model trains; afterwards it is in ``eval()``."""
    model.train()
    try:
        with fast_response_norms(model):
            yield
    finally:
        model.eval()
