"""Points inside a network by module path: what passes there can be watched, or replaced, without touching the model.

A point is the input or the output of a module. Everything is done by hooks that are gone when the block ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zskd_nni.runtime.errors import UserError


@dataclass(frozen=True)
class FeaturePoint:
    """The input or the output of the module at a path.

    Attributes:
        path: as in ``model.named_modules()``.
        side: ``output`` or ``input`` (the first positional argument).
    """

    path: str
    side: str = "output"

    def __str__(self) -> str:
        return f"the {self.side} of {self.path!r}"


def module_at(model: nn.Module, path: str, whose: str = "The model") -> nn.Module:
    """The module at ``path``.

    Raises:
        UserError: there is none.
    """
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        known = ", ".join([name for name, _ in model.named_modules() if name][-8:])
        raise UserError(f"{whose} has no module {path!r}; its last ones: {known}.") from error


@contextmanager
def watched(model: nn.Module, point: FeaturePoint) -> Iterator[list[Tensor]]:
    """Within the block, every tensor that passes the point is appended to the list.

    Raises:
        UserError: the model has no such module.
    """
    seen: list[Tensor] = []

    def note_input(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    def note_output(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        seen.append(output)

    module = module_at(model, point.path)
    if point.side == "input":
        hook = module.register_forward_pre_hook(note_input)
    else:
        hook = module.register_forward_hook(note_output)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def replaced(model: nn.Module, point: FeaturePoint, features: Tensor) -> Iterator[None]:
    """Within the block, ``features`` pass the point instead of what the network makes of its input.

    Raises:
        UserError: the model has no such module.
    """

    def give_input(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (features, *inputs[1:])

    def give_output(_module: nn.Module, _inputs: tuple[Any, ...], _output: Any) -> Tensor:
        return features

    module = module_at(model, point.path)
    if point.side == "input":
        hook = module.register_forward_pre_hook(give_input)
    else:
        hook = module.register_forward_hook(give_output)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Within the block every module is in ``eval()`` and no gradients are recorded."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
