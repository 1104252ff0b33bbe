"""The adapter of ``nni.compression``.

Importing it adds one name to NNI: ``nni.compression.distillation.ZeroShotDistiller``. Nothing else of NNI is changed.

May import: NNI, :mod:`zskd_nni.recipes` and the rooms below it. Nothing below imports NNI.
"""

from __future__ import annotations

from nni.compression import distillation as _distillation

from zskd_nni.compression.distiller import ZeroShotDistiller
from zskd_nni.compression.evaluator import DataFreeEvaluator, EvaluatorOptions

_distillation.ZeroShotDistiller = ZeroShotDistiller

__all__ = ["DataFreeEvaluator", "EvaluatorOptions", "ZeroShotDistiller"]
