"""zskd_nni: compress a trained network without its training data.

Importing this package imports neither torch nor NNI; names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zskd_nni.augment import Augmentation
    from zskd_nni.compression.distiller import ZeroShotDistiller
    from zskd_nni.compression.evaluator import DataFreeEvaluator
    from zskd_nni.distillation import DistillationSettings, distill
    from zskd_nni.errors import UserError
    from zskd_nni.inputs import InputSpec
    from zskd_nni.methods.registry import transfer_source
    from zskd_nni.saved_model import load_network
    from zskd_nni.synthesis import ImpressionStore, SynthesisSettings, synthesize
    from zskd_nni.teacher import Teacher
    from zskd_nni.transfer import NoiseSource, StoredSource

_HOMES = {
    "Augmentation": "zskd_nni.augment",
    "DataFreeEvaluator": "zskd_nni.compression.evaluator",
    "DistillationSettings": "zskd_nni.distillation",
    "ImpressionStore": "zskd_nni.synthesis",
    "InputSpec": "zskd_nni.inputs",
    "NoiseSource": "zskd_nni.transfer",
    "StoredSource": "zskd_nni.transfer",
    "SynthesisSettings": "zskd_nni.synthesis",
    "Teacher": "zskd_nni.teacher",
    "UserError": "zskd_nni.errors",
    "ZeroShotDistiller": "zskd_nni.compression.distiller",
    "distill": "zskd_nni.distillation",
    "load_network": "zskd_nni.saved_model",
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
