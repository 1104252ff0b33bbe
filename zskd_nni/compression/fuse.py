"""Which distiller teaches a student that NNI prunes or quantizes: ours, or one of NNI's own two."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from nni.compression.base.compressor import Compressor
from nni.compression.distillation import Adaptive1dLayerwiseDistiller, DynamicLayerwiseDistiller
from torch import nn

from zskd_nni.compression.distiller import ZeroShotDistiller, default_teacher_predict
from zskd_nni.compression.evaluator import DataFreeEvaluator
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError, error_context

if TYPE_CHECKING:
    from zskd_nni.recipes.compression_config import DistillerConfig

_NNIS_OWN = {
    "DynamicLayerwiseDistiller": DynamicLayerwiseDistiller,
    "Adaptive1dLayerwiseDistiller": Adaptive1dLayerwiseDistiller,
}


def fused_distiller(
    compressor: Compressor,
    section: DistillerConfig | None,
    teacher: Teacher,
    evaluator: DataFreeEvaluator,
    temperature: float,
    origin_loss_lambda: float = 0.0,
) -> Any:
    """A distiller on top of ``compressor``; its ``compress`` runs both.

    Args:
        compressor: pruner or quantizer around the student.
        section: name and NNI's config list; our own distiller of the logits where absent.
        teacher: stays as it is; a copy is wrapped where the distiller wraps its teacher.
        evaluator: the images.
        temperature: of our own distiller's softmaxes. NNI's own two fix it at 2.
        origin_loss_lambda: weight of the evaluator's loss.

    Raises:
        UserError: the distiller refuses the config list.
    """
    name = "ZeroShotDistiller" if section is None else section.name
    config_list = [] if section is None else section.config_list
    given = evaluator if compressor.evaluator is None else None  # NNI warns of a second one
    try:
        if name == "ZeroShotDistiller":
            return ZeroShotDistiller.from_compressor(
                compressor,
                config_list,
                teacher,
                origin_loss_lambda=origin_loss_lambda,
                evaluator=given,
                temperature=temperature,
            )
        # NNI's own two take no loss of 0 away, they weigh it: the evaluator's is 0 without pseudo labels.
        distiller = _NNIS_OWN[name].from_compressor(
            compressor,
            _with_float_lambdas(config_list),
            copy.deepcopy(teacher.model),
            default_teacher_predict,
            origin_loss_lambda,
            evaluator=given,
        )
        if name == "Adaptive1dLayerwiseDistiller":
            distiller.track_forward(evaluator.get_dummy_input())
        return distiller
    except UserError:
        raise
    except Exception as error:  # NNI's schema, assertions and key errors
        text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
        whose = "" if name == "ZeroShotDistiller" else "NNI's "
        raise UserError(f"compression.distiller: {whose}{name} refuses the config ({text}).") from error


def check_distiller(network: nn.Module, section: DistillerConfig, teacher: Teacher) -> None:
    """Find out before the long work begins whether NNI takes this config for this network.

    Raises:
        UserError: NNI refuses the config list.
    """
    from nni.compression.pruning import LevelPruner

    from zskd_nni.data.sources import NoiseSource

    network = copy.deepcopy(network).to(teacher.device).requires_grad_(True)
    evaluator = DataFreeEvaluator(teacher, NoiseSource(teacher.spec, 2), quiet=True)
    carrier = LevelPruner(network, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.1}], evaluator)
    with error_context("compression.distiller"):
        fused_distiller(carrier, section, teacher, evaluator, 1.0).unwrap_model()


def _with_float_lambdas(config_list: list[dict[str, Any]]) -> list[dict[str, Any]]:
    result = copy.deepcopy(config_list)
    for config in result:
        for setting in (config, *config.get("target_settings", {}).values()):
            if isinstance(setting.get("lambda"), int):
                setting["lambda"] = float(setting["lambda"])  # NNI's schema takes an int, its setter refuses it
    return result
