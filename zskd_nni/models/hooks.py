"""Forward hooks and training modes that last for one ``with`` block; the network is as before after it.

Modules are named by their path, as in ``model.named_modules()``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zskd_nni.runtime.errors import UserError

HookFunction = Callable[[str, Any], Any]
"""Takes a module's path, and its input or output; returns a replacement of that value, or None."""


@dataclass(frozen=True)
class FeaturePoint:
    """The input or the output of the module at a path.

    Attributes:
        path: of the module.
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
def hooked(
    model: nn.Module, paths: Iterable[str], before: HookFunction | None = None, after: HookFunction | None = None
) -> Iterator[None]:
    """Within the block, functions are called whenever one of the modules is.

    Args:
        model: the network.
        paths: of the modules.
        before: called with the path and the first positional argument. What it returns, unless None, replaces the
            argument.
        after: called with the path and the output. What it returns, unless None, replaces the output.

    Raises:
        UserError: the model has no module at one of the paths.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
        >>> with hooked(model, ["0"], after=lambda path, output: print(path, list(output.shape))):
        ...     _ = model(torch.zeros(3, 4))
        0 [3, 2]
    """

    def hook_before(path: str, function: HookFunction) -> Callable[..., Any]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            value = function(path, inputs[0] if inputs else None)
            return None if value is None else (value, *inputs[1:])

        return hook

    def hook_after(path: str, function: HookFunction) -> Callable[..., Any]:
        return lambda _module, _inputs, output: function(path, output)

    with ExitStack() as handles:
        for path in paths:
            module = module_at(model, path)
            if before is not None:
                handles.enter_context(module.register_forward_pre_hook(hook_before(path, before)))
            if after is not None:
                handles.enter_context(module.register_forward_hook(hook_after(path, after)))
        yield


def hooked_at(model: nn.Module, point: FeaturePoint, function: HookFunction) -> AbstractContextManager[None]:
    """As :func:`hooked`, for one point."""
    if point.side == "input":
        return hooked(model, [point.path], before=function)
    return hooked(model, [point.path], after=function)


@contextmanager
def recording_features(model: nn.Module, point: FeaturePoint) -> Iterator[list[Any]]:
    """Within the block, the value at the point is appended to the list at each forward pass.

    Raises:
        UserError: the model has no such module.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> with recording_features(model, FeaturePoint("1", "input")) as features:
        ...     logits = model(torch.zeros(3, 1, 2, 2))
        >>> features[0].shape
        torch.Size([3, 4])
    """
    seen: list[Any] = []
    with hooked_at(model, point, lambda _path, value: seen.append(value)):
        yield seen


@contextmanager
def recording_outputs(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Within the block, the last output of each module is kept by its path.

    Raises:
        UserError: the model has no module at one of the paths.
    """
    outputs: dict[str, Any] = {}
    with hooked(model, paths, after=outputs.__setitem__):
        yield outputs


def replacing(model: nn.Module, point: FeaturePoint, features: Tensor) -> AbstractContextManager[None]:
    """Within the block, ``features`` replace the value that the network computes at the point.

    Raises:
        UserError: the model has no such module.
    """
    return hooked_at(model, point, lambda _path, _value: features)


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Within the block no forward hook of the model runs, such as those with which NNI collects scores."""
    kept = [(module, module._forward_hooks) for module in model.modules()]
    for module, hooks in kept:
        module._forward_hooks = type(hooks)()
    try:
        yield
    finally:
        for module, hooks in kept:
            module._forward_hooks = hooks


@contextmanager
def evaluating(*networks: Callable[..., Any]) -> Iterator[None]:
    """Within the block every module of the networks is in ``eval()`` mode; afterwards each has its own mode again.

    Args:
        networks: modules. Other callables have no mode and are left alone.
    """
    modules = [module for network in networks if isinstance(network, nn.Module) for module in network.modules()]
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
