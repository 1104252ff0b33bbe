"""What a run hands over: the student's ONNX files, their sizes, how fast they answer, and the answers themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.onnx_export import export_onnx, run_onnx
from zskd_nni.models.teacher import Teacher, first_tensor
from zskd_nni.pipeline.latency import median_latencies
from zskd_nni.pipeline.students import Made
from zskd_nni.runtime.tensors import save_tensors

if TYPE_CHECKING:
    from zskd_nni.compression.quantization.quantize import Quantization

STUDENT, INTEGERS = "student.onnx", "student-int8.onnx"
# Of the held-out images onnxruntime must choose as NNI's simulation does on so many, or there is a warning, an error.
GOOD_AGREEMENT, LEAST_AGREEMENT = 0.995, 0.98


def export_student(
    made: Made, teacher: Teacher, out: Path, held_out: Tensor, fold_asked: bool = False
) -> dict[str, Any]:
    """Write the student's ONNX files, and the teacher's in ``state/`` to compare them with.

    Args:
        made: the student, whose ``student.safetensors`` lies in ``out``.
        teacher: on the CPU.
        out: of the run.
        held_out: images ``(N, C, H, W)`` on which the files are checked.
        fold_asked: the recipe asked for folds of BatchNorm.

    Returns:
        ``bytes``, ``onnx_difference``, ``latency_ms`` and ``quantization`` of the report.

    Raises:
        UserError: a file answers otherwise than the network.
    """
    difference = export_onnx(made.network, teacher.spec, out / STUDENT, held_out)
    teacher_onnx, teacher_weights = out / "state" / "teacher.onnx", out / "state" / "teacher.safetensors"
    export_onnx(teacher.model, teacher.spec, teacher_onnx, held_out)  # anew: one from before may be damaged
    save_tensors(teacher_weights, teacher.model.state_dict())
    files = {"teacher": teacher_onnx, "student": out / STUDENT}
    quantization = None
    if made.quantization is not None:
        quantization = export_integers(made.quantization, teacher.spec, out / INTEGERS, held_out, fold_asked)
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
    quantization: Quantization, spec: InputSpec, path: Path, held_out: Tensor, fold_asked: bool = False
) -> dict[str, Any]:
    """Write the integer file where the quantizer can be said in ONNX; without one, an older file goes.

    Args:
        quantization: of the student.
        spec: of its input.
        path: of the file.
        held_out: images ``(N, C, H, W)`` on which onnxruntime must answer as NNI's simulation does.
        fold_asked: the recipe asked for folds of BatchNorm.

    Returns:
        What is to be reported of it.

    Raises:
        UserError: the file answers otherwise than the simulation.
    """
    from zskd_nni.compression.quantization.qdq_onnx import export_quantized_onnx
    from zskd_nni.compression.quantization.stage import EXPORTED

    result: dict[str, Any] = {
        "quantizer": quantization.quantizer,
        "folds": [list(names) for names in quantization.folds],
        "layers": sorted(quantization.calibration),
        "exported": quantization.quantizer in EXPORTED,
        "agreement": None,
        "max_logit_difference": None,
        "note": "",
    }
    notes = []
    if fold_asked and not result["folds"]:
        notes.append("fuse_batch_norm found nothing to fold")
    if not result["exported"]:
        notes.append(
            f"{quantization.quantizer} changes weights by more than rounding: it is simulated, and no integer "
            "file is written"
        )
        path.unlink(missing_ok=True)
        return {**result, "note": "; ".join(notes)}
    export = export_quantized_onnx(quantization, spec, path, held_out, LEAST_AGREEMENT)
    result.update(agreement=export.agreement, max_logit_difference=export.max_logit_difference)
    if export.agreement < GOOD_AGREEMENT:
        notes.append(
            f"warning: onnxruntime and NNI's simulation agree on {export.agreement:.1%} of the held-out images "
            f"only, less than {GOOD_AGREEMENT:.1%}"
        )
    return {**result, "note": "; ".join(notes)}


def answers_of(made: Made, spec: InputSpec) -> Callable[[Tensor], Tensor]:
    """What a student's network answers to images ``(N, C, H, W)``, in floating point."""
    return _answering(made.network, spec)


def integer_answers(
    quantization: Quantization, spec: InputSpec, exported: Path | None = None
) -> Callable[[Tensor], Tensor]:
    """What a quantized student answers: onnxruntime where there is a file of it, NNI's simulation otherwise."""
    if exported is not None and exported.exists():
        return lambda images: run_onnx(exported, images)
    from zskd_nni.compression.quantization.quantize import simulated

    return _answering(simulated(quantization), spec)


def _answering(network: nn.Module, spec: InputSpec) -> Callable[[Tensor], Tensor]:
    # Copies: a network may change its input in place, and others are asked about the same images.
    return lambda images: first_tensor(network(spec.normalise(images.clone())))
