"""Procedural images as a live transfer source: new ones at every step, none of them made for the teacher.

The cheapest images there are. With ``kind: leaves`` (:mod:`zskd_nni.data.dead_leaves`) they calibrate a quantizer, and
train the kept channels of a pruned colour network most of the way back. A balanced set of such images is ATS
(``transfer.method: ats``, ``sources: [leaves]``). Images optimised towards the classes from such a start are ZSKD
(``synthesis.start: leaves``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from zskd_nni.data.procedural import KINDS
from zskd_nni.data.sources import ProceduralSource
from zskd_nni.methods.registry import PresetMethod, TransferRequest
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.validation import check_bounds, one_of


@dataclass(frozen=True)
class ProceduralOptions:
    """The method's keys in a recipe's ``transfer`` section.

    Attributes:
        kind: one of :data:`zskd_nni.data.procedural.KINDS`.

    Raises:
        ValueError: no such kind.
    """

    __pydantic_config__ = {"extra": "forbid"}

    kind: Annotated[str, one_of(*KINDS)] = "leaves"

    def __post_init__(self) -> None:
        check_bounds(self)


class Procedural(PresetMethod):
    """A stream: ``size`` and ``folder`` of a request do not matter."""

    def source(self, teacher: Teacher, request: TransferRequest) -> ProceduralSource:
        """New images at every step."""
        return ProceduralSource(request.options.kind, teacher.spec, request.batch_size)


METHOD = Procedural("procedural", ProceduralOptions, {"best": {}})
