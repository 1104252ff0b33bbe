"""Real integers in ONNX from NNI's calibration: int8 weights, and QuantizeLinear / DequantizeLinear at activations.

NNI simulates: its quantized network computes in floating point, and its files are as large as before. Here every
quantized module of the student is replaced by one that says the same in ONNX's operators, and the whole is exported.

Where a config quantizes inputs and weights alone, onnxruntime reads integers but multiplies in floating point; where it
quantizes outputs too, whole layers run on integers.

NNI's rounding is kept: ``(round(clamp(z + x / s, qmin, qmax)) - z) * s``. ONNX takes an integer ``z`` alone; what
LSQ+ learns beyond it becomes a constant offset, added before and subtracted after: with ``z = n + f`` the same levels
are reached by ``x + f s`` and ``n``. Types of fewer than 8 bits are stored in 8, and clipped to their own range. NNI's
int8 ends at -127, ONNX's at -128: an activation below the calibrated range may come out one step lower here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from zskd_nni.compression.quantization.bn_folding import folded_parameters
from zskd_nni.compression.quantization.quantize import Quantization, simulated
from zskd_nni.models.hooks import hooked
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.onnx_export import checking_batch, onnx_bytes, run_onnx
from zskd_nni.models.shared_modules import set_module
from zskd_nni.models.teacher import first_tensor
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import write_atomic
from zskd_nni.training.metrics import agreement

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class QuantizedExport:
    """What was written, and how onnxruntime answers.

    Attributes:
        agreement: share of the images on which onnxruntime chooses as NNI's simulation does, in [0, 1].
        max_logit_difference: between the two, relative to the simulation's largest logit (at least 1).
        bytes: size of the file.
        float_bytes: size of the same student's file without quantization.
    """

    agreement: float
    max_logit_difference: float
    bytes: int
    float_bytes: int


def export_quantized_onnx(
    quantization: Quantization, spec: InputSpec, path: str | Path, images: Tensor, least_agreement: float = 0.995
) -> QuantizedExport:
    """Write the quantized student as ONNX and check onnxruntime's answers against NNI's simulation.

    Args:
        quantization: what ``quantize`` gave.
        spec: the student's input; the normalisation becomes part of the file.
        path: an ``.onnx`` file.
        images: ``(N, C, H, W)`` in the value range, on which both must agree.
        least_agreement: the smallest share of images with the same choice.

    Raises:
        UserError: the quantization cannot be said in ONNX, or onnxruntime answers otherwise.
    """
    data = quantized_onnx_bytes(quantization, spec)
    simulation = simulated(quantization).cpu().float()
    with torch.no_grad():
        copies = images.cpu().clone()  # the network may change its input in place
        parts = [first_tensor(simulation(spec.normalise(part))) for part in copies.split(checking_batch(images))]
    expected = torch.cat(parts)
    answered = run_onnx(data, images.cpu())
    share = agreement(answered, expected)
    difference = float((answered - expected).abs().max() / expected.abs().max().clamp_min(1))
    if not share >= least_agreement:
        raise UserError(
            f"onnxruntime and NNI's simulation of the quantized network agree on {share:.1%} of {len(images)} images, "
            f"less than {least_agreement:.1%}; the file was not written."
        )
    write_atomic(path, data)
    return QuantizedExport(share, difference, len(data), len(onnx_bytes(quantization.student, spec)))


def quantized_onnx_bytes(quantization: Quantization, spec: InputSpec) -> bytes:
    """The quantized student as ONNX: input ``images (N, C, H, W)`` in the value range, output ``logits (N, K)``.

    Raises:
        UserError: DoReFa's or BNN's quantization, other than 2 to 8 bits, scales by anything but tensor or channel, or
            none at all.
    """
    if quantization.quantizer in ("DoReFaQuantizer", "BNNQuantizer"):
        raise UserError(
            f"{quantization.quantizer} changes weights by more than rounding and cannot be exported to int8; "
            "use PtqQuantizer, QATQuantizer, LsqQuantizer or LsqPlusQuantizer."
        )
    _require_scales(quantization, spec)
    return onnx_bytes(integer_model(quantization), spec)


def _require_scales(quantization: Quantization, spec: InputSpec) -> None:
    """A layer that answers and has no scales would be written as floating point, in a file said to hold integers."""
    without = {
        path: target
        for path, targets in quantization.calibration.items()
        for target, entry in targets.items()
        if entry["scale"] is None and target in _always_there(quantization.student.get_submodule(path))
    }
    if not without:
        return
    reached: list[str] = []
    student = copy.deepcopy(quantization.student).cpu().float().eval()
    with torch.no_grad(), hooked(student, without, after=lambda path, _: reached.append(path)):
        student(spec.example_input())
    if reached:
        raise UserError(
            f"{reached[0]}.{without[reached[0]]} has no scale, so that {quantization.quantizer} never quantized it; "
            "train it for more steps (compression.quantization.steps), more than quant_start_step."
        )


def integer_model(quantization: Quantization) -> nn.Module:
    """A copy of the student with integer weights, made of ONNX's quantization operators. It can only be exported.

    Raises:
        UserError: see :func:`quantized_onnx_bytes`.
    """
    model = copy.deepcopy(quantization.student).cpu().float().eval()
    modules = dict(model.named_modules())
    folds = {names[0]: names[1:] for names in quantization.folds}
    for path, targets in quantization.calibration.items():
        followers = [modules[name] for name in folds.get(path, ())]
        set_module(model, path, _Quantized(modules[path], targets, followers, path))
        for name in folds.get(path, ()):
            set_module(model, name, nn.Identity())
    return model


def _always_there(module: nn.Module) -> set[str]:
    """Targets that every call of the module has; a second input may be optional."""
    return {"_input_0", "_output_0", *(name for name, _ in module.named_parameters(recurse=False))}


class _Levels(nn.Module):
    """Scale, integer zero point and range of one tensor.

    Args:
        entry: NNI's calibration of it.
        axes: which of its axes may have a scale for each channel.
        where: its name, for messages.
    """

    scale: Tensor
    zero_point: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, entry: dict[str, Any], axes: tuple[int, ...], where: str) -> None:
        super().__init__()
        name = entry["quant_dtype"]
        bits, unsigned = int(entry["quant_bits"]), name.startswith("uint")
        if not 2 <= bits <= 8:
            raise UserError(f"{where} is quantized to {bits} bits; ONNX files are written with 2 to 8.")
        self.qmin: int = 0 if unsigned else 1 - 2 ** (bits - 1)
        self.qmax: int = 2**bits - 1 if unsigned else 2 ** (bits - 1) - 1
        self.narrow = bits < 8
        dtype = torch.uint8 if unsigned else torch.int8
        scale, zero = entry["scale"].double(), entry["zero_point"].double()
        zero = zero.expand_as(scale) if zero.numel() == 1 else zero
        self.by_channel = scale.numel() > 1
        self.axis = 0
        if self.by_channel:
            long = [axis for axis, size in enumerate(scale.shape) if size > 1]
            if len(long) != 1 or long[0] not in axes:
                raise UserError(
                    f"{where} has scales of shape {list(scale.shape)}; ONNX files are written with one scale for a "
                    "tensor or for each of its channels."
                )
            self.axis = long[0]
        # Whatever is cut off here goes into the offset.
        integer = zero.round().clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        shape = (-1,) if self.by_channel else ()
        offset = (zero - integer) * scale
        self.has_offset = bool((zero - integer).abs().max() > 1e-6)
        self.register_buffer("scale", scale.float().reshape(shape))
        self.register_buffer("zero_point", integer.to(dtype).reshape(shape))
        if self.has_offset:
            self.register_buffer("offset", offset.float())
        if self.narrow:
            self.register_buffer("low", ((self.qmin - integer) * scale).float())
            self.register_buffer("high", ((self.qmax - integer) * scale).float())
        # The tensor as NNI has it, so that integers come from its own arithmetic, bit for bit.
        self._nni = entry["scale"].float(), entry["zero_point"].float()

    def integers(self, tensor: Tensor) -> Tensor:
        """The integers that NNI's simulation rounds a parameter to, in the type's 8 bits."""
        scale, zero = self._nni
        levels = torch.round(torch.clamp(zero + tensor.detach() / scale, self.qmin, self.qmax))
        return levels.to(self.zero_point.dtype)

    def restored(self, integers: Tensor) -> Tensor:
        """DequantizeLinear of integers."""
        tensor = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (integers, self.scale, self.zero_point),
            {"axis": self.axis} if self.by_channel else {},
            dtype=torch.float32,
            shape=integers.shape,
        )
        return tensor - self.offset if self.has_offset else tensor

    def forward(self, tensor: Tensor) -> Tensor:
        """QuantizeLinear and DequantizeLinear of an activation."""
        if self.has_offset:
            tensor = tensor + self.offset
        if self.narrow:
            tensor = torch.minimum(torch.maximum(tensor, self.low), self.high)
        integers = torch.onnx.ops.symbolic(
            "QuantizeLinear",
            (tensor, self.scale, self.zero_point),
            {"axis": self.axis} if self.by_channel else {},
            dtype=self.zero_point.dtype,
            shape=tensor.shape,
        )
        return self.restored(integers)


class _Quantized(nn.Module):
    """One module of the student with what NNI folds into it, between the quantization of its inputs and output.

    Args:
        module: a convolution or linear layer, whose weight becomes integers; of any other module quantized
            parameters keep their floating point and take the values that the quantization leaves.
        targets: its calibration by target.
        followers: BatchNorm and ReLU folded into it.
        path: its name, for messages.
    """

    def __init__(self, module: nn.Module, targets: dict[str, dict], followers: list[nn.Module], path: str) -> None:
        super().__init__()
        self.inputs = nn.ModuleDict()
        self.outputs = nn.ModuleDict()
        self.parameter_levels = nn.ModuleDict()
        parameters = folded_parameters(module, followers, path)
        self.relu = any(isinstance(follower, nn.ReLU) for follower in followers)
        self.stored = type(module) in (*_CONVOLUTIONS, nn.Linear)
        for target, entry in targets.items():
            if entry["scale"] is None:
                continue  # never reached by a batch, so that NNI does not quantize it either
            kind, _, place = target[1:].partition("_") if target.startswith("_") else ("", "", target)
            levels = _Levels(entry, (1,) if kind else (0, 1), f"{path}.{target}")
            if kind and not place.isdigit():
                raise UserError(f"{path}.{target} is named, not numbered; only positional activations are exported.")
            if kind:
                (self.inputs if kind == "input" else self.outputs)[place] = levels
                continue
            integers = levels.integers(parameters[target])
            if self.stored:
                self.parameter_levels[target] = levels
                self.register_buffer(f"{target}_", integers)
            else:
                scale, zero = levels._nni
                parameters[target] = (integers - zero) * scale
        self.module = module
        for name, value in parameters.items():
            if self.stored and name not in self.parameter_levels:
                self.register_buffer(f"{name}_", value)
            elif not self.stored:
                setattr(module, name, nn.Parameter(value, requires_grad=False))
        if self.stored:
            for name in ("weight", "bias"):  # the float weights must not end up in the file
                setattr(module, name, None)

    @property
    def weight(self) -> Tensor | None:
        """As the network may read it beside calling the module: in floating point."""
        return self._parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        """As ``weight``."""
        return self._parameter("bias")

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The module's, with every quantized tensor passed through its integers."""
        taken = [
            self.inputs[str(place)](argument) if str(place) in self.inputs else argument
            for place, argument in enumerate(arguments)
        ]
        output = self._computed(*taken, **named)
        if self.relu:
            output = functional.relu(output)
        if isinstance(output, Tensor):
            return self.outputs["0"](output) if "0" in self.outputs else output
        return type(output)(
            self.outputs[str(place)](entry) if str(place) in self.outputs else entry
            for place, entry in enumerate(output)
        )

    def _computed(self, *arguments: Any, **named: Any) -> Any:
        if not self.stored:
            return self.module(*arguments, **named)
        weight, bias = self.weight, self.bias
        assert weight is not None
        given = arguments[0] if arguments else named["input"]
        if isinstance(self.module, nn.Linear):
            return functional.linear(given, weight, bias)
        assert isinstance(self.module, _CONVOLUTIONS)
        return self.module._conv_forward(given, weight, bias)

    def _parameter(self, name: str) -> Tensor | None:
        if not self.stored:
            return getattr(self.module, name, None)
        value: Tensor | None = getattr(self, f"{name}_", None)
        if value is None or name not in self.parameter_levels:
            return value
        return cast(_Levels, self.parameter_levels[name]).restored(value)
