"""Class impressions: images optimised for one-hot targets, the baseline of ZSKD (Nayak et al., ICML 2019, section 4).

The engine is that of :mod:`zskd_nni.methods.zskd`. Only the targets differ: the class itself instead of a Dirichlet
draw. A difference between the two methods is therefore one of targets alone.

What the paper fixes: the target of an impression of class k is one-hot at k, and all classes occur equally often. The
paper's ablation compares them with data impressions at every size of the set, without augmentation; it has no table of
the figures. The paper leaves the schedule open, as for ZSKD, so both presets use ZSKD's of the same name. A one-hot
target at temperature T is never reached: the logits grow until the steps end. ``smoothing`` bounds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional

from zskd_nni.methods import zskd
from zskd_nni.methods.from_targets import ImpressionMethod
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.validation import Bounds, Settings


@dataclass(frozen=True)
class ClassImpressionSettings(Settings):
    """The soft targets of the impressions.

    Attributes:
        smoothing: share of the target spread evenly over all classes, in [0, 1); 0 is one-hot.

    Raises:
        ValueError: a smoothing outside its range.
    """

    smoothing: Annotated[float, Bounds("must lie in [0, 1)", lambda value: 0 <= value < 1)] = 0.0


class ClassTargets:
    """One-hot targets; impression i is of class i mod K.

    Args:
        teacher: whose classes, K of them, are meant.
        settings: smoothing.
    """

    def __init__(self, teacher: Teacher, settings: ClassImpressionSettings) -> None:
        self.classes, self.settings = teacher.num_classes, settings
        self.identity: dict[str, Any] = {"method": "class-impressions", "smoothing": settings.smoothing}

    def targets(self, first: int, count: int, total: int, seed: int) -> Tensor:
        """``(count, K)`` targets: ``(1 - smoothing)`` on the class and ``smoothing / K`` on each; nothing is drawn."""
        classes = torch.arange(first, first + count) % self.classes
        one_hot = functional.one_hot(classes, self.classes).float()
        return one_hot * (1 - self.settings.smoothing) + self.settings.smoothing / self.classes


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    name: {"targets": {"smoothing": 0.0}, "synthesis": zskd.PRESETS[name]["synthesis"]}
    for name in ("paper", "best", "best-colour")
}

METHOD = ImpressionMethod("class-impressions", ClassImpressionSettings, PRESETS, ClassTargets)
