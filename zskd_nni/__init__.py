"""zskd_nni: compress a trained network without its training data.

Importing this package imports neither torch nor NNI; each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zskd_nni.compression.distiller import ZeroShotDistiller as ZeroShotDistiller
    from zskd_nni.compression.evaluator import DataFreeEvaluator as DataFreeEvaluator
    from zskd_nni.compression.pruning.dependency_config import complete_config_list as complete_config_list
    from zskd_nni.compression.pruning.prune import prune as prune
    from zskd_nni.compression.pruning.speedup import shrink as shrink
    from zskd_nni.compression.quantization.qdq_onnx import export_quantized_onnx as export_quantized_onnx
    from zskd_nni.compression.quantization.quantize import quantize as quantize
    from zskd_nni.data.augmentation import Augmentation as Augmentation
    from zskd_nni.data.sources import NoiseSource as NoiseSource
    from zskd_nni.data.sources import StoredSource as StoredSource
    from zskd_nni.methods.registry import transfer_source as transfer_source
    from zskd_nni.models.input_spec import InputSpec as InputSpec
    from zskd_nni.models.onnx_export import export_onnx as export_onnx
    from zskd_nni.models.serialization import load_network as load_network
    from zskd_nni.models.teacher import Teacher as Teacher
    from zskd_nni.models.teacher import load_teacher as load_teacher
    from zskd_nni.recipes.compression_config import PruningConfig as PruningConfig
    from zskd_nni.recipes.compression_config import QuantizationConfig as QuantizationConfig
    from zskd_nni.runtime.errors import UserError as UserError
    from zskd_nni.synthesis import ImpressionStore as ImpressionStore
    from zskd_nni.synthesis import SynthesisSettings as SynthesisSettings
    from zskd_nni.synthesis import synthesize as synthesize
    from zskd_nni.training.distillation import DistillationSettings as DistillationSettings
    from zskd_nni.training.distillation import distill as distill

_HOMES = {
    "Augmentation": "zskd_nni.data.augmentation",
    "DataFreeEvaluator": "zskd_nni.compression.evaluator",
    "DistillationSettings": "zskd_nni.training.distillation",
    "ImpressionStore": "zskd_nni.synthesis",
    "InputSpec": "zskd_nni.models.input_spec",
    "NoiseSource": "zskd_nni.data.sources",
    "PruningConfig": "zskd_nni.recipes.compression_config",
    "QuantizationConfig": "zskd_nni.recipes.compression_config",
    "StoredSource": "zskd_nni.data.sources",
    "SynthesisSettings": "zskd_nni.synthesis",
    "Teacher": "zskd_nni.models.teacher",
    "UserError": "zskd_nni.runtime.errors",
    "ZeroShotDistiller": "zskd_nni.compression.distiller",
    "complete_config_list": "zskd_nni.compression.pruning.dependency_config",
    "distill": "zskd_nni.training.distillation",
    "export_onnx": "zskd_nni.models.onnx_export",
    "export_quantized_onnx": "zskd_nni.compression.quantization.qdq_onnx",
    "load_network": "zskd_nni.models.serialization",
    "load_teacher": "zskd_nni.models.teacher",
    "prune": "zskd_nni.compression.pruning.prune",
    "quantize": "zskd_nni.compression.quantization.quantize",
    "shrink": "zskd_nni.compression.pruning.speedup",
    "synthesize": "zskd_nni.synthesis",
    "transfer_source": "zskd_nni.methods.registry",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
