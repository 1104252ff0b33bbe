"""Checks of a recipe before the long work begins."""

from __future__ import annotations

from zskd_nni.models.onnx_export import check_exportable
from zskd_nni.pipeline.students import Students
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.distillation import check_student
from zskd_nni.training.hints import check_paths, find_hints


def check_work(students: Students) -> None:
    """Refuse what cannot be distilled, exported, pruned or quantized as the recipe asks.

    Raises:
        UserError: one sentence that names the key.
    """
    recipe, teacher, fresh = students.recipe, students.teacher, students.fresh
    check_student(fresh(), teacher)
    for network in (teacher.model,) if recipe.student is None else (teacher.model, fresh()):
        check_exportable(network, teacher.spec)
    features, regressors = recipe.distillation.features, recipe.distillation.regressors
    if recipe.compression.pruning is None:
        find_hints(fresh(), teacher, features, regressors=regressors)
    elif not isinstance(features, str):  # how wide a pruned student's layers are is known when it is shrunk
        check_paths(fresh(), teacher, features)
    _check_compression(students)


def _check_compression(students: Students) -> None:
    recipe, teacher, fresh = students.recipe, students.teacher, students.fresh
    pruning, quantization = recipe.compression.pruning, recipe.compression.quantization
    fused_steps = None  # of the one training, if there is only one
    if quantization is not None and quantization.fused:
        if recipe.distillation.features != "none":
            raise UserError(
                "distillation.features: hidden layers are matched where a finished student is distilled, and with "
                "compression.quantization.fused there is no such training; leave out this key or fused."
            )
        assert pruning is not None
        fused_steps = pruning.steps + recipe.distillation.steps + quantization.steps
    if pruning is not None:
        from zskd_nni.compression.pruning.prune import check_pruning

        check_pruning(fresh(), pruning, students.pruning_plan, teacher, fused_steps)
    if quantization is not None:
        from zskd_nni.compression.quantization.stage import check_quantization

        check_quantization(fresh(), quantization, teacher, fused_steps)
    if recipe.compression.distiller is not None:
        from zskd_nni.compression.fuse import check_distiller
        from zskd_nni.compression.quantization.nni_quantizer import quantizer_class_name

        calibrated = quantization is None or quantizer_class_name(quantization.quantizer) == "PtqQuantizer"
        if calibrated and (pruning is None or pruning.steps == 0):
            raise UserError(
                "compression.distiller trains the student while NNI prunes or quantizes it, and nothing is trained "
                "there: leave it out, give compression.pruning.steps, or take a quantizer that trains, such as "
                "QATQuantizer."
            )
        check_distiller(fresh(), recipe.compression.distiller, teacher)
