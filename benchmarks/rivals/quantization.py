"""Post-training quantization without data, from the papers: ranges, equalisation, bias correction, rounding.

Weights have one symmetric scale a channel, activations one affine scale a tensor, as in our recipes: what differs from
row to row is where ranges and roundings come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rivals.pairs import Pair, teacher_of
from zskd_nni.compression.quantization.refinement import joint_rounding
from zskd_nni.models.local_response_norm import fast_response_norms

Range = tuple[float, float]
NOISE = 1000
# Deviations that a range from BatchNorm reaches: 6 as in Nagel et al., at 4 bits what ACIQ finds best for a normal one.
REACH = {8: 6.0, 4: 2.55}


def bits_of(task: str) -> tuple[int, int]:
    """Bits of weights and activations: W4A8 -> (4, 8)."""
    return int(task[1]), int(task[3])


@torch.no_grad()
def equalisation_and_bias_correction(pair: Pair, task: str, seed: int) -> nn.Module:
    """Data-free quantization (Nagel et al. 2019): equalised channels, corrected biases, ranges from BatchNorm."""
    network, (weight_bits, _) = teacher_of(pair).student(), bits_of(task)
    for before, norm, after in pair.links:
        equalise(network, before, norm, after)
    means = expected_inputs(network, pair, seed)
    ranges = input_ranges(network, pair, task, seed)
    for name in pair.layers:
        module = network.get_submodule(name)
        rounded = quantized_weight(module.weight, weight_bits)
        module.bias -= (rounded - module.weight).flatten(1) @ means[name]
        module.weight.copy_(rounded)
    return with_quantized_inputs(network, ranges, bits_of(task)[1])


@torch.no_grad()
def squant(pair: Pair, task: str, seed: int) -> nn.Module:
    """SQuant (ICLR 2022): weights rounded so that the errors of each kernel and each channel add up to nothing."""
    network, (weight_bits, activation_bits) = teacher_of(pair).student(), bits_of(task)
    ranges = input_ranges(network, pair, task, seed)
    for name in pair.layers:
        module = network.get_submodule(name)
        module.weight.copy_(quantized_weight(module.weight, weight_bits, joint=True))
    return with_quantized_inputs(network, ranges, activation_bits)


def quantized_weight(weight: Tensor, bits: int, joint: bool = False) -> Tensor:
    """The weight on its grid, one scale a channel: ``(out, in, ...)`` of the same shape."""
    most = 2 ** (bits - 1) - 1
    scale = weight.flatten(1).abs().amax(1).clamp_min(1e-12).div(most).view(-1, *[1] * (weight.ndim - 1))
    return (joint_rounding(weight / scale, -most, most) if joint else (weight / scale).round()) * scale


def equalise(network: nn.Module, before: str, norm: str | None, after: str) -> None:
    """Scale the channels between two layers so that what makes them and what reads them have equal ranges.

    Equation 11 of Nagel et al. Where a BatchNorm stands between the two, it takes the scale, and its outputs have the
    range of what makes them.
    """
    reader = network.get_submodule(after)
    maker = network.get_submodule(norm or before)
    made = maker.bias.abs() + REACH[8] * maker.weight.abs() if norm else maker.weight.flatten(1).abs().amax(1)
    weight = reader.weight.view(reader.weight.shape[0], len(made), -1)
    read = weight.abs().amax((0, 2))
    scale = (made / read.clamp_min(1e-12)).sqrt().clamp(1e-3, 1e3)
    scale[(made == 0) | (read == 0)] = 1.0
    maker.weight.div_(scale.view(-1, *[1] * (maker.weight.ndim - 1)))
    maker.bias.div_(scale)
    weight.mul_(scale[:, None])


def expected_inputs(network: nn.Module, pair: Pair, seed: int) -> dict[str, Tensor]:
    """The mean of what each weight of a layer reads: a BatchNorm's shift, else the mean over noise."""
    found = {name: _per_weight(network, name, mean) for name, mean in _noise_means(network, pair, seed).items()}
    for _, norm, after in pair.links:
        if norm:
            found[after] = _per_weight(network, after, network.get_submodule(norm).bias)
    return found


def _per_weight(network: nn.Module, name: str, channels: Tensor) -> Tensor:
    weights = network.get_submodule(name).weight[0].numel()
    return channels.repeat_interleave(weights // len(channels))


def _noise_inputs(network: nn.Module, pair: Pair, seed: int) -> dict[str, Tensor]:
    """What each layer reads when the network sees uniform noise: ``(N, channels, ...)``."""
    spec, found = teacher_of(pair).spec, {}
    names = {network.get_submodule(name): name for name in pair.layers}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[names[module]] = inputs[0]

    handles = [module.register_forward_pre_hook(keep) for module in names]
    with fast_response_norms(network):
        network(spec.normalise(spec.uniform_noise(NOISE, seed)))
    for handle in handles:
        handle.remove()
    return found


def _noise_means(network: nn.Module, pair: Pair, seed: int) -> dict[str, Tensor]:
    inputs = _noise_inputs(network, pair, seed)
    return {name: value.transpose(0, 1).flatten(1).mean(1) for name, value in inputs.items()}


def input_ranges(network: nn.Module, pair: Pair, task: str, seed: int) -> dict[str, Range]:
    """The range of each layer's input: of its BatchNorm's outputs, else of what noise gives."""
    ranges = {name: (float(x.min()), float(x.max())) for name, x in _noise_inputs(network, pair, seed).items()}
    low, high = teacher_of(pair).spec.normalised_range()
    ranges[pair.layers[0]] = (float(low.min()), float(high.max()))
    reach = REACH[bits_of(task)[1]]
    for _, name, after in pair.links:
        if name:
            norm = network.get_submodule(name)
            spread = norm.weight.abs() * reach
            # A ReLU stands before: no output lies below (or, with a negative scale, above) that of 0.
            at_zero = norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt()
            lowest = torch.where(norm.weight > 0, torch.maximum(norm.bias - spread, at_zero), norm.bias - spread)
            highest = torch.where(norm.weight < 0, torch.minimum(norm.bias + spread, at_zero), norm.bias + spread)
            ranges[after] = (float(lowest.min()), float(highest.max()))
    return ranges


def with_quantized_inputs(network: nn.Module, ranges: Mapping[str, Range], bits: int) -> nn.Module:
    """The network, in which each layer reads its input rounded to so many bits."""
    for name, (low, high) in ranges.items():
        low, high = min(low, 0.0), max(high, 0.0)
        scale = max(high - low, 1e-12) / (2**bits - 1)
        zero = math.floor(-low / scale + 0.5)

        def rounded(_: nn.Module, inputs: tuple[Tensor], scale: float = scale, zero: int = zero) -> Tensor:
            return ((inputs[0] / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale

        network.get_submodule(name).register_forward_pre_hook(rounded)
    return network
