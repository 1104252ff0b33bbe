"""The adapter of ``nni.compression``; importing it puts ``ZeroShotDistiller`` beside NNI's distillers.

May import: NNI, :mod:`zskd_nni.recipes` and what stands below it. Nothing below imports NNI.
"""

from __future__ import annotations

from nni.compression import distillation as _distillation

from zskd_nni.compression.distiller import ZeroShotDistiller
from zskd_nni.compression.evaluator import DataFreeEvaluator

_distillation.ZeroShotDistiller = ZeroShotDistiller
if hasattr(_distillation, "__all__") and "ZeroShotDistiller" not in _distillation.__all__:
    _distillation.__all__ = [*_distillation.__all__, "ZeroShotDistiller"]

__all__ = ["DataFreeEvaluator", "ZeroShotDistiller"]
