"""Methods that make a store of impressions: soft targets in, a source of images out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from zskd_nni.data.sources import StoredSource
from zskd_nni.methods.registry import PresetMethod, TransferRequest
from zskd_nni.models.teacher import Teacher
from zskd_nni.synthesis import TargetPlan, synthesize


class ImpressionMethod(PresetMethod):
    """A method that is defined by its soft targets.

    Args:
        name: as in ``transfer.method``.
        kind: the settings class of the method's keys; it has the fields ``targets`` and ``synthesis``.
        presets: plain values of each preset.
        plan: makes the targets from a teacher and the settings in ``targets``.
    """

    def __init__(
        self,
        name: str,
        kind: type[Any],
        presets: Mapping[str, Mapping[str, Any]],
        plan: Callable[[Teacher, Any], TargetPlan],
    ) -> None:
        super().__init__(name, kind, presets)
        self._plan = plan

    def source(self, teacher: Teacher, request: TransferRequest) -> StoredSource:
        """Synthesise the impressions that ``request.folder`` lacks, and draw batches from all of them."""
        store = synthesize(
            teacher,
            self._plan(teacher, request.options.targets),
            request.options.synthesis,
            size=request.size,
            seed=request.seed,
            folder=request.folder,
            label=request.label,
            quiet=request.quiet,
        )
        return store.source(request.batch_size, request.seed, teacher.device)
