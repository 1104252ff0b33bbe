"""A masked network made smaller by NNI's ModelSpeedup, and compared with the masked one."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from zskd_nni.compression.fx_trace import (
    OWN_TENSORS,
    copied,
    input_arguments,
    output_leaves,
    own_layers,
    random_like,
    retrace,
    trace,
    unread_nodes,
)
from zskd_nni.compression.pruning.channel_flow import CONVOLUTIONS, NORMS, channel_flow
from zskd_nni.compression.pruning.constant_folding import bias_of_constants, constants_in, input_ranges
from zskd_nni.compression.pruning.masks import Masks, is_kept, kept_channels, multiply_in
from zskd_nni.compression.pruning.nni_speedup import run_speedup
from zskd_nni.models.local_response_norm import PrunedLocalResponseNorm
from zskd_nni.models.serialization import SIZES, drop_modules
from zskd_nni.models.shared_modules import check_not_wrapped, replace_everywhere, set_module, shared_layers
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.precision import without_autocast

_CHECK_BATCH_SIZE = 4
_ADVICE = "prune with a config from complete_config_list, which keeps the masks of connected layers consistent"
_FURTHER_ADVICE = (
    "the masks of connected layers agree already, so that complete_config_list has no more to say: leave layers out of "
    "the config (exclude_op_names) until the rest shrinks, or keep the masked network as large as it is"
)
_ParameterMasks = dict[str, dict[str, Tensor]]


class CannotShrinkError(UserError):
    """The masks do not fit the network's graph; ``reason`` is the sentence without the advice at its end."""

    def __init__(self, reason: str, advice: str = _ADVICE) -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason = reason


@dataclass(frozen=True)
class LayerWidths:
    """Channels (or features) of one layer before and after; a normalisation has as many inputs as outputs."""

    name: str
    kind: str
    inputs_before: int
    inputs_after: int
    outputs_before: int
    outputs_after: int


@dataclass(frozen=True)
class KeptChannels:
    """Positions of the input and output channels that a module kept, each in the order of the original."""

    inputs: Tensor
    outputs: Tensor


@dataclass
class ShrinkResult:
    """The smaller network, and how it was compared with the masked one.

    Attributes:
        model: the smaller network, on the device, in the precision and in the training modes of the original. If
            nothing could be removed it is a copy of the original with the masks multiplied in.
        parameters_before: number of parameters of the original.
        parameters_after: number of parameters of ``model``.
        max_logit_difference: the largest ``|masked - shrunken|`` over all outputs of all test inputs, in evaluation
            mode, relative to the largest ``|masked|`` of the same batch: single precision has seven digits of that one.
        argmax_agreement: share of the test inputs for which both networks choose the same class, in [0, 1]; None
            unless the output is one score a class.
        criterion: how the smaller network was compared with the masked one, in words.
        layers: the widths of each layer.
        kept: module path -> the channels it kept, to cut something else the same way, such as a quantizer's scales.
            Only modules of the evaluation graph that read one tensor; empty if nothing was removed.
        sparsity: share of zeros in all the masks, in [0, 1].
        note: that nothing was removed and why, or what was done beyond removing channels.
    """

    model: nn.Module
    parameters_before: int
    parameters_after: int
    max_logit_difference: float
    argmax_agreement: float | None
    criterion: str
    layers: list[LayerWidths] = field(default_factory=list)
    kept: dict[str, KeptChannels] = field(default_factory=dict)
    sparsity: float = 0.0
    note: str = ""

    @property
    def shrunken(self) -> bool:
        """Whether anything was removed: by widths, as folded constants may add more biases than weights went."""
        return any(
            row.inputs_after < row.inputs_before or row.outputs_after < row.outputs_before for row in self.layers
        )


def shrink(
    model: nn.Module, masks: Masks, dummy_input: Any, tolerance: float = 1e-4, graph: GraphModule | None = None
) -> ShrinkResult:
    """Remove the channels that the masks zero, and check that the network still computes the same.

    NNI's ``ModelSpeedup`` finds and removes the channels. On top of it: tracing with current PyTorch, local response
    normalisation (which keeps its original neighbourhoods, see ``PrunedLocalResponseNorm``), constants that removed
    channels leave behind (see ``constant_folding``), auxiliary heads that only run in training (dropped, because their
    input has changed), and the comparison with the masked network.

    Args:
        model: the network that was pruned, unwrapped. It is left as it is.
        masks: what a pruner's ``compress`` or ``get_masks`` gives: module path -> parameter name -> 0/1 mask.
        dummy_input: one input, see ``fx_trace.trace``.
        tolerance: the largest allowed difference of any output, relative to the largest one.
        graph: of a network of the same structure, from ``fx_trace.trace``; traced here by default.

    Raises:
        UserError: the masks do not belong to the model; the model is wrapped or cannot be traced; NNI cannot shrink
            it; the smaller network does not compute what the masked one does.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> mask = torch.ones(6, 4)
        >>> mask[:2] = 0
        >>> shrink(network, {"0": {"weight": mask, "bias": mask[:, 0]}}, torch.zeros(2, 4)).model
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    check_not_wrapped(model)
    if any(hasattr(module, "_nni_wrapper") for module in model.modules()):
        raise UserError("the model is still wrapped by NNI; call unwrap_model() of its pruner before shrinking")
    if next(model.parameters(), None) is None:
        raise UserError(f"{type(model).__name__} has no parameters, so there is nothing to shrink")
    # All on the CPU in single precision: the same result everywhere, and NNI builds its new layers that way.
    masked = deepcopy(model).cpu().float().eval()
    example = tree_map(_on_cpu, dummy_input)
    arguments = input_arguments(example, masked)
    parameter_masks = as_parameter_masks(masked, masks)
    multiply_in(masked, parameter_masks)
    sparsity = _sparsity(parameter_masks)
    channel_masks = {name: _channel_masks(targets) for name, targets in parameter_masks.items()}
    if not any(map(_removes_channels, channel_masks.values())):
        note = f"the masks zero {sparsity:.1%} of what they cover but no whole channel, so there is nothing to remove"
        if not sparsity:
            note = "the masks zero nothing, so there is nothing to remove; is the config's sparse_ratio above 0?"
        return _result(model, masked, sparsity, note)
    try:
        candidate, kept, notes = _remove(masked, channel_masks, arguments, graph)
        difference, agreement = compare(masked, candidate, arguments)
        if not difference <= tolerance:
            raise CannotShrinkError(
                f"the shrunken {type(model).__name__} differs from the masked one by {difference:.2g} relative to the "
                f"largest logit, more than the tolerance {tolerance:g}, so it is refused"
                + (f" ({'; '.join(notes)})" if notes else "")
            )
    except UserError as error:
        weights = [targets["weight"] for targets in parameter_masks.values() if "weight" in targets]
        if not all(is_fine_grained(mask) for mask in weights if not mask.all()):
            if isinstance(error, CannotShrinkError) and _agree(channel_masks, graph or trace(masked, arguments)):
                raise CannotShrinkError(error.reason, _FURTHER_ADVICE) from error
            raise
        # Masks of single weights: nobody asked to remove channels, and those that are empty by chance may stay.
        note = f"the masks zero {sparsity:.1%} of single weights, and the channels they empty by chance stay"
        return _result(model, masked, sparsity, note)
    result = _result(model, candidate, sparsity, "; ".join(notes))
    result.max_logit_difference, result.argmax_agreement, result.kept = difference, agreement, kept
    result.criterion = f"logits within {tolerance:g} of the masked network's, relative to the largest logit"
    return result


def _result(model: nn.Module, candidate: nn.Module, sparsity: float, note: str) -> ShrinkResult:
    """The candidate with the device, precision, training flags and trainable parameters of the original."""
    first = next(model.parameters())
    candidate = candidate.to(device=first.device, dtype=first.dtype)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in candidate.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(trainable.get(name, True))
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in candidate.named_modules():
        module.training = modes.get(name, model.training)
    before, after = (sum(parameter.numel() for parameter in network.parameters()) for network in (model, candidate))
    return ShrinkResult(
        candidate, before, after, 0.0, None, "not needed", _widths(model, candidate), sparsity=sparsity, note=note
    )


def compare(masked: nn.Module, shrunken: nn.Module, arguments: tuple[Any, ...]) -> tuple[float, float | None]:
    """How far two networks' evaluation outputs are apart.

    Args:
        masked: the reference; both networks are on the CPU and in evaluation mode.
        shrunken: the other network.
        arguments: the dummy input. It is one of the inputs compared on; the others are random and of its shape, some of
            them ten times as large.

    Returns:
        The relative difference as in ``ShrinkResult.max_logit_difference`` (infinite if the outputs differ in form,
        hold no tensor or are not numbers), and the share of equal arg-max classes (None unless the output is
        ``(N, C)``).

    Raises:
        UserError: the shrunken network does not run.
    """
    largest, equal, total = 0.0, 0, 0
    generator = torch.Generator().manual_seed(0)
    drawn = [random_like(arguments, generator, uniform, _CHECK_BATCH_SIZE) for uniform in (False, False, True)]
    for given in (arguments, *drawn, tree_map(_tenfold, drawn[0])):
        with torch.no_grad(), without_autocast():
            expected = output_leaves(masked(*copied(given)))
            if given is not arguments and not all(map(_is_finite, expected)):
                continue  # the network overflows, whatever is removed
            try:
                actual = output_leaves(shrunken(*copied(given)))
            except Exception as error:
                raise CannotShrinkError(
                    f"the shrunken {type(masked).__name__} does not run: {' '.join(str(error).splitlines()[:1])}"
                ) from error
        if len(expected) != len(actual) or not any(isinstance(leaf, Tensor) for leaf in expected):
            return float("inf"), None
        for a, b in zip(expected, actual, strict=True):
            if isinstance(a, Tensor):
                if not isinstance(b, Tensor) or a.shape != b.shape:
                    return float("inf"), None
                worst = _relative_distance(a, b)
                largest = max(largest, worst if worst == worst else float("inf"))
        if len(expected) == 1 and isinstance(expected[0], Tensor) and expected[0].dim() == 2:
            equal += int((expected[0].argmax(1) == actual[0].argmax(1)).sum())
            total += len(expected[0])
    return largest, equal / total if total else None


def _tenfold(value: Any) -> Any:
    """Larger numbers than a network usually gets: channels that others leave silent answer to them."""
    return value * 10 if isinstance(value, Tensor) and value.is_floating_point() else value


def _is_finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())


def _relative_distance(expected: Tensor, actual: Tensor) -> float:
    """Of all outputs of one batch, relative to the largest: a small logit beside large ones has their rounding."""
    if not expected.numel():
        return 0.0
    return ((expected - actual).abs().max() / (expected.abs().max().item() or 1.0)).item()


# ---- the masks


def as_parameter_masks(model: nn.Module, masks: Masks) -> _ParameterMasks:
    """The masks as 0/1 tensors of the parameters' shapes.

    A mask on the channels of a layer's input or output becomes one on its parameters, and one that masks nothing is
    left out, whatever its shape.

    Raises:
        UserError: a mask of a module that the model has not got, of another shape, or of single activations.
    """
    modules = dict(model.named_modules())
    result: _ParameterMasks = {}
    for name, targets in masks.items():
        if name not in modules:
            raise UserError(f"the masks name {name!r}, which {type(model).__name__} has not got")
        own = result.setdefault(name, {})
        for target, mask in targets.items():
            if mask is not None:
                for each, value in _of_parameters(name, modules[name], target, (mask.cpu() != 0).float()).items():
                    own[each] = own[each] * value if each in own else value
        if "weight" in own and not bool(own["weight"].any()):
            raise UserError(f"the masks leave no channel of {name}; prune it with a smaller sparse_ratio")
    return result


def _of_parameters(name: str, module: Any, target: str, mask: Tensor) -> dict[str, Tensor]:
    """One mask of a module, by the names of the parameters that it masks."""
    parameter = getattr(module, target, None)
    if isinstance(parameter, nn.Parameter):
        try:
            return {target: mask.expand(parameter.shape).clone()}
        except RuntimeError:
            raise UserError(
                f"the mask of {name}.{target} has the shape {tuple(mask.shape)}, "
                f"which does not fit the parameter's {tuple(parameter.shape)}"
            ) from None
    if bool(mask.all()):
        return {}
    weight: Any = getattr(module, "weight", None)
    inputs = target.startswith("_input_") and isinstance(module, (nn.Linear, *CONVOLUTIONS))
    outputs = target.startswith("_output_") and isinstance(module, (nn.Linear, *NORMS, *CONVOLUTIONS))
    if (inputs and getattr(module, "groups", 1) > 1) or not (inputs or outputs) or weight is None:
        raise UserError(
            f"the mask {name}.{target} covers neither a parameter nor the channels of a convolution, linear layer or "
            f"BatchNorm, so it cannot be shrunken; prune weights instead"
        )
    channels = weight.shape[1] if inputs else len(weight)
    flat = _by_channel(mask, channels, -1 if isinstance(module, nn.Linear) else 1)
    if flat is None:
        raise UserError(
            f"the {'input' if inputs else 'output'} mask of {name} has the shape {tuple(mask.shape)}, not one value a "
            f"channel; it can be removed if it is the same for all of the {channels} channels' values"
        )
    if inputs:
        return {"weight": flat.view(1, -1, *[1] * (weight.dim() - 2)).expand(weight.shape).clone()}
    return {"weight": _spread(flat, weight)} | ({} if module.bias is None else {"bias": flat})


def _by_channel(mask: Tensor, channels: int, dim: int) -> Tensor | None:
    """One value a channel of a mask of an activation; None if the values of a channel differ."""
    if mask.numel() == channels:
        return mask.flatten()
    if mask.dim() < 2 or mask.shape[dim] != channels:
        return None
    rows = mask.movedim(dim, 0).flatten(1)
    return rows[:, 0].clone() if bool((rows == rows[:, :1]).all()) else None


def _spread(channels: Tensor, weight: Tensor) -> Tensor:
    """One value an output channel, in the shape of the weight."""
    return channels.view(-1, *[1] * (weight.dim() - 1)).expand(weight.shape).clone()


def _sparsity(masks: _ParameterMasks) -> float:
    tensors = [mask for targets in masks.values() for mask in targets.values()]
    count = sum(mask.numel() for mask in tensors)
    return 1.0 - sum(mask.sum().item() for mask in tensors) / count if count else 0.0


def is_fine_grained(mask: Tensor) -> bool:
    """Whether the mask zeroes more than whole output and input channels."""
    if mask.dim() < 2:
        return False
    product = torch.outer(is_kept(mask, 0), is_kept(mask, 1))
    return not bool((mask.cpu().bool() == product.view(*product.shape, *[1] * (mask.dim() - 2))).all())


def _channel_masks(targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """The masks without the zeros of single weights, which are multiplied into the weights already.

    Of those only empty output channels count: NNI takes an empty column of a linear layer for a channel of the layer in
    front, of which it may be a single pixel.
    """
    weight = targets.get("weight")
    if weight is None or not is_fine_grained(weight):
        return targets
    return {**targets, "weight": _spread(is_kept(weight, 0).to(weight.dtype), weight)}


def _removes_channels(targets: dict[str, Tensor]) -> bool:
    weight = targets.get("weight")
    return weight is not None and not all(bool(is_kept(weight, dim).all()) for dim in range(min(weight.dim(), 2)))


def _agree(masks: _ParameterMasks, graph: GraphModule) -> bool:
    """Whether masks zero only channels that may go, and the same ones in layers that share them."""
    flow = channel_flow(graph)
    removed = {
        name: ~is_kept(targets["weight"], 0) if targets["weight"].dim() > 1 else targets["weight"] == 0
        for name, targets in masks.items()
        if "weight" in targets
    }
    for name, gone in removed.items():
        if not bool(gone.any()):
            continue
        if (name not in flow.sources and name not in flow.followers) or flow.reason(name):
            return False
        others = [removed.get(other) for other in flow.tied(name)]
        if any(other is None or not torch.equal(other, gone) for other in others):
            return False
    return True


# ---- removing the channels


def _remove(
    masked: nn.Module, masks: _ParameterMasks, arguments: tuple[Any, ...], graph: GraphModule | None
) -> tuple[nn.Module, dict[str, KeptChannels], list[str]]:
    """A copy of the masked network without the channels that are zero, the channels that are left, and notes."""
    candidate = deepcopy(masked)
    notes: list[str] = []
    if graph is None:
        graph = trace(candidate, arguments)
        channel_flow(graph)  # tries the functions that no list names
    graph_module = retrace(graph, candidate)
    for node in unread_nodes(graph_module):  # NNI fails on nodes without a gradient
        graph_module.graph.erase_node(node)
    graph_module.recompile()
    called = Counter(str(node.target) for node in graph_module.graph.nodes if node.op == "call_module")
    dropped = _drop_auxiliary_heads(candidate, called)
    if dropped:
        notes.append(f"{', '.join(dropped)}, which only run in training, are dropped")
    shared = shared_layers(candidate)
    own = {path: candidate.get_submodule(path) for path in own_layers(graph_module)}
    for path, layer in own_layers(graph_module).items():
        set_module(candidate, path, layer)  # NNI replaces the layers that it knows
    # NNI looks its masks up in the graph, and changes them in place.
    in_graph = {name: {k: v.clone() for k, v in targets.items()} for name, targets in masks.items() if name in called}
    _mask_layers_before_norms(candidate, in_graph, graph_module)
    try:
        speedup = run_speedup(candidate, graph_module, in_graph, arguments)
    except UserError:
        raise
    except Exception as error:
        what = str(error).strip().splitlines()
        raise CannotShrinkError(
            f"NNI cannot shrink {type(masked).__name__}: {type(error).__name__}{': ' + what[0] if what else ''}"
        ) from error
    for path, module in own.items():
        set_module(candidate, path, _resized(module, candidate.get_submodule(path)))
    kept = _kept_by_module(speedup)
    foldable = {name: kept[name] for name in kept if called[name] == 1 and name not in own}
    notes += _fold_constants(masked, candidate, foldable, arguments)
    replace_everywhere(candidate, shared)
    if any(isinstance(module, PrunedLocalResponseNorm) for module in candidate.modules()):
        notes.append("local response normalisation keeps the neighbourhoods of the original channels")
    return candidate.eval(), kept, notes  # NNI's new layers are in training mode


def _resized(module: Any, layer: Any) -> nn.Module:
    """A module of the user's with the tensors and sizes of the layer that stood for it."""
    for name in OWN_TENSORS:
        if getattr(layer, name, None) is not None:
            setattr(module, name, getattr(layer, name))
    for name in SIZES:
        if isinstance(getattr(module, name, None), int) and hasattr(layer, name):
            setattr(module, name, getattr(layer, name))
    module._modules.update(layer._modules)
    return module


def _mask_layers_before_norms(model: nn.Module, masks: _ParameterMasks, graph_module: GraphModule) -> None:
    """If only normalisations are masked, mask the layers in front of them, which NNI would not find by itself.

    The output of such a layer is multiplied by zero for a masked channel. Should another layer read it all the same,
    the comparison with the masked network shows.
    """
    norms = [name for name in masks if isinstance(model.get_submodule(name), NORMS)]
    if not norms:
        return
    flow = channel_flow(graph_module)
    for name in norms:
        tied = flow.tied(name) if name in flow.followers and {"weight", "bias"} <= masks[name].keys() else []
        if not tied or any(other in masks and other not in norms for other in tied):
            continue
        masked_norms = [masks[other] for other in tied if other in norms]
        used = torch.stack([mask for targets in masked_norms for mask in targets.values()]).any(0)
        for other in tied:
            module: Any = model.get_submodule(other)
            if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
                own = dict(module.named_parameters(recurse=False))
                masks[other] = {target: _spread(used.float(), parameter) for target, parameter in own.items()}
                multiply_in(model, {other: masks[other]})


def _drop_auxiliary_heads(model: nn.Module, called: Counter[str]) -> list[str]:
    """Drop heads like GoogLeNet's: they read channels that are removed, and the evaluation graph has not got them."""
    if not getattr(model, "aux_logits", False):
        return []
    used = {target.partition(".")[0] for target in called}
    unused = [name for name, child in model.named_children() if name not in used and [*child.parameters()]]
    drop_modules(model, unused)
    return unused


def _fold_constants(
    masked: nn.Module, candidate: nn.Module, kept: dict[str, KeptChannels], arguments: tuple[Any, ...]
) -> list[str]:
    """Add to the biases of layers that are called once what the removed input channels contributed as constants."""
    readers = [name for name in kept if isinstance(masked.get_submodule(name), (nn.Linear, *CONVOLUTIONS))]
    generator = torch.Generator().manual_seed(1)
    with input_ranges(masked, readers) as ranges, torch.no_grad():
        for uniform in (False, True):
            masked(*random_like(arguments, generator, uniform, _CHECK_BATCH_SIZE))
    folded, unfoldable = 0, []
    for name in readers:
        low, high = ranges[name]
        gone = torch.ones_like(low, dtype=torch.bool).index_fill(0, kept[name].inputs, False)
        values = constants_in((low[gone], high[gone]))
        if values is None or not bool(values.any()):
            continue  # a channel that varies must not have been removed: the comparison will refuse that
        bias = bias_of_constants(masked.get_submodule(name), gone.nonzero().flatten(), values)
        if bias is None:
            unfoldable.append(name)
            continue
        smaller: Any = candidate.get_submodule(name)
        bias = bias[kept[name].outputs].detach()
        smaller.bias = nn.Parameter(bias if smaller.bias is None else smaller.bias.detach() + bias)
        folded += 1
    notes = []
    if folded:
        notes.append(f"constants of removed channels are folded into the biases of {folded} layers")
    if unfoldable:
        notes.append(
            f"removed channels are not zero at the padded {', '.join(unfoldable[:3])}: a bias or BatchNorm before it "
            f"is not pruned with its layer"
        )
    return notes


def _kept_by_module(speedup: Any) -> dict[str, KeptChannels]:
    kept = {}
    for node in speedup.graph_module.graph.nodes:
        if node.op == "call_module" and len(node.all_input_nodes) == 1:
            masks = [speedup.node_infos[each].output_masks for each in (node.all_input_nodes[0], node)]
            dim = -1 if isinstance(speedup.graph_module.get_submodule(node.target), nn.Linear) else 1
            if all(isinstance(mask, Tensor) and mask.dim() > 1 for mask in masks):
                kept[str(node.target)] = KeptChannels(*(kept_channels(mask, dim) for mask in masks))
    return kept


# ---- helpers


def _widths(before: nn.Module, after: nn.Module) -> list[LayerWidths]:
    smaller = dict(after.named_modules())
    rows = []
    for name, module in before.named_modules():
        old, new = _channels_of(module), _channels_of(smaller.get(name))
        if old and new:
            rows.append(LayerWidths(name, type(module).__name__, old[0], new[0], old[1], new[1]))
    return rows


def _channels_of(layer: nn.Module | None) -> tuple[int, int] | None:
    if isinstance(layer, CONVOLUTIONS):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return (layer.num_features, layer.num_features) if isinstance(layer, NORMS) else None


def _on_cpu(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
