"""What NNI's compressors remember during a training, beside weights and optimiser.

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
from zskd_nni.training.checkpoint import load_optimizer_state, optimizer_state

_NORM_PRUNERS = {"LevelPruner", "L1NormPruner", "L2NormPruner", "FPGMPruner"}
_SCORING = {"TaylorPruner", "SlimPruner"}
# Weights alone decide their masks; a distiller's loss is a mean over images.
_DIVISIBLE = {*_NORM_PRUNERS, "AGPPruner", "LinearPruner", "ZeroShotDistiller", "DynamicLayerwiseDistiller"}
_GOALS = ("sparse_ratio", "sparse_threshold", "max_sparse_ratio", "min_sparse_ratio")


def _chooses(compressor: Compressor) -> bool:
    """Whether a distiller takes the nearest of several linked layers, which may be another one for each part."""
    spaces = (space for held in compressor._target_spaces.values() for space in held.values())
    links = (getattr(space, "link", None) for space in spaces)
    return any(not isinstance(link, str) and link is not None and len(link) > 1 for link in links)


class CompressionState:
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

    def only_scores(self) -> bool:
        """Whether this training serves a pruner's scores alone: Taylor or Slim, without schedule or distiller."""
        names = {type(one).__name__ for one in self._compressors}
        return bool(names & _SCORING) and names <= {*_SCORING, *_NORM_PRUNERS}

    def description(self) -> list[str]:
        """Which compressors there are and what they were told to do; a checkpoint of others is refused.

        Read before the first step, when every counter stands at its start.
        """
        return [
            f"{type(compressor).__name__} {compressor.config_list!r} {sorted(_counters(compressor).items())!r}"
            for compressor in self._compressors
        ]

    def state_dict(self) -> dict[str, Any]:
        """Nested tensors and plain values."""
        return {
            "source": self.source.state_dict(),
            "shapes": {
                path: {name: list(value.shape) for name, value in _own_tensors(module)}
                for path, module in self._wrapped()
            },
            "compressors": [
                {
                    "counters": _counters(compressor),
                    "linears": dict(_linears(compressor)),
                    "settings": {
                        path: {target: _settings(space) for target, space in spaces.items()}
                        for path, spaces in compressor._target_spaces.items()
                    },
                }
                for compressor in self._compressors
            ],
            "hooks": [[value for value in hook.buffer if isinstance(value, Tensor)] for hook in self.hooks],
            "optimizers": [optimizer_state(optimizer) for optimizer in self._optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, before the weights of the bound model are restored."""
        self.source.load_state_dict(state["source"])
        self._make_room(state["shapes"])
        for compressor, saved in zip(self._compressors, state["compressors"], strict=True):
            known = _counters(compressor)
            for name, value in saved["counters"].items():
                if name in known:
                    setattr(compressor, name, type(known[name])(value))
            with torch.no_grad():
                for name, linear in _linears(compressor):
                    linear.copy_(saved["linears"][name])
            for path, targets in saved["settings"].items():
                for target, settings in targets.items():
                    compressor._target_spaces[path][target]._setting.update(settings)
        for hook, values in zip(self.hooks, state["hooks"], strict=True):
            hook.buffer[:] = [
                value.to(hook.target.device) if isinstance(hook.target, Tensor) else value for value in values
            ]
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            load_optimizer_state(optimizer, saved)

    def _wrapped(self) -> Iterator[tuple[str, nn.Module]]:
        for path, module in self.model.named_modules() if self.model is not None else ():
            if isinstance(module, ModuleWrapper) or isinstance(getattr(module, "_nni_wrapper", None), ModuleWrapper):
                yield path, module

    def _make_room(self, shapes: dict[str, dict[str, list[int]]]) -> None:
        # Scales and ranges are None, or of another shape, until a forward pass; load_state_dict wants them there.
        modules = dict(self._wrapped())
        assert self.model is not None
        anywhere = next((tensor.device for tensor in self.model.parameters()), torch.device("cpu"))
        for path, own_shapes in shapes.items():
            module = modules[path]
            for name, shape in own_shapes.items():
                current = dict(_own_tensors(module)).get(name)
                if current is not None and list(current.shape) == shape:
                    continue
                device = next((tensor.device for tensor in module.parameters()), anywhere)
                room = torch.zeros(shape, device=device if current is None else current.device)
                if isinstance(current, nn.Parameter):
                    current.data = room
                elif name in module._parameters:  # the folded bias of a convolution without one
                    module._parameters[name] = nn.Parameter(room, requires_grad=False)
                else:
                    module._buffers[name] = room


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
