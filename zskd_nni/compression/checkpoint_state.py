"""The state of NNI's compressors during a training, beside the weights and the optimiser.

NNI has no checkpoint of a compression. Its state is spread over wrappers (buffers that appear at the first forward
pass), counters of the compressors (steps, remaining times, whether scales are set), the current goals of scheduled
pruners, gradients collected by hooks, and optimisers in closures. All of it is reached from what a compressor gives to
the evaluator: tasks before and after the optimiser's step, patches of the loss, and hooks. A compressor that gives
nothing has no state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from nni.compression.base.compressor import Compressor
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.quantization import PtqQuantizer
from nni.compression.utils.evaluator import BackwardHook, Hook, TensorHook
from torch import Tensor, nn
from torch.optim import Optimizer

from zskd_nni.compression.pruning.pruner_kinds import SCORING_PRUNERS, WEIGHT_PRUNERS
from zskd_nni.data.sources import TransferSource
from zskd_nni.training.checkpoint import load_optimizer_state, optimizer_state

# They look at weights alone, or (distillers) at a loss that is a mean over images.
_DIVISIBLE = {*WEIGHT_PRUNERS, "AGPPruner", "LinearPruner", "ZeroShotDistiller", "DynamicLayerwiseDistiller"}
# What scheduled pruners and quantizers change of a target's setting.
_SETTINGS = ("sparse_ratio", "sparse_threshold", "max_sparse_ratio", "min_sparse_ratio", "apply_method")


def owners(function: Callable) -> list[Compressor | Optimizer]:
    """The compressors and optimisers to which a function belongs, or that it has in its closure."""
    cells = getattr(function, "__closure__", None) or ()
    found = (getattr(function, "__self__", None), *(cell.cell_contents for cell in cells))
    return [owner for owner in found if isinstance(owner, Compressor | Optimizer)]


class CompressionState:
    """Saves and restores the state of all fused compressors; the ``extra`` of a training.

    Args:
        source: the images; its state is saved too.
        model: the bound model, wrapped.

    Attributes:
        hooks: NNI's hooks on the bound model, in order of registration.
    """

    def __init__(self, source: TransferSource, model: nn.Module | None = None) -> None:
        self.source, self.model = source, model
        self.hooks: list[Hook] = []
        self._compressors: dict[int, Compressor] = {}  # by id, in order of appearance
        self._optimizers: dict[int, Optimizer] = {}

    def remember(self, function: Callable) -> None:
        """Remember the compressors and optimisers behind a function that a compressor gives to the evaluator."""
        for owner in owners(function):
            if isinstance(owner, Compressor):
                for compressor in (owner, *owner.fused_compressors, getattr(owner, "bound_pruner", None)):
                    if compressor is not None:
                        self._compressors.setdefault(id(compressor), compressor)
            else:
                self._optimizers.setdefault(id(owner), owner)

    def can_be_divided(self) -> bool:
        """Whether each of several processes may see only a part of a batch: no compressor looks at images or gradients.

        A distiller that takes the nearest of several linked layers might take different ones for different parts.
        """
        names = {type(compressor).__name__ for compressor in self._compressors.values()}
        links = [getattr(space, "link", None) for one in self._compressors.values() for space in _spaces(one)]
        several_links = any(isinstance(link, list | tuple) and len(link) > 1 for link in links)
        gradients = any(isinstance(hook, TensorHook | BackwardHook) for hook in self.hooks)
        return names <= _DIVISIBLE and not several_links and not gradients

    def only_scores(self) -> bool:
        """Whether this training serves a pruner's scores alone: Taylor or Slim, without schedule or distiller."""
        names = {type(compressor).__name__ for compressor in self._compressors.values()}
        return not names.isdisjoint(SCORING_PRUNERS) and names <= {*SCORING_PRUNERS, *WEIGHT_PRUNERS}

    def only_calibrates(self) -> bool:
        """Whether the bound model is under quantizers that read ranges alone (PTQ), and nothing is fused with them."""
        if self.model is None or self._compressors or self.hooks:
            return False
        wrappers = (getattr(module, "_nni_wrapper", None) for module in self.model.modules())
        functions = (function for wrapper in wrappers if wrapper is not None for function in wrapper._track_funcs)
        watching = {type(owner) for function in functions for owner in owners(function)}
        return watching == {PtqQuantizer}

    def description(self) -> list[str]:
        """The compressors and their settings, before the first step; the checkpoint of others is refused."""
        return [
            f"{type(compressor).__name__} {compressor.config_list!r} {sorted(_counters(compressor).items())!r}"
            for compressor in self._compressors.values()
        ]

    def state_dict(self) -> dict[str, Any]:
        """Nested tensors and plain values."""
        return {
            "source": self.source.state_dict(),
            "shapes": {
                path: {name: list(value.shape) for name, value in _own_tensors(module).items()}
                for path, module in self._wrapped().items()
            },
            "compressors": [
                {
                    "counters": _counters(compressor),
                    "linears": [linear.state_dict() for linear in _linears(compressor)],
                    "settings": [
                        {key: space._setting[key] for key in _SETTINGS if space._setting.get(key) is not None}
                        for space in _spaces(compressor)
                    ],
                }
                for compressor in self._compressors.values()
            ],
            "hooks": [[value for value in hook.buffer if isinstance(value, Tensor)] for hook in self.hooks],
            "optimizers": [optimizer_state(optimizer) for optimizer in self._optimizers.values()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, before the weights of the bound model are restored."""
        self.source.load_state_dict(state["source"])
        self._make_room(state["shapes"])
        for compressor, saved in zip(self._compressors.values(), state["compressors"], strict=True):
            for name, known in _counters(compressor).items():
                if name in saved["counters"]:
                    setattr(compressor, name, type(known)(saved["counters"][name]))
            for linear, tensors in zip(_linears(compressor), saved["linears"], strict=True):
                linear.load_state_dict(tensors)
            for space, settings in zip(_spaces(compressor), saved["settings"], strict=True):
                space._setting.update(settings)
        for hook, values in zip(self.hooks, state["hooks"], strict=True):
            on_device = isinstance(hook.target, Tensor)
            hook.buffer[:] = [value.to(hook.target.device) if on_device else value for value in values]
        for optimizer, saved in zip(self._optimizers.values(), state["optimizers"], strict=True):
            load_optimizer_state(optimizer, saved)

    def _wrapped(self) -> dict[str, nn.Module]:
        modules = {} if self.model is None else dict(self.model.named_modules())
        kinds = {path: (module, getattr(module, "_nni_wrapper", None)) for path, module in modules.items()}
        return {path: pair[0] for path, pair in kinds.items() if any(isinstance(one, ModuleWrapper) for one in pair)}

    def _make_room(self, shapes: dict[str, dict[str, list[int]]]) -> None:
        # Scales and ranges are None, or of another shape, until a forward pass; load_state_dict expects their shape.
        assert self.model is not None
        anywhere = next((tensor.device for tensor in self.model.parameters()), torch.device("cpu"))
        modules = self._wrapped()
        for path, own_shapes in shapes.items():
            module = modules[path]
            for name, shape in own_shapes.items():
                current = _own_tensors(module).get(name)
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


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in (*module._buffers.items(), *module._parameters.items()) if value is not None}


def _counters(compressor: Compressor) -> dict[str, bool | int | float]:
    return {name: value for name, value in vars(compressor).items() if isinstance(value, bool | int | float)}


def _spaces(compressor: Compressor) -> list[Any]:
    return [space for targets in compressor._target_spaces.values() for space in targets.values()]


def _linears(compressor: Compressor) -> list[nn.Module]:
    """The layers that NNI's adaptive distiller trains between student and teacher; they are part of neither."""
    by_path = getattr(compressor, "trans_linears", {})
    return [linear for targets in by_path.values() for linear in targets.values() if linear is not None]
