"""The checkpoint of a training: everything that a resumed run needs to continue bit by bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.tensors import load_sealed, save_sealed

# Optimiser state that has one entry for each number of a parameter; other tensors may be scalars.
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


@dataclass
class History:
    """The loss along a run.

    Attributes:
        steps: the last step of each stretch of 50.
        losses: the mean loss of each stretch.
        seconds: spent on training, over all resumed parts.
        pending: losses of the steps since the last full stretch.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    pending: list[float] = field(default_factory=list)


_STEP_AND_HISTORY = TypeAdapter(tuple[Annotated[int, Field(ge=0)], History])


class Stateful(Protocol):
    """State beside model, optimiser and schedule, such as a live transfer source's or NNI's compressors'."""

    def state_dict(self) -> dict[str, Any]:
        """What must be saved: tensors and plain values, nested as :func:`~zskd_nni.runtime.tensors.save_sealed` can."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; called before the model's state is restored."""


@dataclass(frozen=True)
class TrainingState:
    """All parts of a training whose state a checkpoint holds."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None = None
    extra: Stateful | None = None

    def state_dict(self) -> dict[str, Any]:
        """The states of all parts, by name."""
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.optimizer),
            "scheduler": None if self.scheduler is None else _plain_entries(self.scheduler.state_dict()),
            "extra": None if self.extra is None else self.extra.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            Exception: of any kind, where the state does not fit.
        """
        if self.extra is not None:
            self.extra.load_state_dict(state["extra"])
        self.model.load_state_dict(state["model"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.scheduler is not None:
            _load_scheduler_state(self.scheduler, state["scheduler"])


@dataclass(frozen=True)
class Checkpoint:
    """The file that keeps a training's state.

    Attributes:
        path: of the file.
        fingerprint: of everything that shapes the run; the checkpoint of another run is refused.
    """

    path: Path
    fingerprint: str

    def exists(self) -> bool:
        """Whether there is a state to continue from.

        Raises:
            UserError: an older version left its checkpoint in the place of this one.
        """
        older = self.path.with_suffix(".safetensors")
        if self.path.stem.endswith("checkpoint") and older != self.path and older.exists():
            raise UserError(
                f"{older} is a checkpoint of an older version, whose format this one cannot continue; the same command "
                "makes it again. Remove the file to start over."
            )
        return self.path.exists()

    def save(self, training: TrainingState, step: int, history: History) -> None:
        """Write the state after ``step`` finished steps, atomically."""
        state = {"fingerprint": self.fingerprint, "step": step, "history": vars(history), **training.state_dict()}
        save_sealed(self.path, state)

    def load(self, training: TrainingState) -> tuple[int, History]:
        """Restore a saved state; returns the number of finished steps and the history.

        Raises:
            UserError: the file is damaged, of an older version, or belongs to another run.
        """
        state = load_sealed(self.path)
        try:
            if state["fingerprint"] != self.fingerprint:
                raise UserError(
                    f"The checkpoint {self.path} belongs to another run (its recipe, teacher or seed differ). "
                    "Use another output folder, or remove the file to start over."
                )
            training.load_state_dict(state)
            return _STEP_AND_HISTORY.validate_python((state["step"], state["history"]))
        except UserError:
            raise
        except Exception as error:  # a forged content may be wrong in any way
            raise UserError(
                f"The checkpoint {self.path} does not fit this run ({' '.join(str(error).split())[:200]}). "
                "Remove the file to start over."
            ) from error


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """An optimiser's state without what cannot be saved, such as functions in its groups."""
    state = optimizer.state_dict()
    return {"state": state["state"], "param_groups": [_plain_entries(group) for group in state["param_groups"]]}


def load_optimizer_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Restore what :func:`optimizer_state` gave.

    PyTorch checks neither which entries there are nor their shapes, and its fused kernels would then read beyond them.

    Raises:
        ValueError: the state is not whole, or of other parameters.
    """
    state = optimizer.state_dict()
    for group, saved_group in zip(state["param_groups"], saved["param_groups"], strict=True):
        _check_kinds("optimiser", saved_group, group)
        group.update(saved_group)
    if len({frozenset(entry) for entry in saved["state"].values()}) > 1:
        raise ValueError("the optimiser's state is not whole")
    optimizer.load_state_dict({**state, "state": saved["state"]})
    for parameter, entry in optimizer.state.items():
        for name, value in entry.items():
            if not isinstance(value, Tensor):
                continue
            scalar = value.numel() == 1 and name not in _MOMENTS
            if value.shape == parameter.shape:
                # In the parameter's memory layout: fused kernels read both in memory order.
                entry[name] = torch.empty_like(parameter.detach(), dtype=value.dtype).copy_(value)
            elif not scalar and (name in _MOMENTS or value.numel() != parameter.numel()):
                raise ValueError(f"{name} is of shape {list(value.shape)}, not {list(parameter.shape)}")


def _load_scheduler_state(scheduler: LRScheduler, saved: dict[str, Any]) -> None:
    methods = [key for key in saved if key not in vars(scheduler) and hasattr(scheduler, key)]
    if methods:
        raise ValueError(f"the schedule's state is not whole: {', '.join(methods)}")
    _check_kinds("schedule", saved, scheduler.state_dict())
    scheduler.load_state_dict(saved)


def _check_kinds(whose: str, saved: dict[str, Any], known: dict[str, Any]) -> None:
    """Refuse a saved state in which an entry of a fresh one is missing or of another type."""
    wrong = [key for key, value in saved.items() if key in known and not _same_kind(value, known[key])]
    wrong += [key for key in _plain_entries(known) if key not in saved]
    if wrong:
        raise ValueError(f"the {whose}'s state is not whole: {', '.join(sorted(wrong))}")


def _plain_entries(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int | float | str | bool | Tensor)


def _same_kind(saved: Any, known: Any) -> bool:
    """Whether a saved value is of the type that a fresh one has in its place, if it has any yet."""
    if known is None:
        return True
    if isinstance(known, list | tuple):
        return isinstance(saved, list | tuple) and len(saved) == len(known) and all(map(_same_kind, saved, known))
    if isinstance(known, int | float) and not isinstance(known, bool):
        return isinstance(saved, int | float) and not isinstance(saved, bool)
    return type(saved) is type(known)
