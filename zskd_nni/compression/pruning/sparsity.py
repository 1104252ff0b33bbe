"""Masks that reach the sparsity that was asked for, and a sentence where they do not.

NNI ranks the targets of a ``global_group_id`` by one threshold. Where many scores are equal, such as those of channels
that are masked already, the threshold keeps all of them, and ``max_sparse_ratio`` and ``min_sparse_ratio`` do not hold
there, nor in a dependency group. Here channels are counted.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from nni.compression.base.compressor import Pruner
from nni.compression.pruning.tools import sparse_gen
from torch import Tensor, nn

from zskd_nni.compression.pruning.masks import is_kept

Metrics = dict[str, dict[str, Tensor]]


def with_exact_sparsity(pruner: Pruner) -> Pruner:
    """Let a pruner of NNI count channels in global groups, and hold its limits in every group; returns it."""

    def generate(metrics: Metrics) -> Any:
        with _limits_held(pruner._target_spaces), _ranked_by_count():
            return sparse_gen.generate_sparsity(metrics, pruner._target_spaces)

    pruner._generate_sparsity = generate
    return pruner


@contextlib.contextmanager
def _ranked_by_count() -> Iterator[None]:
    theirs = sparse_gen._generate_global_sparsity
    sparse_gen._generate_global_sparsity = global_masks
    try:
        yield
    finally:
        sparse_gen._generate_global_sparsity = theirs


@contextlib.contextmanager
def _limits_held(target_spaces: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Within the block every dependency group has a ratio inside its limits."""
    spaces = [space for targets in target_spaces.values() for space in targets.values()]
    held = [(space, space.sparse_ratio) for space in spaces if _in_dependency(space)]
    try:
        for space, ratio in held:
            space.sparse_ratio = float(min(max(ratio, space.min_sparse_ratio or 0.0), _most(space)))
        yield
    finally:
        for space, ratio in held:
            space.sparse_ratio = ratio


def _in_dependency(space: Any) -> bool:
    return space.dependency_group_id is not None and space.sparse_ratio is not None


def _most(space: Any) -> float:
    return 1.0 if space.max_sparse_ratio is None else space.max_sparse_ratio


def global_masks(metrics: Metrics, target_spaces: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Tensor]]:
    """Masks in the metrics' shapes for targets that are ranked together.

    In each group the lowest scores go until ``sparse_ratio`` of the group's elements are masked, but of each target at
    least ``min_sparse_ratio``, at most ``max_sparse_ratio``, and never all.
    """
    groups: dict[Any, list[tuple[str, str, Any]]] = defaultdict(list)
    for name, targets in target_spaces.items():
        for target, space in targets.items():
            groups[space.global_group_id].append((name, target, space))
    masks: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for group in groups.values():
        ratios = {space.sparse_ratio for _, _, space in group if space.sparse_ratio is not None}
        if len(ratios) != 1:
            raise ValueError(f"the targets of one global_group_id have the ratios {sorted(ratios)}; give one to all")
        scores = [metrics[name][target] for name, target, _ in group]
        for (name, target, _), mask in zip(group, _masks_of_group(scores, group, ratios.pop()), strict=True):
            masks[name][target] = mask
    return masks


def _masks_of_group(scores: list[Tensor], group: list[tuple[str, str, Any]], ratio: float) -> list[Tensor]:
    sizes = [space.target.numel() for _, _, space in group]
    grains = [size // score.numel() for size, score in zip(sizes, scores, strict=True)]
    least = [
        int(len(s.flatten()) * (space.min_sparse_ratio or 0)) for s, (_, _, space) in zip(scores, group, strict=True)
    ]
    most = [min(int(s.numel() * _most(space)), s.numel() - 1) for s, (_, _, space) in zip(scores, group, strict=True)]
    orders = [score.flatten().cpu().argsort(stable=True) for score in scores]
    gone = list(least)
    left = int(sum(sizes) * ratio) - sum(count * grain for count, grain in zip(gone, grains, strict=True))
    # (score, target, place among the target's own) of all that may go beyond the least
    values = [score.flatten().cpu().double()[order].tolist() for score, order in zip(scores, orders, strict=True)]
    ranked = sorted((value, which, place) for which, own in enumerate(values) for place, value in enumerate(own))
    for _, which, place in ranked:
        if left < grains[which] / 2:
            break  # another channel would miss the ratio by more
        if least[which] <= place < most[which]:
            gone[which] += 1
            left -= grains[which]
    masks = []
    for score, order, count in zip(scores, orders, gone, strict=True):
        mask = torch.ones(score.numel(), dtype=score.dtype)
        mask[order[:count]] = 0
        masks.append(mask.reshape(score.shape).to(score.device))
    return masks


def missed_sparsity(
    network: nn.Module, config_list: list[dict[str, Any]], masks: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """By ``module.weight`` or group: the share of zeros that the config asks for and that the masks have.

    Only what is further off than the rounding to whole channels. Targets that are ranked together count together.

    Args:
        network: before anything is removed.
        config_list: of the pruner, in the keys of NNI 3, one entry a module.
        masks: on the CPU, in the shapes of the parameters.
    """
    zeros: dict[str, list[float]] = {}  # zeros asked for, zeros there, elements, elements of a channel
    for entry in config_list:
        for name in entry.get("op_names", ()):
            for target in ("weight", "bias"):
                mask = masks.get(name, {}).get(target)
                setting = {**entry, **entry.get("target_settings", {}).get(target, {})} if target == "weight" else {}
                ratio = setting.get("sparse_ratio")
                if mask is None or ratio is None:
                    continue
                group = setting.get("global_group_id") if setting.get("dependency_group_id") is None else None
                blocks = setting.get("internal_metric_block") or 1
                row = zeros.setdefault(f"{name}.{target}" if group is None else f"the group {group!r}", [0, 0, 0, 0])
                row[0] += ratio * mask.numel()
                row[1] += mask.numel() - float(mask.sum())
                row[2] += mask.numel()
                row[3] = max(row[3], blocks * _grain(mask))
    return {
        key: {"asked": round(asked / count, 4), "reached": round(there / count, 4)}
        for key, (asked, there, count, grain) in zeros.items()
        if abs(asked - there) >= max(grain, 1) * 1.0001
    }


def _grain(mask: Tensor) -> int:
    """Elements that go together: a whole channel unless single weights are masked."""
    kept = is_kept(mask, 0)
    whole = bool((mask.bool() == kept.view(-1, *[1] * (mask.dim() - 1))).all())
    if whole:
        return mask.numel() // len(mask)
    columns = is_kept(mask, 1) if mask.dim() > 1 else kept
    if mask.dim() > 1 and bool((mask.movedim(1, 0).bool() == columns.view(-1, *[1] * (mask.dim() - 1))).all()):
        return mask.numel() // mask.shape[1]
    return max(1, mask.numel() // 100)


def sentence_about(missed: Mapping[str, Mapping[str, float]]) -> str:
    """The figures of :func:`missed_sparsity` in words; empty if nothing was missed."""
    if not missed:
        return ""
    parts = [f"{key} {row['reached']:.1%} for {row['asked']:.1%}" for key, row in missed.items()]
    more = f" and {len(parts) - 4} more" if len(parts) > 4 else ""
    return f"the sparsity asked for was missed: {', '.join(parts[:4])}{more}"
