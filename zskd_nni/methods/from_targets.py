"""Methods that make a store of impressions: soft targets in, a source of images out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field, make_dataclass
from typing import Any

from zskd_nni.data.sources import StoredSource
from zskd_nni.methods.registry import PresetMethod, TransferRequest
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.validation import Settings
from zskd_nni.synthesis import SynthesisSettings, TargetPlan, synthesize


class ImpressionMethod(PresetMethod):
    """A method that is defined by its soft targets; its keys are ``targets`` and ``synthesis``.

    Args:
        name: as in ``transfer.method``.
        targets: the settings class of the key ``targets``; :class:`SynthesisSettings` is that of ``synthesis``.
        presets: plain values of each preset.
        plan: makes the targets from a teacher and those settings.
    """

    def __init__(
        self,
        name: str,
        targets: type[Any],
        presets: Mapping[str, Mapping[str, Any]],
        plan: Callable[[Teacher, Any], TargetPlan],
    ) -> None:
        keys = {"targets": targets, "synthesis": SynthesisSettings}
        entries = [(key, kind, field(default_factory=kind)) for key, kind in keys.items()]
        options = make_dataclass(f"{targets.__name__}AndSynthesis", entries, bases=(Settings,), frozen=True)
        super().__init__(name, options, presets)
        self.plan = plan

    def source(self, teacher: Teacher, request: TransferRequest) -> StoredSource:
        """Synthesise the impressions that ``request.folder`` lacks, and draw batches from all of them."""
        plan = self.plan(teacher, request.options.targets)
        store = synthesize(teacher, plan, request.options.synthesis, **request.set_arguments())
        return store.source(request.batch_size, request.seed, teacher.device)
