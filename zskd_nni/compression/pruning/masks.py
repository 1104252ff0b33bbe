"""The masks of pruned weights: multiplied into the weights, kept at zero in further training, saved and loaded."""

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
Masks = Mapping[str, Mapping[str, Tensor | None]]


def is_kept(mask: Tensor, dim: int) -> Tensor:
    """``(channels,)`` of bool: whether a mask has anything but zeros at a position along ``dim``."""
    return mask.detach().cpu().movedim(dim, 0).unsqueeze(-1).flatten(1).any(1)


def kept_channels(mask: Tensor, dim: int) -> Tensor:
    """The positions ``(K,)`` of :func:`is_kept`."""
    return is_kept(mask, dim).nonzero().flatten()


def masks_on_cpu(network: nn.Module, masks: Masks) -> dict[str, dict[str, Tensor]]:
    """The masks on the CPU, those of parameters in the parameter's shape, without ``None``."""

    def whole(name: str, target: str, mask: Tensor) -> Tensor:
        parameter = getattr(network.get_submodule(name), target, None)
        return mask.cpu().expand(parameter.shape) if isinstance(parameter, nn.Parameter) else mask.cpu()

    return {
        name: {target: whole(name, target, mask) for target, mask in targets.items() if mask is not None}
        for name, targets in masks.items()
    }


def describe_masks(masks: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """JSON-able: ``sparsity`` of every parameter, and the output channels whose whole weight is masked by module."""
    named = {f"{name}.{target}": mask for name, targets in masks.items() for target, mask in targets.items()}
    weights = {name: targets["weight"] for name, targets in masks.items() if "weight" in targets}
    empty = {name: ~is_kept(mask, 0) for name, mask in weights.items() if mask.ndim > 1}
    return {
        "sparsity": {name: round(1 - float(mask.double().mean()), 6) for name, mask in named.items()},
        "removed_channels": {name: gone.nonzero().flatten().tolist() for name, gone in empty.items() if gone.any()},
    }


def remaining_masks(
    network: nn.Module, masks: Mapping[str, Mapping[str, Tensor]], kept: Mapping[str, tuple[Tensor, Tensor]]
) -> Masks:
    """What is masked and still in a pruned network: single weights, or channels that could not be removed.

    Args:
        network: pruned; some of its channels may have been removed since the masks were made.
        masks: of the network as it was before, in the shapes of its parameters.
        kept: module path -> positions of the output and input channels that are left, where any were removed.

    Returns:
        Masks in the shapes of ``network``'s parameters. A bias that a folded constant has moved from zero is free.
    """
    modules = dict(network.named_modules())
    remaining: dict[str, dict[str, Tensor]] = {}
    for name, targets in masks.items():
        for target, mask in targets.items():
            parameter = getattr(modules.get(name), target, None)
            if bool(mask.all()) or not isinstance(parameter, nn.Parameter):
                continue
            zeros = parameter.detach() == 0
            cut = mask
            for axis, positions in enumerate(kept.get(name, ())):
                if axis < cut.ndim and cut.shape[axis] != zeros.shape[axis] and int(positions.max()) < cut.shape[axis]:
                    cut = cut.index_select(axis, positions)
            if cut.shape == zeros.shape:  # not so for the inputs of a grouped convolution: there all zeros count
                zeros &= cut == 0
            if bool(zeros.any()):
                remaining.setdefault(name, {})[target] = (~zeros).to(mask.dtype)
    return remaining


def multiply_in(network: nn.Module, masks: Masks) -> None:
    """Set the masked weights to zero; a mask on anything but a parameter is ignored."""
    with torch.no_grad():
        for name, targets in masks.items():
            for target, mask in targets.items():
                parameter = getattr(network.get_submodule(name), target, None)
                if mask is not None and isinstance(parameter, Tensor):
                    parameter.mul_(mask.to(parameter.device))


def held_at_zero(network: nn.Module, masks: Masks) -> Callable[[int], None]:
    """An ``after_step`` of a training that sets every masked weight back to zero.

    An optimiser moves all weights, also those at zero. A quantizer that learns a zero point (LSQ+) would make zero no
    integer any more, so the zero points of masked weights are rounded.

    Args:
        network: as it is trained; NNI keeps the parameters of a wrapped module in the wrapper.
        masks: by module path.
    """
    held: list[tuple[Tensor, Tensor]] = []
    zero_points: list[Tensor] = []
    for name, targets in masks.items():
        module = network.get_submodule(name)
        wrapper = getattr(module, "_nni_wrapper", module)
        for target, mask in targets.items():
            own = wrapper._parameters.get(target)
            parameter = module._parameters.get(target) if own is None else own
            if mask is not None and parameter is not None:
                held.append((parameter, mask.to(parameter.device, parameter.dtype)))
                zero_point = wrapper._parameters.get(f"{target}_zero_point")
                zero_points += [] if zero_point is None else [zero_point]

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
    """Write the masks beside a network's description; returns what the description must hold for :func:`load_masks`."""
    file = masks_file(description)
    named = {f"{name}:{target}": mask for name, targets in masks.items() for target, mask in targets.items()}
    return {"sha256": save_tensors(file, {key: mask != 0 for key, mask in named.items() if mask is not None})}


def load_masks(described: Any, description: Path) -> Masks:
    """The masks that :func:`save_masks` wrote.

    Args:
        described: what :func:`save_masks` returned.
        description: the network's ``.json`` file.

    Raises:
        UserError: the file is missing, damaged or of another network.
    """
    file = masks_file(description)
    tensors, _ = load_tensors(file)
    if not isinstance(described, dict) or sha256_of_file(file) != described.get("sha256"):
        raise UserError(f"{file} is not the file that {description.name} describes: its checksum differs.")
    masks: dict[str, dict[str, Tensor]] = {}
    for key, mask in tensors.items():
        name, _, target = key.rpartition(":")
        masks.setdefault(name, {})[target] = mask
    return masks
