"""The checkpoint of a training: everything a resumed run needs to go on bit by bit."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.tensors import load_sealed, save_sealed

_LIKE_PARAMETERS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


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
