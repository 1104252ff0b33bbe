"""A device that is not the CPU, on machines that have no other.

Its tensors say that they lie on ``elsewhere:0``; what they hold lies in the CPU's memory, and the CPU computes on it.
What PyTorch forbids between a GPU and the CPU is forbidden here, too: to compute with tensors of both, but for single
numbers and indices. So code that forgets to send something fails here as it would on a GPU, and what a GPU would have
to be waited for is counted. Kernels, precision and speed of a GPU are what this cannot show.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"
MEMORY = 2**30  # bytes that it claims to have free

aten = torch.ops.aten
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
_ASKING = (
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default),
    *(aten._unique2.default, aten.unique_dim.default),
)
_library = torch.library.Library("aten", "IMPL")
waits: Counter[str] = Counter()


class Elsewhere(Tensor):
    """A tensor on the device ``elsewhere``; ``inner`` is what it holds, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.inner!r})"

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Elsewhere):
            raise RuntimeError(f"Attempted to call `variable.set_data(tensor)`, but the tensor is not on {NAME}.")
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


class _Module(_DummyBackendModule):
    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        return MEMORY, MEMORY

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return []

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        pass

    def synchronize(self, device: object = None) -> None:
        pass


def install() -> None:
    """Make the device known to this process; there is no way back."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    for operator in (aten.empty.memory_format, aten.empty_strided.default, aten._to_copy.default):
        _library.impl(operator, _implementation(operator), "PrivateUse1")
    _library.impl("_copy_from", lambda source, target, *rest: _copy(target, source, *rest), "PrivateUse1")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often the device had to be waited for: its operator and the line of the package that asked."""
    waits.clear()
    found: Counter[str] = Counter()
    yield found
    found.update(waits)


def _implementation(operator: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _call(operator, args, kwargs)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


def _here(value: Any) -> bool:
    """Whether this is a tensor on the CPU that a GPU could not compute with."""
    return isinstance(value, Tensor) and not isinstance(value, Elsewhere) and value.dim() > 0


def _wait(what: str) -> None:
    frame = sys._getframe(1)
    while frame.f_back is not None and "/zskd_nni/" not in frame.f_code.co_filename:
        frame = frame.f_back
    waits[f"{what} ({frame.f_code.co_filename.rpartition('/zskd_nni/')[2]}:{frame.f_lineno})"] += 1


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(source, Elsewhere) != isinstance(target, Elsewhere) and not (
        non_blocking and isinstance(target, Elsewhere)
    ):
        _wait("a copy")
    _inner(target).copy_(_inner(source))
    return target


def _to_copy(source: Tensor, device: Any = None, non_blocking: bool = False, **options: Any) -> Tensor:
    there = isinstance(source, Elsewhere) if device is None else torch.device(device).type == NAME
    if there != isinstance(source, Elsewhere) and not (non_blocking and there):
        _wait("a copy")
    options.pop("pin_memory", None)
    copied = aten._to_copy.default(_inner(source), **options)
    return Elsewhere(copied) if there else copied


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is aten._to_copy.default:
        return _to_copy(*args, **kwargs)
    if func is aten.copy_.default:
        return _copy(*args, **kwargs)
    leaves = [*_leaves(args), *_leaves(kwargs.values())]
    involved = [leaf for leaf in leaves if isinstance(leaf, Elsewhere)]
    if involved:
        _check_devices(func, args, leaves)
    if func in _ASKING:
        _wait(str(func))
    if func in _INDEXING and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]):
        _wait(str(func))

    def plain(value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, torch.device) else _inner(value)

    if not involved and torch.device(kwargs.get("device") or "cpu").type != NAME:
        return func(*args, **kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    result = func(*_mapped(plain, args), **{key: _mapped(plain, value) for key, value in kwargs.items()})
    same = {id(tensor.inner): tensor for tensor in involved}  # what was changed in place is still itself

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return same[id(value)] if id(value) in same else Elsewhere(value)

    return _mapped(wrapped, result)


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """What an operator is called with, lists taken apart. PyTorch's own walk takes longer than most operators."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list | tuple):
        changed = [_mapped(change, one) for one in value]
        return changed if isinstance(value, list) else tuple(changed)
    return change(value)


def _check_devices(func: Any, args: tuple[Any, ...], leaves: list[Any]) -> None:
    allowed: list[Any] = []
    if func in _INDEXING and isinstance(args[0], Elsewhere):
        allowed = [index for index in args[1] if _here(index)]
        for _ in allowed:
            _wait("a copy of indices")
    for leaf in leaves:
        if _here(leaf) and not any(leaf is index for index in allowed):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu, in {func}!")
