"""What NNI's compressors remember during a training, beside weights and optimiser, as named tensors.

NNI keeps no checkpoint of a compression. Its state is spread over the wrappers (buffers that appear at the first
forward pass), over counters of the compressors (the step, the times left, whether scales were set), over the
momentary goals of scheduled pruners, over gradients gathered by hooks, and over optimisers that live in closures.
All of it is reached from what a compressor hands to the evaluator: tasks around the optimiser's step, patches of
the loss, and hooks. A compressor that hands over nothing has nothing to remember.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from nni.compression.base.compressor import Compressor
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils.evaluator import BackwardHook, Hook, TensorHook
from torch import Tensor, nn
from torch.optim import Optimizer

from zskd_nni.data.sources import TransferSource
from zskd_nni.training.checkpoint import lay_out_like_parameters

# Weights alone decide their masks; a distiller's loss is a mean over images.
_DIVISIBLE = (
    *("LevelPruner", "L1NormPruner", "L2NormPruner", "FPGMPruner", "AGPPruner", "LinearPruner"),
    *("ZeroShotDistiller", "DynamicLayerwiseDistiller"),
)
_GOALS = ("sparse_ratio", "sparse_threshold", "max_sparse_ratio", "min_sparse_ratio")


def _chooses(compressor: Compressor) -> bool:
    """Whether a distiller takes the nearest of several linked layers, which may be another one for each part."""
    spaces = (space for held in compressor._target_spaces.values() for space in held.values())
    links = (getattr(space, "link", None) for space in spaces)
    return any(not isinstance(link, str) and link is not None and len(link) > 1 for link in links)


class FusedState:
    """Saves and restores everything that a fused compression counts with; the ``extra`` of ``fit``.

    Args:
        source: the images; its state is kept too.
        model: the bound model, wrapped.

    Attributes:
        hooks: NNI's hooks on the bound model, in order of registration.
    """

    def __init__(self, source: TransferSource, model: nn.Module | None = None) -> None:
        self.source, self.model = source, model
        self.hooks: list[Hook] = []
        self._compressors: list[Compressor] = []
        self._optimizers: list[Optimizer] = []

    def note(self, handed: Callable) -> None:
        """Remember the compressors and optimisers that a function handed to the evaluator works with."""
        for thing in _held_by(handed):
            if isinstance(thing, Compressor):
                for compressor in (thing, *thing.fused_compressors, getattr(thing, "bound_pruner", None)):
                    if compressor is not None and not any(compressor is known for known in self._compressors):
                        self._compressors.append(compressor)
            if isinstance(thing, Optimizer) and not any(thing is known for known in self._optimizers):
                self._optimizers.append(thing)

    def can_be_divided(self) -> bool:
        """Whether nothing here looks at the images or gradients of a step, of which each of many sees a part."""
        if any(isinstance(hook, TensorHook | BackwardHook) for hook in self.hooks):
            return False
        return all(type(one).__name__ in _DIVISIBLE and not _chooses(one) for one in self._compressors)

    def description(self) -> list[str]:
        """Which compressors there are and what they were told to do; a checkpoint of others is refused.

        Read before the first step, when every counter stands at its start.
        """
        return [
            f"{type(compressor).__name__} {compressor.config_list!r} {sorted(_counters(compressor).items())!r}"
            for compressor in self._compressors
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Named tensors on any device."""
        state: dict[str, Tensor] = {f"source.{name}": value for name, value in self.source.state_dict().items()}
        for path, module in self._wrapped():
            for name, value in _own_tensors(module):
                state[f"shape.{path}:{name}"] = torch.tensor(value.shape, dtype=torch.int64)
        for number, compressor in enumerate(self._compressors):
            for name, count in _counters(compressor).items():
                state[f"counter.{number}:{name}"] = torch.tensor(count, dtype=torch.float64)
            for name, tensor in _linears(compressor):
                state[f"linear.{number}:{name}"] = tensor
            for path, spaces in compressor._target_spaces.items():
                for target, space in spaces.items():
                    for key, setting in _settings(space).items():
                        state[f"setting.{number}:{path}:{target}:{key}"] = _encoded(setting)
        for number, hook in enumerate(self.hooks):
            for place, value in enumerate(hook.buffer):
                if isinstance(value, Tensor):
                    state[f"hook.{number}:{place}"] = value
        for number, optimizer in enumerate(self._optimizers):
            for index, entries in optimizer.state_dict()["state"].items():
                for key, value in entries.items():
                    state[f"optimizer.{number}:{index}:{key}"] = torch.as_tensor(value)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what :meth:`state_dict` gave, before the weights of the bound model are put back."""
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in state.items():
            kind, rest = name.split(".", 1)
            groups.setdefault(kind, {})[rest] = value
        self.source.load_state_dict(groups.get("source", {}))
        self._make_room(groups.get("shape", {}))
        for number, compressor in enumerate(self._compressors):
            known = _counters(compressor)
            for name, value in _of(groups, "counter", number):
                if name in known:
                    setattr(compressor, name, type(known[name])(value.item()))
            linears = dict(_linears(compressor))
            for name, value in _of(groups, "linear", number):
                with torch.no_grad():
                    linears[name].copy_(value)
            for name, value in _of(groups, "setting", number):
                path, target, key = name.split(":")
                compressor._target_spaces[path][target]._setting[key] = _decoded(value)
        for number, hook in enumerate(self.hooks):
            hook.buffer[:] = [
                value.to(hook.target.device) if isinstance(hook.target, Tensor) else value
                for _, value in sorted(_of(groups, "hook", number), key=lambda entry: int(entry[0]))
            ]
        for number, optimizer in enumerate(self._optimizers):
            entries: dict[int, dict[str, Tensor]] = {}
            for name, value in _of(groups, "optimizer", number):
                index, key = name.split(":")
                entries.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
            lay_out_like_parameters(optimizer)

    def _wrapped(self) -> Iterator[tuple[str, nn.Module]]:
        for path, module in self.model.named_modules() if self.model is not None else ():
            if isinstance(module, ModuleWrapper) or isinstance(getattr(module, "_nni_wrapper", None), ModuleWrapper):
                yield path, module

    def _make_room(self, shapes: dict[str, Tensor]) -> None:
        # Scales and ranges are None, or of another shape, until a forward pass; load_state_dict wants them there.
        modules = dict(self._wrapped())
        assert self.model is not None
        anywhere = next((tensor.device for tensor in self.model.parameters()), torch.device("cpu"))
        for name, shape in shapes.items():
            path, own = name.rsplit(":", 1)
            module = modules[path]
            current = module._buffers.get(own)
            if current is None:
                current = module._parameters.get(own)
            if current is not None and list(current.shape) == shape.tolist():
                continue
            device = next((tensor.device for tensor in module.parameters()), anywhere)
            room = torch.zeros(shape.tolist(), device=device if current is None else current.device)
            if isinstance(current, nn.Parameter):
                current.data = room
            elif own in module._parameters:  # the folded bias of a convolution without one
                module._parameters[own] = nn.Parameter(room, requires_grad=False)
            else:
                module._buffers[own] = room


def _held_by(function: Any) -> Iterator[Any]:
    yield getattr(function, "__self__", None)
    for cell in getattr(function, "__closure__", None) or ():
        yield cell.cell_contents


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for store in (module._buffers, module._parameters):
        for name, value in store.items():
            if value is not None:
                yield name, value


def _counters(compressor: Compressor) -> dict[str, bool | int | float]:
    return {name: value for name, value in vars(compressor).items() if isinstance(value, bool | int | float)}


def _linears(compressor: Compressor) -> Iterator[tuple[str, Tensor]]:
    # The layers that NNI's adaptive distiller trains between student and teacher belong to neither.
    for path, targets in getattr(compressor, "trans_linears", {}).items():
        for target, linear in targets.items():
            for name, value in [] if linear is None else linear.named_parameters():
                yield f"{path}:{target}:{name}", value


def _settings(space: Any) -> dict[str, Any]:
    return {key: space._setting[key] for key in (*_GOALS, "apply_method") if space._setting.get(key) is not None}


def _encoded(value: str | float) -> Tensor:
    if isinstance(value, str):
        return torch.tensor(list(value.encode()), dtype=torch.uint8)
    return torch.tensor(value, dtype=torch.float64)


def _decoded(value: Tensor) -> str | float:
    return bytes(value.tolist()).decode() if value.dtype == torch.uint8 else value.item()


def _of(groups: dict[str, dict[str, Tensor]], kind: str, number: int) -> list[tuple[str, Tensor]]:
    prefix = f"{number}:"
    return [(name[len(prefix) :], value) for name, value in groups.get(kind, {}).items() if name.startswith(prefix)]
