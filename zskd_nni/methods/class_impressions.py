"""Class impressions: images fitted to one-hot targets, the baseline of ZSKD (Nayak et al., ICML 2019, section 4).

The same engine as :mod:`zskd_nni.methods.zskd`, with the class itself as the target instead of a Dirichlet draw, so
that a difference between the two is one of targets alone.

What the paper fixes: the target of an impression of class k is one-hot at k, all classes equally often; the ablation
of the paper sets them beside data impressions at every size of the set, without augmentation. Its figures were not
obtained as numbers. It leaves the schedule open as ZSKD's; both presets take over ZSKD's of the same name. A one-hot
target at temperature T is never reached: the logits grow until the steps end. ``smoothing`` bounds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zskd_nni.data.sources import StoredSource
from zskd_nni.methods import zskd
from zskd_nni.methods.from_targets import impressions_source
from zskd_nni.methods.registry import TransferRequest, preset_options
from zskd_nni.models.teacher import Teacher
from zskd_nni.synthesis import SynthesisSettings


@dataclass(frozen=True)
class ClassImpressionSettings:
    """Which targets the impressions have.

    Attributes:
        smoothing: share of the target spread evenly over all classes, in [0, 1); 0 is one-hot.

    Raises:
        ValueError: a smoothing outside its range.
    """

    __pydantic_config__ = {"extra": "forbid"}

    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), not {self.smoothing}")


class ClassTargets:
    """The plan of one-hot targets: classes are dealt out in turn.

    Args:
        classes: number of classes K.
        settings: smoothing.
    """

    def __init__(self, classes: int, settings: ClassImpressionSettings) -> None:
        self.classes, self.settings = classes, settings
        self.identity: dict[str, Any] = {"method": "class-impressions", "smoothing": settings.smoothing}

    def targets(self, first: int, count: int, total: int, seed: int) -> Tensor:
        """``(count, K)`` targets: ``(1 - smoothing)`` on the class and ``smoothing / K`` on each; nothing is drawn."""
        classes = torch.arange(first, first + count) % self.classes
        one_hot = functional.one_hot(classes, self.classes).float()
        return one_hot * (1 - self.settings.smoothing) + self.settings.smoothing / self.classes


@dataclass(frozen=True)
class ClassImpressionOptions:
    """The method's keys in a recipe's ``transfer`` section.

    Attributes:
        targets: smoothing.
        synthesis: how images are fitted.
    """

    __pydantic_config__ = {"extra": "forbid"}

    targets: ClassImpressionSettings = field(default_factory=ClassImpressionSettings)
    synthesis: SynthesisSettings = field(default_factory=SynthesisSettings)


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    name: {"targets": {"smoothing": 0.0}, "synthesis": zskd.PRESETS[name]["synthesis"]} for name in ("paper", "best")
}


class ClassImpressions:
    """Class impressions as a method of recipes."""

    name = "class-impressions"
    presets = tuple(PRESETS)

    def options(self, preset: str, given: Mapping[str, Any]) -> ClassImpressionOptions:
        """The preset with the recipe's own keys over it."""
        return preset_options(ClassImpressionOptions, self.name, PRESETS, preset, given)

    def source(self, teacher: Teacher, request: TransferRequest) -> StoredSource:
        """Synthesise what is missing of the impressions and draw from them."""
        options: ClassImpressionOptions = request.options
        return impressions_source(
            teacher, ClassTargets(teacher.num_classes, options.targets), options.synthesis, request
        )


METHOD = ClassImpressions()
