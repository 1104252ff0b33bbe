"""The distiller that trains a student while NNI prunes or quantizes it: ours, or one of NNI's own two."""

from __future__ import annotations

import copy
from typing import Any

from nni.compression import distillation
from nni.compression.base.compressor import Compressor
from torch import nn

from zskd_nni.compression.config_names import check_module_names, check_words
from zskd_nni.compression.distiller import default_teacher_predict, with_float_lambdas
from zskd_nni.compression.evaluator import DataFreeEvaluator
from zskd_nni.data.sources import NoiseSource
from zskd_nni.models.teacher import Teacher
from zskd_nni.recipes.compression_config import DistillerConfig
from zskd_nni.runtime.errors import UserError, error_context


def fused_distiller(compressor: Compressor, config: DistillerConfig | None, evaluator: DataFreeEvaluator) -> Any:
    """A distiller on top of ``compressor``; its ``compress`` runs both.

    Args:
        compressor: pruner or quantizer around the student, made with ``evaluator``.
        config: which distiller, and NNI's config list; by default ours, on the logits.
        evaluator: has the teacher, which stays as it is, and the temperature; NNI's own two fix theirs at 2. With
            pseudo-labels its loss is added.

    Raises:
        UserError: the distiller refuses the config list.
    """
    config = config or DistillerConfig()
    name, ours = config.name, config.name == "ZeroShotDistiller"
    teacher = evaluator.teacher if ours else copy.deepcopy(evaluator.teacher.model)  # NNI's own wrap its layers
    weight = float(evaluator.pseudo_labels)
    try:
        kind, targets = getattr(distillation, name), with_float_lambdas(config.config_list)
        distiller = kind.from_compressor(compressor, targets, teacher, default_teacher_predict, weight)
        if name == "Adaptive1dLayerwiseDistiller":
            distiller.track_forward(evaluator.get_dummy_input())
        return distiller
    except UserError:
        raise
    except Exception as error:  # NNI's schema, assertions and key errors
        text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
        whose = name if ours else f"NNI's {name}"
        raise UserError(f"compression.distiller: {whose} refuses the config ({text}).") from error


def check_distiller(network: nn.Module, config: DistillerConfig, teacher: Teacher) -> None:
    """Find out before the long work whether NNI takes this config for this network.

    Raises:
        UserError: NNI refuses the config list, or it names modules that the network does not have.
    """
    from nni.compression.pruning import LevelPruner

    for number, entry in enumerate(config.config_list):
        check_words(entry, f"compression.distiller.config_list.{number}")
    check_module_names(network, config.config_list, "distiller")
    network = copy.deepcopy(network).to(teacher.device).requires_grad_(True)
    evaluator = DataFreeEvaluator(teacher, NoiseSource(teacher.spec, 2), quiet=True)
    carrier = LevelPruner(network, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.1}], evaluator)
    with error_context("compression.distiller"):
        fused_distiller(carrier, config, evaluator).unwrap_model()
