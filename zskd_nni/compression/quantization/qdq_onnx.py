"""A quantized network as ONNX with integer weights, and QuantizeLinear / DequantizeLinear at its activations.

NNI simulates: its quantized network computes in floating point, and its files are as large as before. Here every
quantized module is replaced by one that computes the same with ONNX's operators, and the whole network is exported.

If a config quantizes only inputs and weights, onnxruntime reads integers but multiplies in floating point. If it also
quantizes outputs, whole layers run on integers.

NNI's rounding is kept: ``(round(clamp(z + x / s, qmin, qmax)) - z) * s``. ONNX has only integer zero points. What LSQ+
learns beyond an integer becomes a constant offset, added before and subtracted after: for ``z = n + f`` the same levels
result from ``x + f s`` and ``n``. Types of fewer than 8 bits are stored in 8 and clipped to their own range. NNI's int8
ends at -127, ONNX's at -128: an activation below the calibrated range may come out one step lower.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.compression.quantization.bn_folding import folded_parameters
from zskd_nni.compression.quantization.nni_quantizer import ROUNDING_QUANTIZERS
from zskd_nni.compression.quantization.quantize import QuantizedNetwork, simulated
from zskd_nni.data.sources import TransferSource
from zskd_nni.models.hooks import hooked
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.onnx_export import checking_batch, onnx_bytes, run_onnx
from zskd_nni.models.shared_modules import set_module
from zskd_nni.models.teacher import first_tensor
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import write_atomic
from zskd_nni.training.metrics import agreement

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHECKED_IMAGES = 500  # of a transfer source


@dataclass(frozen=True)
class QuantizedExport:
    """The written file, and how onnxruntime's logits compare with the simulation's.

    Attributes:
        agreement: share of the images on which onnxruntime chooses the same class as NNI's simulation, in [0, 1].
        max_logit_difference: between the two, relative to the simulation's largest logit (at least 1).
        bytes: size of the file.
        unquantized: the same network without quantization, and its input.
    """

    agreement: float
    max_logit_difference: float
    bytes: int
    unquantized: tuple[nn.Module, InputSpec] = field(repr=False)

    @cached_property
    def float_bytes(self) -> int:
        """Size of the file of the same network without quantization, which is exported when this is first read."""
        return len(onnx_bytes(*self.unquantized))


def export_quantized_onnx(
    quantized: QuantizedNetwork,
    spec: InputSpec,
    path: str | Path,
    images: Tensor | TransferSource,
    least_agreement: float = 0.995,
) -> QuantizedExport:
    """Write a quantized network as ONNX, after checking onnxruntime's logits against NNI's simulation.

    Args:
        quantized: the result of :func:`~zskd_nni.compression.quantization.quantize.quantize`.
        spec: its input. The normalisation becomes part of the file.
        path: the ``.onnx`` file to write.
        images: ``(N, C, H, W)`` in the value range to compare the logits on, or a transfer source, of which the first
            500 are taken.
        least_agreement: smallest share of images, in [0, 1], on which both must choose the same class. With few bits
            the last digit of a sum may decide on a level, and so on the class. Where the simulation agrees less with
            itself in float64, the file only needs to agree as well as that.

    Raises:
        UserError: ONNX has no operators for the quantization, or onnxruntime's predictions differ.

    Example:
        >>> import tempfile
        >>> from zskd_nni import NoiseSource, QuantizationConfig, load_teacher, quantize
        >>> teacher = load_teacher("lenet5-digits")
        >>> images = NoiseSource(teacher.spec, 64)
        >>> layers = {"op_types": ["Conv2d", "Linear"], "target_names": ["_input_", "weight"], "quant_dtype": "int8"}
        >>> quantized = quantize(teacher.student(), QuantizationConfig([layers]), teacher, images)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = export_quantized_onnx(quantized, teacher.spec, f"{folder}/int8.onnx", images, 0.98)
        >>> written.bytes < 0.3 * written.float_bytes
        True
    """
    images = (images if isinstance(images, Tensor) else _first_images(images)).cpu()
    data = quantized_onnx_bytes(quantized, spec)
    simulation = simulated(quantized).cpu().float()
    expected, actual = _logits(simulation, images, spec), run_onnx(data, images)
    share = agreement(actual, expected)
    difference = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1))
    if share < least_agreement and share < agreement(_logits(simulation.double(), images.double(), spec), expected):
        raise UserError(
            f"onnxruntime and NNI's simulation of the quantized network agree on {share:.1%} of {len(images)} images, "
            f"less than {least_agreement:.1%}; the file was not written."
        )
    write_atomic(path, data)
    return QuantizedExport(share, difference, len(data), (quantized.network, spec))


def _logits(network: nn.Module, images: Tensor, spec: InputSpec) -> Tensor:
    copies = images.clone()  # the network may change its input in place
    with torch.no_grad():
        parts = [first_tensor(network(spec.normalise(part))) for part in copies.split(checking_batch(images))]
    return torch.cat(parts)


def _first_images(source: TransferSource) -> Tensor:
    random, parts = torch.Generator().manual_seed(0), list[Tensor]()
    while sum(map(len, parts)) < min(_CHECKED_IMAGES, source.size or _CHECKED_IMAGES):
        parts.append(source.batch(len(parts), random))
    return torch.cat(parts)


def quantized_onnx_bytes(quantized: QuantizedNetwork, spec: InputSpec) -> bytes:
    """A quantized network as ONNX: input ``images (N, C, H, W)`` in the value range, output ``logits (N, K)``.

    Raises:
        UserError: DoReFa's or BNN's quantization, other than 2 to 8 bits, scales of anything but tensors or channels,
            or no scales.
    """
    if quantized.quantizer not in ROUNDING_QUANTIZERS:
        raise UserError(
            f"{quantized.quantizer} changes weights by more than rounding and cannot be exported to int8; "
            "use PtqQuantizer, QATQuantizer, LsqQuantizer or LsqPlusQuantizer."
        )
    _require_scales(quantized, spec)
    return onnx_bytes(integer_model(quantized), spec)


def _require_scales(quantized: QuantizedNetwork, spec: InputSpec) -> None:
    """Refuse a called layer without scales: the file would hold it in floating point."""
    without = {
        path: target
        for path, targets in quantized.calibration.items()
        for target, entry in targets.items()
        if entry["scale"] is None and target in _always_present(quantized.network.get_submodule(path))
    }
    if not without:
        return
    called: list[str] = []
    network = copy.deepcopy(quantized.network).cpu().float().eval()
    with torch.no_grad(), hooked(network, without, after=lambda path, _: called.append(path)):
        network(spec.example_input())
    if called:
        raise UserError(
            f"{called[0]}.{without[called[0]]} has no scale, so that {quantized.quantizer} never quantized it; "
            "train it for more steps (compression.quantization.steps), more than quant_start_step."
        )


def _always_present(module: nn.Module) -> set[str]:
    """Targets of every call of the module; a second input may be optional."""
    return {"_input_0", "_output_0", *(name for name, _ in module.named_parameters(recurse=False))}


def integer_model(quantized: QuantizedNetwork) -> nn.Module:
    """A copy of the network with integer weights and ONNX's quantization operators. It can only be exported.

    Raises:
        UserError: see :func:`quantized_onnx_bytes`.
    """
    model = copy.deepcopy(quantized.network).cpu().float().eval()
    modules = dict(model.named_modules())
    folds = {names[0]: names[1:] for names in quantized.folds}
    for path, targets in quantized.calibration.items():
        followers = [modules[name] for name in folds.get(path, ())]
        set_module(model, path, _IntegerModule(modules[path], targets, followers, path))
        for name in folds.get(path, ()):
            set_module(model, name, nn.Identity())
    return model


class _TensorQuantization(nn.Module):
    """Scale, integer zero point and range of one tensor.

    Args:
        entry: NNI's calibration of it.
        channel_axes: which of its axes may have a scale for each channel.
        where: its name, for messages.
    """

    def __init__(self, entry: dict[str, Any], channel_axes: tuple[int, ...], where: str) -> None:
        super().__init__()
        bits, unsigned = int(entry["quant_bits"]), entry["quant_dtype"].startswith("uint")
        if not 2 <= bits <= 8:
            raise UserError(f"{where} is quantized to {bits} bits; ONNX files are written with 2 to 8.")
        self.qmin: int = 0 if unsigned else 1 - 2 ** (bits - 1)
        self.qmax: int = 2**bits - 1 if unsigned else 2 ** (bits - 1) - 1
        self.narrow = bits < 8
        dtype = torch.uint8 if unsigned else torch.int8
        scale, zero = entry["scale"].double(), entry["zero_point"].double()
        zero = zero.expand_as(scale) if zero.numel() == 1 else zero
        long = [axis for axis, size in enumerate(scale.shape) if size > 1]
        if len(long) > 1 or not set(long) <= set(channel_axes):
            raise UserError(
                f"{where} has scales of shape {list(scale.shape)}; ONNX files are written with one scale for a "
                "tensor or for each of its channels."
            )
        self.attributes: dict[str, Any] = {"axis": long[0]} if long else {}  # of ONNX's operators
        # The offset takes what is cut off here.
        integer = zero.round().clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        shape = (-1,) if self.attributes else ()
        self.has_offset = bool((zero - integer).abs().max() > 1e-6)
        self.scale = nn.Buffer(scale.float().reshape(shape))
        self.zero_point = nn.Buffer(integer.to(dtype).reshape(shape))
        if self.has_offset:
            self.offset = nn.Buffer(((zero - integer) * scale).float())
        if self.narrow:
            self.low, self.high = (nn.Buffer(((end - integer) * scale).float()) for end in (self.qmin, self.qmax))
        # In NNI's shape and type, so that the integers come from NNI's own arithmetic, bit for bit.
        self._nni = entry["scale"].float(), entry["zero_point"].float()

    def rounded(self, tensor: Tensor) -> Tensor:
        """The level of each number of a parameter, as NNI's simulation rounds it."""
        scale, zero = self._nni
        return torch.round(torch.clamp(zero + tensor.detach() / scale, self.qmin, self.qmax))

    def simulated(self, tensor: Tensor) -> Tensor:
        """A parameter as NNI's simulation has it, in floating point."""
        scale, zero = self._nni
        return (self.rounded(tensor) - zero) * scale

    def dequantize(self, integers: Tensor) -> Tensor:
        """DequantizeLinear of integers."""
        tensor = self._operator("DequantizeLinear", integers, torch.float32)
        return tensor - self.offset if self.has_offset else tensor

    def forward(self, tensor: Tensor) -> Tensor:
        """QuantizeLinear and DequantizeLinear of an activation."""
        if self.has_offset:
            tensor = tensor + self.offset
        if self.narrow:
            tensor = torch.minimum(torch.maximum(tensor, self.low), self.high)
        return self.dequantize(self._operator("QuantizeLinear", tensor, self.zero_point.dtype))

    def _operator(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        inputs = (tensor, self.scale, self.zero_point)
        return torch.onnx.ops.symbolic(name, inputs, self.attributes, dtype=dtype, shape=tensor.shape)


class _IntegerModule(nn.Module):
    """A module with the modules that NNI folds into it, between the quantization of its inputs and of its output.

    Args:
        module: the weight of a convolution or linear layer is stored in integers. Quantized parameters of any other
            module stay in floating point, with the values that the quantization leaves.
        targets: its calibration by target.
        followers: BatchNorm and ReLU that are folded into it.
        path: its name, for messages.
    """

    def __init__(self, module: nn.Module, targets: dict[str, dict], followers: list[nn.Module], path: str) -> None:
        super().__init__()
        self.inputs, self.outputs, self.parameter_levels = (nn.ModuleDict() for _ in range(3))
        parameters = folded_parameters(module, followers, path)
        self.relu = any(isinstance(follower, nn.ReLU) for follower in followers)
        self.stored = type(module) in (*_CONVOLUTIONS, nn.Linear)
        for target, entry in targets.items():
            if entry["scale"] is None:
                continue  # no batch has reached it, so that NNI does not quantize it either
            kind, _, position = target[1:].partition("_") if target.startswith("_") else ("", "", target)
            levels = _TensorQuantization(entry, (1,) if kind else (0, 1), f"{path}.{target}")
            if kind and not position.isdigit():
                raise UserError(f"{path}.{target} is named, not numbered; only positional activations are exported.")
            if kind:
                (self.inputs if kind == "input" else self.outputs)[position] = levels
            elif self.stored:
                self.parameter_levels[target] = levels
                self.register_buffer(f"{target}_", levels.rounded(parameters.pop(target)).to(levels.zero_point.dtype))
            else:
                parameters[target] = levels.simulated(parameters[target])
        self.module = module
        for name, value in parameters.items():
            if self.stored:
                self.register_buffer(f"{name}_", value)
            else:
                setattr(module, name, nn.Parameter(value, requires_grad=False))
        if self.stored:
            module.weight = module.bias = None  # type: ignore[assignment]  # so that the file has no float weights

    def __getattr__(self, name: str) -> Any:
        """What the network reads of the module beside calling it, such as ``in_channels``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    @property
    def weight(self) -> Tensor | None:
        """In floating point: the network may read it beside calling the module."""
        return self._parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        """As ``weight``."""
        return self._parameter("bias")

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """As the module's, with every quantized tensor rounded to its integers."""
        output = self._compute(*_quantize_each(self.inputs, arguments), **named)
        if self.relu:
            output = functional.relu(output)
        if isinstance(output, Tensor):
            return next(_quantize_each(self.outputs, (output,)))
        return type(output)(_quantize_each(self.outputs, output))

    def _compute(self, *arguments: Any, **named: Any) -> Any:
        if not self.stored:
            return self.module(*arguments, **named)
        module: Any = self.module
        compute: Any = functional.linear if isinstance(module, nn.Linear) else module._conv_forward
        return compute(arguments[0] if arguments else named["input"], self.weight, self.bias)

    def _parameter(self, name: str) -> Tensor | None:
        if not self.stored:
            return getattr(self.module, name, None)
        value: Tensor | None = getattr(self, f"{name}_", None)
        if value is None or name not in self.parameter_levels:
            return value
        levels: Any = self.parameter_levels[name]
        return levels.dequantize(value)


def _quantize_each(levels: nn.ModuleDict, values: Iterable[Any]) -> Iterator[Any]:
    for position, value in enumerate(values):
        yield levels[str(position)](value) if str(position) in levels else value
