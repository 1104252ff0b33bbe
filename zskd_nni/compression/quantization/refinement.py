"""What improves a calibrated network without a step of training: narrower ranges, joint rounding, corrected biases.

Each changes weights, biases or scales alone, so that NNI's simulation and the ONNX file need to know nothing of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zskd_nni.compression.quantization.calibration import Calibration
from zskd_nni.models.hooks import hooked

_SAMPLE = 2**15  # values of a tensor that its range is chosen on
_SHARES = [0.05 * share for share in range(2, 21)]  # of the sample's range, on either side of zero
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def levels(quant_dtype: str) -> tuple[int, int]:
    """The smallest and the largest whole number of one of NNI's types.

    Example:
        >>> levels("int4"), levels("uint8")
        ((-7, 7), (0, 255))
    """
    unsigned, bits = quant_dtype.startswith("u"), int(quant_dtype.lstrip("uint"))
    return (0, 2**bits - 1) if unsigned else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


def rounded(values: Tensor, scale: Tensor, zero_point: Tensor, quant_dtype: str) -> Tensor:
    """The values on their grid, as NNI rounds them."""
    least, most = levels(quant_dtype)
    return ((zero_point + values / scale).round().clamp(least, most) - zero_point) * scale


@torch.no_grad()
def narrow_ranges(network: nn.Module, calibration: Calibration, images: Tensor) -> None:
    """Replace calibrated ranges of layers' inputs by those with the least squared error of rounding.

    NNI takes minimum and maximum, which at 4 bits leaves few levels for most of the values.

    Args:
        network: unwrapped, in ``eval()``.
        calibration: changed in place. Scales that are not of a whole tensor stay. A layer that is called several times
            has one range for all its inputs.
        images: ``(N, C, H, W)``, normalised: what the ranges were calibrated on.
    """
    paths = [path for path, targets in calibration.items() if "_input_0" in targets]
    samples: dict[str, list[Tensor]] = {}

    def keep(path: str, value: Tensor) -> None:
        samples.setdefault(path, []).append(_sample(value))

    with hooked(network, paths, before=keep):
        network(images.clone())
    for path, parts in samples.items():
        entry = calibration[path]["_input_0"]
        if entry["scale"].numel() == 1 and entry["scale"] > 0:
            entry.update(_best_range(torch.cat(parts).cpu(), entry))


def _sample(values: Tensor) -> Tensor:
    values = values.detach().flatten()
    return values[torch.linspace(0, len(values) - 1, min(_SAMPLE, len(values))).long()].clone()


def _best_range(values: Tensor, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    least, most = levels(entry["quant_dtype"])
    symmetric = entry.get("quant_scheme") == "symmetric" or entry["zero_point"] == 0 > least
    low, high = values.min().clamp(max=0), values.max().clamp(min=0)
    best, chosen = torch.inf, dict[str, Tensor]()
    for below, above in itertools.product(_SHARES, _SHARES):
        if (symmetric or low == 0) and below != above:
            continue
        scale = ((high * above - low * below) / (most - least)).clamp_min(1e-12)
        if symmetric:
            scale = torch.maximum(high, -low) * above / ((most - least) / 2)
        zero = entry["zero_point"] if symmetric else (least - (low * below / scale).round()).clamp(least, most)
        error = (rounded(values, scale, zero, entry["quant_dtype"]) - values).square().mean()
        if error < best:
            best = float(error)
            chosen = {
                "scale": scale.view_as(entry["scale"]),
                "zero_point": torch.as_tensor(zero).to(entry["zero_point"]).view_as(entry["zero_point"]),
            }
    return chosen


@torch.no_grad()
def round_jointly(network: nn.Module, calibration: Calibration) -> None:
    """Put weights on their grid so that the errors of each kernel and each output channel nearly add up to zero.

    SQuant (Guo et al., ICLR 2022): where the errors of rounding to nearest add up to ``n``, the ``|n|`` values with the
    largest errors of that sign go to their second nearest level; first within kernels, then, one value a kernel,
    within channels.

    Args:
        network: its weights are replaced, except those of normalisations and other layers that add nothing up.
        calibration: with the scales of the weights.
    """
    for path, targets in calibration.items():
        entry = targets.get("weight")
        if entry is not None and isinstance(network.get_submodule(path), (nn.Linear, *_CONVOLUTIONS)):
            weight = network.get_parameter(f"{path}.weight")
            scale, zero = (_spread(entry[key].to(weight), weight) for key in ("scale", "zero_point"))
            whole = joint_rounding(zero + weight / scale, *levels(entry["quant_dtype"]))
            weight.copy_((whole - zero) * scale)


def _spread(values: Tensor, weight: Tensor) -> Tensor:
    """One value for each block of a weight, or one for all of it, repeated over the weight's shape."""
    for dim in range(values.ndim):
        values = values.repeat_interleave(weight.shape[dim] // values.shape[dim], dim)
    return values


def joint_rounding(values: Tensor, least: int, most: int) -> Tensor:
    """Whole numbers within half (or, where flipped, one) of the values ``(out, in, ...)``, in ``[least, most]``.

    Example:
        >>> joint_rounding(torch.tensor([[0.4, 0.4, 0.4, 0.0]]), -7, 7)
        tensor([[1., 0., 0., 0.]])
    """
    kernels = values.flatten(2) if values.ndim > 2 else values[:, :, None]
    nearest = kernels.round().clamp(least, most)
    first = _flipped(kernels, nearest, (least, most), torch.ones_like(kernels, dtype=torch.bool))
    size = _flip_sizes(kernels, first, (least, most), (first - kernels).sum((1, 2), keepdim=True).sign())
    one_a_kernel = torch.zeros_like(size, dtype=torch.bool).scatter_(2, size.argmax(2, keepdim=True), True)
    rows, whole, allowed = (part.flatten(1)[:, None] for part in (kernels, first, one_a_kernel))
    return _flipped(rows, whole, (least, most), allowed).view_as(values)


def _flip_sizes(values: Tensor, whole: Tensor, limits: tuple[int, int], sign: Tensor) -> Tensor:
    """The size of each error that has the given sign and may be flipped, else -1."""
    error, least, most = whole - values, *limits
    other = whole - sign
    return torch.where((error * sign > 0) & (other >= least) & (other <= most), error.abs(), -1.0)


def _flipped(values: Tensor, whole: Tensor, limits: tuple[int, int], allowed: Tensor) -> Tensor:
    """The whole numbers, in which errors along the last axis add up to at most a half where that is possible."""
    total = (whole - values).sum(-1, keepdim=True)
    size = torch.where(allowed, _flip_sizes(values, whole, limits, total.sign()), -1.0)
    place = size.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return torch.where((place < total.abs().round()) & (size > 0), whole - total.sign(), whole)


@torch.no_grad()
def correct_biases(network: nn.Module, original: nn.Module, simulation: nn.Module, images: Tensor) -> None:
    """Take from each bias by how much quantization moves the mean of its channel, layer after layer.

    Nagel et al. 2019, section 4.2.2, on synthetic images. Only convolutions and linear layers with a bias are changed.
    One that is called several times gets the mean of what its calls need.

    Args:
        network: unwrapped; its biases are changed.
        original: the network before its weights were rounded, in ``eval()``.
        simulation: of the quantized network; its quantized layers are those that are corrected.
        images: ``(N, C, H, W)``, normalised.
    """
    paths = [
        path
        for path, module in network.named_modules()
        if isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and module.bias is not None and _is_wrapped(simulation, path)
    ]
    means: dict[str, list[Tensor]] = {path: [] for path in paths}
    shifts: dict[str, list[Tensor]] = {path: [] for path in paths}

    def remember(path: str, output: Tensor) -> None:
        means[path].append(_channel_means(network.get_submodule(path), output))

    def shift(path: str, output: Tensor) -> Tensor:
        module = network.get_submodule(path)
        moved = means[path][len(shifts[path])] - _channel_means(module, output)
        shifts[path].append(moved)
        return output + moved.view(-1, *[1] * (output.ndim - 2) if isinstance(module, _CONVOLUTIONS) else [])

    with hooked(original, paths, after=remember):
        original(images.clone())
    with hooked(simulation, paths, after=shift):
        simulation(images.clone())
    for path, moves in shifts.items():
        if moves:
            network.get_parameter(f"{path}.bias").add_(torch.stack(moves).mean(0))


def _is_wrapped(simulation: nn.Module, path: str) -> bool:
    return hasattr(simulation.get_submodule(path), "_nni_wrapper")


def _channel_means(module: nn.Module, output: Tensor) -> Tensor:
    """The mean of each output channel: axis 1 of a convolution, the last axis of a linear layer."""
    axis = 1 if isinstance(module, _CONVOLUTIONS) else output.ndim - 1
    return output.transpose(0, axis).flatten(1).mean(1)
