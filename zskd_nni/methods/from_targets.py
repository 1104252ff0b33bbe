"""What all methods share that make a store of impressions: soft targets in, a source of images out."""

from __future__ import annotations

from zskd_nni.data.sources import StoredSource
from zskd_nni.methods.registry import TransferRequest
from zskd_nni.models.teacher import Teacher
from zskd_nni.synthesis import SynthesisSettings, TargetPlan, synthesize


def impressions_source(
    teacher: Teacher, plan: TargetPlan, settings: SynthesisSettings, request: TransferRequest
) -> StoredSource:
    """Synthesise what is missing of the impressions in ``request.folder`` and draw from them."""
    store = synthesize(
        teacher,
        plan,
        settings,
        size=request.size,
        seed=request.seed,
        folder=request.folder,
        label=request.label,
        quiet=request.quiet,
    )
    images = store.images_on_disk()
    return StoredSource(images, request.batch_size, request.seed, store.fingerprint, teacher.device)
