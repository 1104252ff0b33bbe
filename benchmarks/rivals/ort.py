"""onnxruntime's static quantization, from its package, calibrated on uniform noise."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import Tensor

from rivals.pairs import Pair, teacher_of
from rivals.quantization import NOISE, bits_of
from zskd_nni.models.onnx_export import onnx_bytes, run_onnx

_TYPES = {8: QuantType.QInt8, 4: QuantType.QInt4}
_BATCH = 100


class _Noise(CalibrationDataReader):
    def __init__(self, images: Tensor) -> None:
        self.parts = iter(images.split(_BATCH))

    def get_next(self) -> dict | None:
        part = next(self.parts, None)
        return None if part is None else {"images": part.numpy()}


def static_quantization(pair: Pair, task: str, seed: int) -> Callable[[Tensor], Tensor]:
    """The quantized file as a function of images: scales by channel, else the package's defaults."""
    teacher, (weight_bits, activation_bits) = teacher_of(pair), bits_of(task)
    with tempfile.TemporaryDirectory() as folder:
        plain, quantized = Path(folder, "float.onnx"), Path(folder, "quantized.onnx")
        plain.write_bytes(onnx_bytes(teacher.model, teacher.spec))
        quantize_static(
            plain,
            quantized,
            _Noise(teacher.spec.uniform_noise(NOISE, seed)),
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
            weight_type=_TYPES[weight_bits],
            activation_type=_TYPES[activation_bits],
        )
        data = quantized.read_bytes()
    return lambda images: run_onnx(data, images)
