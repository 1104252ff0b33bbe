"""Where a teacher puts images: its features, and a plane to look at them in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zskd_nni.models.hooks import FeaturePoint, recording
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError


@torch.no_grad()
def features(teacher: Teacher, images: Tensor, batch: int = 500) -> Tensor:
    """What the teacher's classifier reads of ``(N, C, H, W)`` images: ``(N, D)``, on the CPU."""
    point = FeaturePoint(teacher.classifier_path, "input")
    parts = []
    for part in images.split(batch):
        with recording(teacher.model, point) as seen:
            teacher(part.float().to(teacher.device))
        parts.append(seen[-1].flatten(1).float().cpu())
    return torch.cat(parts)


def embed(teacher: Teacher, sets: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """All sets in one plane by t-SNE over the teacher's features, so that near means alike to the teacher.

    For looking alone: distances between far points mean nothing, and nothing is measured in it.

    Args:
        teacher: whose features are taken.
        sets: images ``(n, C, H, W)`` by name, in the value range.
        seed: of the embedding.

    Returns:
        Points ``(n, 2)`` by name.

    Raises:
        UserError: fewer than ten images in all.
    """
    from sklearn.manifold import TSNE

    sizes = [len(images) for images in sets.values()]
    if sum(sizes) < 10:
        raise UserError(f"An embedding needs at least 10 images, not {sum(sizes)}.")
    found = torch.cat([features(teacher, images) for images in sets.values()])
    perplexity = min(30.0, (len(found) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(found.numpy())
    return dict(zip(sets, torch.from_numpy(plane).float().split(sizes), strict=True))
