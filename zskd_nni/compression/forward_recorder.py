"""One forward pass, recorded as a ``torch.fx`` graph.

The network runs on a real input, so that any Python on shapes, flags and optional arguments runs as it always does.
Numbers that come from a shape remember where they come from, and enter the graph as questions to that tensor. A
question about the *values* of a tensor that depends on the input is refused: another image might have another answer.
"""

from __future__ import annotations

import builtins
import inspect
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Tracer
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

DEPENDS = "zskd_nni_depends_on_the_input"

# What Python calls an operator on tensors, and the function of the graph; True: the operands change places.
_OPERATORS: dict[str, tuple[Callable[..., Any], bool]] = {
    "add": (operator.add, False),
    "sub": (operator.sub, False),
    "mul": (operator.mul, False),
    "div": (operator.truediv, False),
    "matmul": (operator.matmul, False),
    "pow": (operator.pow, False),
    "neg": (operator.neg, False),
    "add_": (operator.iadd, False),
    "sub_": (operator.isub, False),
    "mul_": (operator.imul, False),
    "div_": (operator.itruediv, False),
    "__getitem__": (operator.getitem, False),
    "__eq__": (operator.eq, False),
    "__ne__": (operator.ne, False),
    "__floordiv__": (operator.floordiv, False),
    "__mod__": (operator.mod, False),
    "__pow__": (operator.pow, False),
    "__and__": (operator.and_, False),
    "__or__": (operator.or_, False),
    "__rsub__": (operator.sub, True),
    "__rdiv__": (operator.truediv, True),
    "__rtruediv__": (operator.truediv, True),
    "__rfloordiv__": (operator.floordiv, True),
    "__rpow__": (operator.pow, True),
    "__rmatmul__": (operator.matmul, True),
}
_VALUES = {
    "__bool__", "__float__", "__int__", "__index__", "__complex__", "__contains__", "__array__", "item", "tolist",
    "numpy", "equal", "allclose", "is_nonzero",
}  # fmt: skip
_ONLY_THE_SHAPE = {"zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"}
_ONLY_THE_SHAPE |= {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"}


class ValueNeededError(Exception):
    """Forward asks for a value of a tensor that depends on the input."""


class _FromShape:
    """A number that follows from shapes, with the way to compute it in the graph."""

    recorder: Recorder
    make: Callable[[], Node]
    origins: frozenset[tuple[Node, int]]

    def plain(self) -> Any:
        raise NotImplementedError

    def fix(self) -> None:
        """Python has used the number itself: what follows holds for this number only."""
        self.recorder.fixed.update(self.origins)


class ShapeInt(int, _FromShape):
    """A whole number that follows from shapes."""

    def plain(self) -> int:
        """Without what it follows from."""
        return int.__pos__(self)


class ShapeFloat(float, _FromShape):
    """A fraction that follows from shapes."""

    def plain(self) -> float:
        """Without what it follows from."""
        return float.__pos__(self)


class Shape(tuple):
    """In the place of a ``torch.Size``, whose own ``numel`` would lose what its sizes follow from."""

    def numel(self) -> int:
        """The product of the sizes."""
        return math.prod(self)

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Shape(found) if isinstance(index, slice) else found

    def __add__(self, other: Any) -> Shape:
        return Shape((*self, *other))


def _plain(value: Any) -> Any:
    return value.plain() if isinstance(value, _FromShape) else value


def _add_arithmetic(kind: Any) -> None:
    """Results of arithmetic follow from the same shapes; a comparison or a conversion fixes the number."""
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
        function = getattr(operator, name)

        def forwards(self: Any, other: Any, function: Any = function) -> Any:
            return _computed(function, self, other)

        def backwards(self: Any, other: Any, function: Any = function) -> Any:
            return _computed(function, other, self)

        setattr(kind, f"__{name}__", forwards)
        setattr(kind, f"__r{name}__", backwards)
    kind.__neg__ = lambda self: _computed(operator.neg, self)
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        function = getattr(operator, name)

        def compare(self: Any, other: Any, function: Any = function) -> Any:
            if not isinstance(other, _FromShape):  # two shapes that are compared lose their channels together
                self.fix()
            return function(self.plain(), _plain(other))

        setattr(kind, f"__{name}__", compare)
    for name in ("int", "float", "bool", "round", "trunc", "floor", "ceil", "hash"):

        def convert(self: Any, *arguments: Any, name: str = f"__{name}__") -> Any:
            if name != "__hash__":
                self.fix()
            plain = self.plain()
            return bool(plain) if name == "__bool__" else getattr(plain, name)(*arguments)

        setattr(kind, f"__{name}__", convert)


_add_arithmetic(ShapeInt)
_add_arithmetic(ShapeFloat)


def _computed(function: Callable[..., Any], *operands: Any) -> Any:
    """The result of arithmetic on numbers, of which at least one follows from shapes."""
    if any(isinstance(operand, Tensor) or not isinstance(operand, int | float) for operand in operands):
        return NotImplemented
    shaped = [operand for operand in operands if isinstance(operand, _FromShape)]
    value = function(*map(_plain, operands))
    recorder = shaped[0].recorder
    origins = frozenset().union(*(operand.origins for operand in shaped))
    return recorder.number(value, lambda: recorder.call(function, operands), origins)


@dataclass(frozen=True)
class OwnLayer:
    """A convolution, linear layer or batch normalisation that a class of the user's computes in its own forward.

    Attributes:
        path: of the module, which holds the weights.
        layer: PyTorch's layer with the same tensors and settings.
    """

    path: str
    layer: nn.Module


class Recorder(TorchFunctionMode):
    """Records what runs in its ``with`` block; see :func:`record`.

    Attributes:
        graph: what was recorded.
        fixed: ``(node, dim)`` of the sizes that Python has used as numbers.
        own_layers: by path, the layers that stand for a module's own computation.
        constants: attribute name -> tensor, of the tensors that belong to no module.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.graph = Graph()
        self.fixed: set[tuple[Node, int]] = set()
        self.own_layers: dict[str, nn.Module] = {}
        self.constants: dict[str, Tensor] = {}
        self.nodes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.views: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of which tensor, at which index
        self.inside = 0  # of layers that are recorded as one
        self.running: list[nn.Module] = []
        self.paths = {module: path for path, module in model.named_modules()}
        self.owners: dict[int, tuple[nn.Module, str, str]] = {}
        for path, module in model.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.owners.setdefault(id(tensor), (module, path, name))

    # ---- numbers

    def number(self, value: Any, make: Callable[[], Node], origins: frozenset[tuple[Node, int]]) -> Any:
        """A number that follows from shapes; its node is only made where the graph needs it."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        number: Any = ShapeInt(value) if isinstance(value, int) else ShapeFloat(value)
        made: list[Node] = []

        def once() -> Node:
            if not made:
                made.append(make())
            return made[0]

        number.recorder, number.make, number.origins = self, once, origins
        return number

    def size(self, tensor: Tensor, dim: int) -> Any:
        """A size of a tensor of the graph."""
        node = self.nodes[tensor]
        value, dim = Tensor.size(tensor, dim), dim % max(tensor.dim(), 1)
        make = lambda: self.add("call_method", "size", (node, dim), {}, False)  # noqa: E731
        return self.number(value, make, frozenset({(node, dim)}))

    def shape(self, tensor: Tensor) -> Shape:
        """All sizes of a tensor of the graph."""
        return Shape([self.size(tensor, dim) for dim in range(tensor.dim())])

    # ---- nodes

    def add(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], depends: bool) -> Node:
        """A node, and whether its value depends on the input."""
        node = self.graph.create_node(kind, target, args, kwargs)
        node.meta[DEPENDS] = depends
        return node

    def call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Node:
        """The node of a function."""
        arguments = self.argument(args)
        return self.add("call_function", function, arguments, {}, _depend(arguments))

    def argument(self, value: Any) -> Any:
        """A value as an argument of a node: nodes in the place of tensors and of numbers that follow from shapes."""
        if isinstance(value, Tensor):
            return self.node(value)
        if isinstance(value, _FromShape):
            return value.make()
        if isinstance(value, slice):
            parts = tuple(self.argument(each) for each in (value.start, value.stop, value.step))
            # NNI looks for nodes in lists, tuples and dicts, so that a slice with one is a node itself.
            return self.call(slice, parts) if any(isinstance(part, Node) for part in parts) else slice(*parts)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return tuple(map(self.argument, value))
        if isinstance(value, tuple | list):
            return (tuple if isinstance(value, tuple) else list)(map(self.argument, value))
        if isinstance(value, Mapping):
            return {name: self.argument(each) for name, each in value.items()}
        if is_dataclass(value) and not isinstance(value, type):
            return {field.name: self.argument(getattr(value, field.name)) for field in fields(value)}
        return value

    def node(self, tensor: Tensor) -> Node:
        """The node of a tensor; one that was there before is an attribute."""
        known = self.nodes.get(tensor)
        if known is None:
            owner = self.owners.get(id(tensor))
            if owner is None:
                # What an earlier recording has set is found again; another tensor gets another name.
                tried = (f"_tensor_constant{number}" for number in itertools.count(len(self.constants)))
                name = next(each for each in tried if getattr(self.model, each, tensor) is tensor)
                self.constants[name] = tensor
            else:
                name = f"{owner[1]}.{owner[2]}".lstrip(".")
            known = self.nodes[tensor] = self.add("get_attr", name, (), {}, False)
        return known

    def remember(self, node: Node, result: Any) -> None:
        """The node of each tensor in a result."""
        if isinstance(result, Tensor):
            self.nodes[result] = node
        elif isinstance(result, tuple | list):
            for position, part in enumerate(result):
                self.remember_part(node, position, part)
        elif isinstance(result, Mapping):
            for name, part in result.items():
                self.remember_part(node, name, part)

    def remember_part(self, node: Node, key: Any, part: Any) -> None:
        """The node of what stands at one place of a result."""
        if _tensors(part):
            self.remember(self.add("call_function", operator.getitem, (node, key), {}, node.meta[DEPENDS]), part)

    # ---- what runs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self.inside:
            return func(*args, **kwargs)
        name = _name(func)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and (answer := self.question(func, name, first, args, kwargs)) is not None:
            return answer
        if name in _VALUES and any(self.depends(each) for each in _tensors((args, kwargs))):
            raise ValueNeededError(f"`{name.strip('_')}` asks for the value of a tensor that depends on the input")
        plain_args, plain_kwargs = _without_shapes(args), _without_shapes(kwargs)
        if name in ("data", "detach") and first is not None:  # the same values; NNI asks for gradients behind them
            result = func(*plain_args, **plain_kwargs)
            self.nodes[result] = self.node(first)
            return result
        if name == "__setitem__" and first is not None:
            node = self.call(assigned, args)
            func(*plain_args)
            self.nodes[first] = node
            self.write_back(first)
            return None
        own = self.own_layer(name, args, kwargs)
        if own is not None:
            result = func(*plain_args, **plain_kwargs)
            self.own_layers[own.path] = own.layer
            self.remember(self.add("call_module", own.path, (self.argument(first),), {}, True), result)
            return result
        # Before it runs: what is changed in place is another node afterwards.
        given, named = self.argument(args), self.argument(kwargs)
        version = None if first is None else first._version
        result = func(*plain_args, **plain_kwargs)
        if _tensors(result):
            kind, target, swapped = _target(func, name)
            depends = name not in _ONLY_THE_SHAPE and _depend((given, named))
            self.remember(self.add(kind, target, given[::-1] if swapped else given, named, depends), result)
            if first is not None and first._version != version:
                self.write_back(first)
            elif name == "__getitem__" and first is not None and isinstance(result, Tensor) and result._is_view():
                self.views[result] = (first, args[1])
        return result

    def write_back(self, tensor: Tensor) -> None:
        """A part of a tensor that is changed in place changes the tensor."""
        while (view := self.views.get(tensor)) is not None:
            whole, index = view
            self.nodes[whole] = self.call(assigned, (whole, index, tensor))
            tensor = whole

    def depends(self, tensor: Tensor) -> bool:
        """Whether the value of a tensor depends on the input."""
        node = self.nodes.get(tensor)
        return node is not None and bool(node.meta[DEPENDS])

    def question(self, func: Any, name: str, tensor: Tensor, args: Any, kwargs: Any) -> Any:
        """The answer to a question about the shape of a tensor of the graph; None for anything else."""
        if tensor not in self.nodes:
            return None
        if name == "shape" or (name == "size" and len(args) == 1 and not kwargs):
            return self.shape(tensor)
        if name == "size":
            dim = _plain(args[1] if len(args) > 1 else kwargs.get("dim"))
            return self.size(tensor, dim) if isinstance(dim, int) else self.shape(tensor)
        if name in ("numel", "nelement"):
            node, value = self.nodes[tensor], func(tensor)
            origins = frozenset((node, dim) for dim in range(tensor.dim()))
            return self.number(value, lambda: self.add("call_method", "numel", (node,), {}, False), origins)
        return None

    def own_layer(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OwnLayer | None:
        """The layer that a running module computes with weights of its own, if this call is one."""
        if name not in _OWN_LAYERS or not self.running:
            return None
        module = self.running[-1]
        try:
            given = inspect.signature(_OWN_LAYERS[name][0]).bind(*args, **kwargs)
        except TypeError:
            return None
        given.apply_defaults()
        values = {key: _without_shapes(value) for key, value in given.arguments.items()}
        images = values.pop("input")
        path = self.paths.get(module)
        if not path or images not in self.nodes or not self.depends(images) or path in self.own_layers:
            return None
        for key in ("weight", "bias", "running_mean", "running_var"):
            tensor = values.get(key)
            if tensor is not None and self.owners.get(id(tensor), (None, None, None))[0::2] != (module, key):
                return None
            if key in ("weight", "bias") and not isinstance(tensor, nn.Parameter | None):
                return None
        layer = _OWN_LAYERS[name][1](images, values)
        if layer is None:
            return None
        layer._modules = dict(module._modules)  # what else the class calls stays where it is
        return OwnLayer(path, layer.eval())

    # ---- modules

    def module(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run a module: as one node if it is one of PyTorch's, else what is in it."""
        if self.inside or module not in self.paths:
            return call(module, *args, **kwargs)
        path = self.paths[module]
        scripted = isinstance(module, torch.jit.ScriptModule)
        if not path or not (scripted or Tracer().is_leaf_module(module, path)):
            self.running.append(module)
            try:
                return call(module, *args, **kwargs)
            finally:
                self.running.pop()
        args, kwargs = _positional(module, args, kwargs)
        arguments = self.argument(args), self.argument(kwargs)
        changed = args[0] if args and isinstance(args[0], Tensor) else None
        version = None if changed is None else changed._version
        self.inside += 1
        try:
            result = call(module, *_without_shapes(args), **_without_shapes(kwargs))
        finally:
            self.inside -= 1
        self.remember(self.add("call_module", path, *arguments, _depend(arguments)), result)
        if changed is not None and changed._version != version:
            self.write_back(changed)
        return result

    def script(self, call: Callable[..., Any], function: Any, args: Any, kwargs: Any) -> Any:
        """Run a compiled function as the Python that it was compiled from; as one node where that asks for values."""
        source = getattr(function, "_torchdynamo_inline", None)
        if source is not None and not self.inside:
            try:
                return source(*args, **kwargs)
            except ValueNeededError:
                pass
        return self.function(_Named(function.name, lambda *a, **k: call(function, *a, **k)), args, kwargs)

    def function(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a function as one node, such as one that ``torch.fx.wrap`` names."""
        if self.inside or not _tensors((args, kwargs)):
            return function(*args, **kwargs)
        arguments = self.argument(args), self.argument(kwargs)
        self.inside += 1
        try:
            result = function(*_without_shapes(args), **_without_shapes(kwargs))
        finally:
            self.inside -= 1
        if _tensors(result):
            self.remember(self.add("call_function", function, *arguments, _depend(arguments)), result)
        return result


def record(model: nn.Module, arguments: Mapping[str, Any]) -> Recorder:
    """Run the model once and record its graph.

    Args:
        model: in the mode that is to be recorded.
        arguments: of its forward, by name; the tensors among them become the inputs of the graph. A name with a ``*``
            before it holds a tuple of further positional arguments.

    Raises:
        ValueNeededError: forward asks for a value of a tensor that depends on the input.
    """
    recorder = Recorder(model)
    positional: list[Any] = []
    for name, value in arguments.items():
        several = name.startswith("*")
        for position, each in enumerate(value if several else (value,)):
            node = recorder.graph.placeholder(f"{name.strip('*')}_{position}" if several else name)
            node.meta[DEPENDS] = True
            recorder.remember(node, each)
            positional.append(each)
    with torch.no_grad(), _patched(recorder), recorder:
        recorder.running.append(model)
        result = model.forward(*positional)
        output = recorder.argument(result)
    recorder.graph.output(output)
    for node in reversed(recorder.graph.nodes):  # a changed part, of whose tensor nothing else is read
        if node.target is assigned and not node.users:
            recorder.graph.erase_node(node)
    return recorder


@contextmanager
def _patched(recorder: Recorder) -> Iterator[None]:
    """Calls of modules, of functions that are recorded as one, and ``len`` of a tensor go to the recorder."""
    call, length = nn.Module.__call__, builtins.len
    script_call = torch.jit.ScriptFunction.__call__
    apply = torch.autograd.Function.__dict__["apply"]  # not yet bound: bound to Function it serves no subclass

    def module_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder.module(call, self, args, kwargs)

    def function_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return recorder.function(_Named(cls.__name__, apply.__get__(None, cls)), args, kwargs)

    def script_function_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return recorder.script(script_call, self, args, kwargs)

    def length_of(value: Any) -> int:
        if isinstance(value, Tensor) and not recorder.inside and value.dim() and value in recorder.nodes:
            return recorder.size(value, 0)
        return length(value)

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: recorder.function(function, args, kwargs)

    named = torch.fx._symbolic_trace._wrapped_fns_to_patch
    places = [(frame, name) for (_, name), frame in named.items() if callable(frame.get(name))]
    before = [(frame, name, frame[name]) for frame, name in places]
    try:
        for frame, name, function in before:
            frame[name] = wrapped(function)
        nn.Module.__call__ = module_call  # type: ignore[method-assign]
        torch.autograd.Function.apply = classmethod(function_apply)
        torch.jit.ScriptFunction.__call__ = script_function_call  # type: ignore[method-assign]
        builtins.len = length_of
        yield
    finally:
        builtins.len = length
        torch.jit.ScriptFunction.__call__ = script_call  # type: ignore[method-assign]
        torch.autograd.Function.apply = apply
        nn.Module.__call__ = call  # type: ignore[method-assign]
        for frame, name, function in before:
            frame[name] = function


def assigned(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of the tensor after ``tensor[index] = value``."""
    copy = tensor.clone()
    copy[index] = value
    return copy


# ---- helpers


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return _tensors(list(value.values()))
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _without_shapes(value: Any) -> Any:
    """The same arguments with plain numbers."""
    if isinstance(value, _FromShape):
        return value.plain()
    if isinstance(value, slice):
        return slice(*map(_without_shapes, (value.start, value.stop, value.step)))
    if type(value) in (tuple, list, torch.Size, Shape):
        return type(value)([_without_shapes(each) for each in value])
    if type(value) is dict:
        return {name: _without_shapes(each) for name, each in value.items()}
    return value


def _depend(arguments: Any) -> bool:
    found = False

    def visit(node: Node) -> Node:
        nonlocal found
        found = found or bool(node.meta.get(DEPENDS))
        return node

    torch.fx.node.map_arg(arguments, visit)
    return found


def _name(func: Any) -> str:
    if getattr(func, "__name__", "") == "__get__":
        return str(func.__self__.__name__)
    return str(getattr(func, "__name__", func))


def _target(func: Any, name: str) -> tuple[str, Any, bool]:
    """Kind and target of a function's node, and whether its operands change places."""
    if getattr(func, "__name__", "") == "__get__":
        return "call_function", _Attribute(name), False
    if getattr(Tensor, name, None) is func or getattr(func, "__objclass__", None) in Tensor.__mro__:
        function, swapped = _OPERATORS.get(name, (None, False))
        return ("call_method", name, False) if function is None else ("call_function", function, swapped)
    return "call_function", func, False


class _Attribute:
    """``getattr`` of one name, such as ``T``, as a function of the tensor."""

    def __init__(self, name: str) -> None:
        self.name = self.__name__ = self.__qualname__ = name
        self.__module__ = __name__

    def __call__(self, tensor: Tensor) -> Any:
        return getattr(tensor, self.name)


class _Named:
    """``apply`` of an autograd function of the user's, or a compiled function, under a name that a graph can print."""

    def __init__(self, name: str, apply: Callable[..., Any]) -> None:
        self.apply = apply
        self.__name__ = self.__qualname__ = name
        self.__module__ = __name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.apply(*args, **kwargs)


def _positional(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """NNI knows layers with positional arguments only."""
    if not kwargs:
        return args, kwargs
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return args, kwargs
    return bound.args, bound.kwargs


def _sized(value: Any, dims: int) -> Any:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * dims


def _convolution(images: Tensor, values: dict[str, Any]) -> nn.Module | None:
    weight, groups = values["weight"], values["groups"]
    dims = weight.dim() - 2
    if weight.dim() != images.dim() or dims not in (1, 2):
        return None
    padding = values["padding"]
    with torch.device("meta"):
        layer: Any = (nn.Conv1d if dims == 1 else nn.Conv2d)(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            _sized(values["stride"], dims),
            padding if isinstance(padding, str) else _sized(padding, dims),
            _sized(values["dilation"], dims),
            groups,
            values["bias"] is not None,
        )
    layer.weight, layer.bias = values["weight"], values["bias"]
    return layer


def _linear(images: Tensor, values: dict[str, Any]) -> nn.Module | None:
    weight = values["weight"]
    if weight.dim() != 2:
        return None
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], values["bias"] is not None)
    layer.weight, layer.bias = weight, values["bias"]
    return layer


def _normalisation(images: Tensor, values: dict[str, Any]) -> nn.Module | None:
    mean, weight, bias = values["running_mean"], values["weight"], values["bias"]
    if mean is None or values["training"] or images.dim() not in (2, 3, 4) or (weight is None) != (bias is None):
        return None
    with torch.device("meta"):
        kind = nn.BatchNorm2d if images.dim() == 4 else nn.BatchNorm1d
        layer = kind(mean.numel(), values["eps"], affine=weight is not None)
    layer.weight, layer.bias = weight, bias
    layer.running_mean, layer.running_var = mean, values["running_var"]
    layer.num_batches_tracked = None
    return layer


# Name of a function -> what has its signature, and what makes the layer.
_OWN_LAYERS: dict[str, tuple[Callable[..., Any], Callable[[Tensor, dict[str, Any]], nn.Module | None]]] = {
    "conv1d": (lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: None, _convolution),
    "conv2d": (lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: None, _convolution),
    "linear": (lambda input, weight, bias=None: None, _linear),
    "batch_norm": (nn.functional.batch_norm, _normalisation),
}
