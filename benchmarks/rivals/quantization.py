"""Post-training quantization without data, from the papers: ranges, equalisation, bias correction, rounding.

Weights have one symmetric scale a channel, activations one affine scale a tensor, as in our recipes: what differs from
row to row is where ranges and roundings come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

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
    for link in pair.links:
        if link.only:  # what residual sums make has several makers, whose scales would all have to change
            equalise(network, *link.only)
    means = expected_inputs(network, pair, seed)
    ranges = input_ranges(network, pair, task, seed)
    for name in pair.layers:
        module = network.get_submodule(name)
        rounded = quantized_weight(module.weight, weight_bits)
        correct(network, name, -(rounded - module.weight).flatten(1) @ means[name], pair)
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
    if maker.bias is not None:
        maker.bias.div_(scale)
    weight.mul_(scale[:, None])


def correct(network: nn.Module, layer: str, error: Tensor, pair: Pair) -> None:
    """Add to the mean of a layer's outputs: to its bias, or to the BatchNorm that stands directly behind it."""
    module = network.get_submodule(layer)
    if module.bias is not None:
        module.bias += error
    else:
        norm = next(norm for link in pair.links for maker, norm in link.makers if maker == layer)
        network.get_submodule(norm).running_mean -= error


@dataclass(frozen=True)
class Inputs:
    """What a layer reads, channel by channel, as BatchNorms tell it: a normal distribution, cut where a ReLU ends.

    Attributes:
        mean: with the cut.
        centre: without it.
        spread: one deviation, without the cut.
        lowest: where it is cut.
        highest: likewise.
    """

    mean: Tensor
    centre: Tensor
    spread: Tensor
    lowest: Tensor
    highest: Tensor

    def range(self, reach: float) -> Range:
        """From the lowest to the highest value within so many deviations."""
        low = torch.maximum(self.centre - reach * self.spread, self.lowest)
        high = torch.minimum(self.centre + reach * self.spread, self.highest)
        return float(low.min()), float(high.max())


def normalised_inputs(network: nn.Module, pair: Pair) -> dict[str, Inputs]:
    """Of each layer that reads what went through BatchNorms."""
    found, order = {}, {name: number for number, name in enumerate(pair.layers)}
    for link in pair.links:
        if link.makers[0][1] is None:
            continue
        if not pair.norm_first:
            found.update(dict.fromkeys(link.readers, _behind_the_relu(network.get_submodule(link.makers[0][1]))))
            continue
        before: Inputs | None = None
        for added in link.sums:
            before = _rectified_sum([network.get_submodule(norm) for _, norm in added], before)
            last = max(order[layer] for layer, _ in added)
            found.update(dict.fromkeys([name for name in link.readers if order[name] > last], before))
    return found


def _behind_the_relu(norm: nn.Module) -> Inputs:
    """Outputs of a BatchNorm that reads what a ReLU gives."""
    nowhere = torch.full_like(norm.bias, math.inf)
    at_zero = norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt()
    lowest = torch.where(norm.weight > 0, at_zero, -nowhere)
    highest = torch.where(norm.weight < 0, at_zero, nowhere)
    return Inputs(norm.bias, norm.bias, norm.weight.abs(), lowest, highest)


def _rectified_sum(norms: list[nn.Module], before: Inputs | None) -> Inputs:
    """The ReLU of the outputs of BatchNorms and of what came before, all taken for independent and normal."""
    centre = sum(norm.bias for norm in norms)
    variance = sum(norm.weight.square() for norm in norms)
    if before is not None:
        centre, variance = centre + before.mean, variance + _rectified(before.centre, before.spread)[1]
    spread = variance.sqrt()
    zero = torch.zeros_like(centre)
    return Inputs(_rectified(centre, spread)[0], centre, spread, zero, zero + math.inf)


def _rectified(centre: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the ReLU of a normal distribution (Nagel et al., appendix C)."""
    normal, spread = torch.distributions.Normal(0.0, 1.0), spread.clamp_min(1e-12)
    at = centre / spread
    below, density = normal.cdf(at), normal.log_prob(at).exp()
    mean = centre * below + spread * density
    square = (centre.square() + spread.square()) * below + centre * spread * density
    return mean, (square - mean.square()).clamp_min(0)


def expected_inputs(network: nn.Module, pair: Pair, seed: int) -> dict[str, Tensor]:
    """The mean of what each weight of a layer reads: that of BatchNorms, else the mean over noise."""
    found = _noise_means(network, pair, seed)
    found.update({name: inputs.mean for name, inputs in normalised_inputs(network, pair).items()})
    return {name: _per_weight(network, name, mean) for name, mean in found.items()}


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
    for name, inputs in normalised_inputs(network, pair).items():
        ranges[name] = inputs.range(reach)
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
