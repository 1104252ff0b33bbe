"""What of a recipe can be known to be wrong before the long work begins."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from zskd_nni.models.onnx_export import check_exportable
from zskd_nni.models.teacher import Teacher
from zskd_nni.recipes.schema import Recipe
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.distillation import check_student
from zskd_nni.training.hints import check_paths, feature_pairs


def check_work(recipe: Recipe, fresh: Callable[[], nn.Module], teacher: Teacher) -> None:
    """Refuse what cannot be distilled, pruned or quantized as a recipe asks.

    Args:
        recipe: the recipe.
        fresh: makes its student anew.
        teacher: its teacher.

    Raises:
        UserError: one sentence that names the key.
    """
    check_student(fresh(), teacher)
    for network in (teacher.model,) if recipe.student is None else (teacher.model, fresh()):
        check_exportable(network, teacher.spec)
    features = recipe.distillation.features
    if recipe.compression.pruning is None:
        feature_pairs(fresh(), teacher, features)
    elif not isinstance(features, str):  # how wide a pruned student's layers are is known when it is shrunk
        check_paths(fresh(), teacher, features)
    _check_compression(recipe, fresh, teacher)


def _check_compression(recipe: Recipe, fresh: Callable[[], nn.Module], teacher: Teacher) -> None:
    section = recipe.compression
    pruning, quantization = section.pruning, section.quantization
    if quantization is not None and quantization.fused and recipe.distillation.features != "none":
        raise UserError(
            "distillation.features: hidden layers are matched where a finished student is distilled, and with "
            "compression.quantization.fused there is no such training; leave the key out, or fused."
        )
    together = None  # the steps of the one training, where it is one
    if pruning is not None and quantization is not None and quantization.fused:
        together = pruning.steps + recipe.distillation.steps + quantization.steps
    if pruning is not None:
        from zskd_nni.compression.pruning.prune import check_pruning

        check_pruning(fresh(), pruning, teacher, together)
    if quantization is not None:
        from zskd_nni.compression.quantization.stage import check_quantization

        check_quantization(fresh(), quantization, teacher, together)
    if section.distiller is not None:
        from zskd_nni.compression.fuse import check_distiller
        from zskd_nni.compression.quantization.quantize import quantizer_class_name

        calibrated = quantization is None or quantizer_class_name(quantization.quantizer) == "PtqQuantizer"
        if calibrated and (pruning is None or pruning.steps == 0):
            raise UserError(
                "compression.distiller teaches while NNI prunes or quantizes, and nothing is trained there: leave "
                "it out, give compression.pruning.steps, or take a quantizer that trains, such as QATQuantizer."
            )
        check_distiller(fresh(), section.distiller, teacher)
