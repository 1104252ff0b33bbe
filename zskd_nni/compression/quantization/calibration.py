"""NNI's calibration config: scales and zero points by module and target, cut when channels are removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from zskd_nni.compression.pruning.masks import kept_channels
from zskd_nni.runtime.errors import UserError

# Module path -> target -> {scale, zero_point, quant_dtype, ...}
Calibration = dict[str, dict[str, dict[str, Any]]]
_TENSOR_KEYS = ("scale", "zero_point", "tracked_max", "tracked_min")


def plain_calibration(calibration: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Calibration:
    """NNI's calibration config as plain dicts with copies of the tensors on the CPU."""
    return tree_map(
        lambda value: value.detach().clone().cpu() if isinstance(value, Tensor) else value,
        {path: dict(targets) for path, targets in calibration.items()},
    )


def slice_calibration(calibration: Calibration, masks_or_kept_channels: Mapping[str, Any]) -> Calibration:
    """The calibration of the network that is left when channels are removed.

    The scale of a whole tensor stays. Of scales by channel, those of the removed channels are dropped.

    Args:
        calibration: NNI's, of the network before channels were removed.
        masks_or_kept_channels: by module, either NNI's masks ``{target: mask}``, or the kept positions ``inputs`` and
            ``outputs``. A module that is not named keeps all its channels.

    Raises:
        UserError: a channel that the calibration does not have.
    """
    result: Calibration = {}
    for path, targets in calibration.items():
        inputs, outputs = _kept_channels(masks_or_kept_channels.get(path))
        result[path] = {}
        for target, entry in targets.items():
            kind = target.split("_")[1] if target.startswith("_") else ""
            axes = {"input": {1: inputs}, "output": {1: outputs}}.get(kind, {0: outputs, 1: inputs})
            tensors = {key: entry[key] for key in _TENSOR_KEYS if isinstance(entry.get(key), Tensor)}
            cut = {key: _cut(value, axes, f"{path}.{target}.{key}") for key, value in tensors.items()}
            result[path][target] = {**entry, **cut}
    return result


def _kept_channels(kept: Any) -> tuple[Tensor | None, Tensor | None]:
    """Positions of the kept inputs and outputs; None where all are kept."""
    if kept is not None and not isinstance(kept, Mapping):
        return kept.inputs, kept.outputs
    weight = (kept or {}).get("weight")
    if weight is None:
        return None, None
    return kept_channels(weight, 1) if weight.ndim > 1 else None, kept_channels(weight, 0)


def _cut(value: Tensor, axes: dict[int, Tensor | None], where: str) -> Tensor:
    for axis, positions in axes.items():
        if positions is None or value.ndim <= axis or value.shape[axis] == 1:
            continue
        if len(positions) and int(positions.max()) >= value.shape[axis]:
            raise UserError(
                f"{where} has {value.shape[axis]} channels, but channel {int(positions.max())} is to be kept; "
                "only scales of whole tensors and of single channels can be cut."
            )
        value = value.index_select(axis, positions.to(value.device))
    return value
