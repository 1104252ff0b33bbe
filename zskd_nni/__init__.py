"""zskd_nni: compress a trained network without its training data.

Importing this package imports neither torch nor NNI; names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zskd_nni.compression.distiller import ZeroShotDistiller
    from zskd_nni.compression.evaluator import DataFreeEvaluator
    from zskd_nni.data.augmentation import Augmentation
    from zskd_nni.data.sources import NoiseSource, StoredSource
    from zskd_nni.methods.registry import transfer_source
    from zskd_nni.models.input_spec import InputSpec
    from zskd_nni.models.serialization import load_network
    from zskd_nni.models.teacher import Teacher
    from zskd_nni.runtime.errors import UserError
    from zskd_nni.synthesis import ImpressionStore, SynthesisSettings, synthesize
    from zskd_nni.training.distillation import DistillationSettings, distill

_HOMES = {
    "Augmentation": "zskd_nni.data.augmentation",
    "DataFreeEvaluator": "zskd_nni.compression.evaluator",
    "DistillationSettings": "zskd_nni.training.distillation",
    "ImpressionStore": "zskd_nni.synthesis",
    "InputSpec": "zskd_nni.models.input_spec",
    "NoiseSource": "zskd_nni.data.sources",
    "StoredSource": "zskd_nni.data.sources",
    "SynthesisSettings": "zskd_nni.synthesis",
    "Teacher": "zskd_nni.models.teacher",
    "UserError": "zskd_nni.runtime.errors",
    "ZeroShotDistiller": "zskd_nni.compression.distiller",
    "distill": "zskd_nni.training.distillation",
    "load_network": "zskd_nni.models.serialization",
    "synthesize": "zskd_nni.synthesis",
    "transfer_source": "zskd_nni.methods.registry",
}

__all__ = [
    "Augmentation",
    "DataFreeEvaluator",
    "DistillationSettings",
    "ImpressionStore",
    "InputSpec",
    "NoiseSource",
    "StoredSource",
    "SynthesisSettings",
    "Teacher",
    "UserError",
    "ZeroShotDistiller",
    "distill",
    "load_network",
    "synthesize",
    "transfer_source",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
