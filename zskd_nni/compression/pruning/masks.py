"""What pruning silenced: multiplied into the weights, kept at zero while the network goes on learning, on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import sha256_of_file
from zskd_nni.runtime.tensors import load_tensors, save_tensors

# Module path -> parameter name -> 0/1 mask of the parameter's shape; NNI has None for what it does not mask.
Masks = dict[str, dict[str, Tensor | None]]


def multiply_in(network: nn.Module, masks: Mapping[str, Mapping[str, Tensor | None]]) -> None:
    """Set to zero what the masks silence; a mask on anything but a parameter is passed over."""
    with torch.no_grad():
        for name, targets in masks.items():
            for target, mask in targets.items():
                parameter = getattr(network.get_submodule(name), target, None)
                if mask is not None and isinstance(parameter, Tensor):
                    parameter.mul_(mask.to(parameter.device))


def held_at_zero(network: nn.Module, masks: Mapping[str, Mapping[str, Tensor | None]]) -> Callable[[int], None]:
    """An ``after_step`` of :func:`zskd_nni.training.loop.fit` that takes every silenced weight back to zero.

    An optimiser moves all weights, those at zero too. A quantizer that learns a zero point (LSQ+) would move zero off
    the grid of its integers: the zero points of such weights are kept whole numbers.

    Args:
        network: as it is trained; NNI keeps the parameters of a wrapped module in the wrapper.
        masks: by the paths of the modules.
    """
    held: list[tuple[nn.Parameter, Tensor]] = []
    zero_points: list[nn.Parameter] = []
    for name, targets in masks.items():
        module = network.get_submodule(name)
        owners = [owner for owner in (getattr(module, "_nni_wrapper", None), module) if owner is not None]
        for target, mask in targets.items():
            parameter = next((own for owner in owners if (own := owner._parameters.get(target)) is not None), None)
            if mask is None or parameter is None:
                continue
            held.append((parameter, mask.to(parameter.device, parameter.dtype)))
            zero_point = owners[0]._parameters.get(f"{target}_zero_point")
            if zero_point is not None:
                zero_points.append(zero_point)

    @torch.no_grad()
    def back_to_zero(_: int) -> None:
        for parameter, mask in held:
            parameter.mul_(mask)
        for zero_point in zero_points:
            zero_point.round_()

    return back_to_zero


def share_of_zeros(network: nn.Module, names: Iterable[str]) -> float | None:
    """Share of zeros in the parameters ``names`` (paths) that the network has; None where there is no zero."""
    known = dict(network.named_parameters(remove_duplicate=False))
    covered = [known[name] for name in names if name in known]
    zeros = sum(int((weight == 0).sum()) for weight in covered)
    return round(zeros / sum(weight.numel() for weight in covered), 6) if zeros else None


def masks_file(description: Path) -> Path:
    """The safetensors file of the masks beside a network's description."""
    return description.with_suffix(".masks.safetensors")


def save_masks(masks: Masks, description: Path) -> dict[str, Any]:
    """Write the masks; returns what the network's description must hold for :func:`load_masks`."""
    file = masks_file(description)
    tensors = {
        f"{name}:{target}": mask != 0
        for name, targets in masks.items()
        for target, mask in targets.items()
        if mask is not None
    }
    save_tensors(file, tensors)
    return {"sha256": sha256_of_file(file)}


def load_masks(described: Any, description: Path) -> Masks:
    """The masks that :func:`save_masks` wrote.

    Raises:
        UserError: the file is missing, damaged or another one.
    """
    file = masks_file(description)
    tensors, _ = load_tensors(file)
    if not isinstance(described, dict) or sha256_of_file(file) != described.get("sha256"):
        raise UserError(f"{file} is not the file that {description.name} describes: its checksum differs.")
    masks: Masks = {}
    for key, mask in tensors.items():
        name, _, target = key.rpartition(":")
        masks.setdefault(name, {})[target] = mask
    return masks
