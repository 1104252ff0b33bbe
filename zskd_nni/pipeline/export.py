"""The files of a finished student: ONNX in floating point and in integers, their sizes, their latency, their logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.onnx_export import export_onnx, run_onnx
from zskd_nni.models.teacher import Teacher
from zskd_nni.pipeline.latency import median_latencies
from zskd_nni.pipeline.students import StudentResult
from zskd_nni.runtime.tensors import save_tensors
from zskd_nni.training.inference import float_answers

if TYPE_CHECKING:
    from zskd_nni.compression.quantization.quantize import QuantizedNetwork

STUDENT, INTEGERS = "student.onnx", "student-int8.onnx"
# Share of the held-out images on which onnxruntime and NNI's simulation must choose the same class. Below the first
# there is a warning, below the second an error.
GOOD_AGREEMENT, LEAST_AGREEMENT = 0.995, 0.98


def export_student(
    student: StudentResult, teacher: Teacher, out: Path, held_out: Tensor, fold_asked: bool = False
) -> dict[str, Any]:
    """Write the student's ONNX files, and the teacher's in ``state/`` to compare them with.

    Args:
        student: its ``student.safetensors`` is in ``out``.
        teacher: on the CPU.
        out: folder of the run.
        held_out: images ``(N, C, H, W)`` on which the files are checked.
        fold_asked: whether the recipe asks for folds of BatchNorm.

    Returns:
        ``bytes``, ``onnx_difference``, ``latency_ms`` and ``quantization`` of the report.

    Raises:
        UserError: a file does not compute what its network does.
    """
    difference = export_onnx(student.network, teacher.spec, out / STUDENT, held_out)
    teacher_onnx, teacher_weights = out / "state" / "teacher.onnx", out / "state" / "teacher.safetensors"
    export_onnx(teacher.model, teacher.spec, teacher_onnx, held_out)  # again: a file of an earlier run may be damaged
    save_tensors(teacher_weights, teacher.model.state_dict())
    files = {"teacher": teacher_onnx, "student": out / STUDENT}
    quantization = None
    if student.quantization is not None:
        quantization = export_integers(student.quantization, teacher.spec, out / INTEGERS, held_out, fold_asked)
        if quantization["exported"]:
            files["student_int8"] = out / INTEGERS
    latencies = median_latencies(files, held_out[:1])
    return {
        "bytes": {
            "teacher": {"safetensors": teacher_weights.stat().st_size, "onnx": teacher_onnx.stat().st_size},
            "student": {
                "safetensors": (out / "student.safetensors").stat().st_size,
                "onnx": (out / STUDENT).stat().st_size,
                "onnx_int8": (out / INTEGERS).stat().st_size if "student_int8" in files else None,
            },
        },
        "onnx_difference": difference,
        "latency_ms": {name: latencies.get(name) for name in ("teacher", "student", "student_int8")},
        "quantization": quantization,
    }


def export_integers(
    quantized: QuantizedNetwork, spec: InputSpec, path: Path, held_out: Tensor, fold_asked: bool = False
) -> dict[str, Any]:
    """Write the integer file if ONNX has operators for the quantizer; otherwise remove an older file.

    Args:
        quantized: the quantized student.
        spec: its input.
        path: of the file.
        held_out: images ``(N, C, H, W)`` on which onnxruntime must agree with NNI's simulation.
        fold_asked: whether the recipe asks for folds of BatchNorm.

    Returns:
        ``quantization`` of the report; ``agreement`` is a share in [0, 1].

    Raises:
        UserError: the file does not compute what the simulation does.
    """
    from zskd_nni.compression.quantization.nni_quantizer import ROUNDING_QUANTIZERS
    from zskd_nni.compression.quantization.qdq_onnx import export_quantized_onnx

    exported, share, difference = quantized.quantizer in ROUNDING_QUANTIZERS, None, None
    notes = ["fuse_batch_norm found nothing to fold"] if fold_asked and not quantized.folds else []
    if exported:
        export = export_quantized_onnx(quantized, spec, path, held_out, LEAST_AGREEMENT)
        share, difference = export.agreement, export.max_logit_difference
        if share < GOOD_AGREEMENT:
            notes.append(
                f"warning: onnxruntime and NNI's simulation agree on {share:.1%} of the held-out images only, less "
                f"than {GOOD_AGREEMENT:.1%}"
            )
    else:
        path.unlink(missing_ok=True)
        notes.append(
            f"{quantized.quantizer} changes weights by more than rounding: it is simulated, and no integer "
            "file is written"
        )
    return {
        "quantizer": quantized.quantizer,
        "folds": [list(names) for names in quantized.folds],
        "layers": sorted(quantized.calibration),
        "exported": exported,
        "agreement": share,
        "max_logit_difference": difference,
        "note": "; ".join(notes),
    }


def integer_answers(
    quantized: QuantizedNetwork, spec: InputSpec, exported: Path | None = None
) -> Callable[[Tensor], Tensor]:
    """A quantized network as such a function: onnxruntime on its file, or NNI's simulation if there is no file."""
    if exported is not None and exported.exists():
        return lambda images: run_onnx(exported, images)
    from zskd_nni.compression.quantization.quantize import simulated

    return float_answers(simulated(quantized), spec)
