"""A masked network turned into a really smaller one, by NNI's ModelSpeedup, and checked against the masked one."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from zskd_nni.compression.fx_trace import copied, input_arguments, retrace, trace, unread_nodes
from zskd_nni.compression.pruning.channel_flow import CONVOLUTIONS, channel_flow
from zskd_nni.compression.pruning.constant_folding import InputRanges, bias_of_constants
from zskd_nni.compression.pruning.masks import multiply_in
from zskd_nni.models.local_response_norm import PrunedLocalResponseNorm
from zskd_nni.models.serialization import drop_modules
from zskd_nni.models.shared_modules import replace_everywhere, shared_layers
from zskd_nni.runtime.errors import UserError

_CHECK_BATCH_SIZE = 4
_ADVICE = "prune with a config from complete_config_list, which keeps the masks of connected layers consistent"
_SELECTIONS = {"getitem", "chunk", "split", "narrow", "unbind", "select", "index_select"}


class CannotShrinkError(UserError):
    """The masks do not fit the network's graph; ``reason`` is the sentence without the advice at its end."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; {_ADVICE}")
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
    """Positions of the channels that a module still reads and gives, each in the order of the original."""

    inputs: Tensor
    outputs: Tensor


@dataclass
class ShrinkResult:
    """The smaller network, and how it was judged.

    Attributes:
        model: the smaller network, on the device, in the precision and in the training modes of the original. Where
            nothing could be removed it is a copy of the original with the masks multiplied in.
        parameters_before: number of parameters of the original.
        parameters_after: number of parameters of ``model``.
        max_logit_difference: the largest ``|masked - shrunken| / max(1, |masked|)`` over all outputs of all test
            inputs, in evaluation mode; where no logit reaches 1, the largest of them takes the place of the 1.
        argmax_agreement: share of the test inputs for which both networks name the same class; None where the
            output is not one score a class.
        criterion: how the smaller network was compared with the masked one, in words.
        layers: one row a layer.
        kept: module path -> the channels it kept, for whoever has to cut something else the same way (a quantizer's
            scales). Only modules of the evaluation graph that read one tensor; empty where nothing shrank.
        sparsity: share of zeros in all the masks.
        shrunken: whether anything was removed.
        note: what the reader should know: that nothing shrank and why, or what was done beyond removing channels.
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
    shrunken: bool = True
    note: str = ""


def shrink(
    model: nn.Module,
    masks: Mapping[str, Mapping[str, Tensor | None]],
    dummy_input: Any,
    tolerance: float = 1e-4,
    graph: GraphModule | None = None,
) -> ShrinkResult:
    """Remove the channels that the masks zero, and check that the network still computes the same.

    NNI's ``ModelSpeedup`` finds and removes the channels. On top of it: tracing on current PyTorch, local response
    normalisation (which keeps its original neighbourhoods, see ``PrunedLocalResponseNorm``), constants that removed
    channels leave behind (see ``constant_folding``), auxiliary heads that only run in training (dropped: their input
    has changed), and the comparison with the masked network, without which no network is returned.

    Args:
        model: the network that was pruned, unwrapped. It is left as it is.
        masks: what a pruner's ``compress`` or ``get_masks`` gives: module path -> parameter name -> 0/1 mask.
        dummy_input: one input, see ``graph.trace``.
        tolerance: the largest allowed difference of any output, relative to ``max(1, |logit|)``.
        graph: of a network of the same structure, from ``fx_trace.trace``; traced here by default.

    Returns:
        The smaller network with its numbers.

    Raises:
        UserError: the masks do not belong to the model; the model is wrapped or cannot be traced; NNI cannot shrink
            it; the smaller network does not compute what the masked one does.
    """
    if any(hasattr(module, "_nni_wrapper") for module in model.modules()):
        raise UserError("the model is still wrapped by NNI; call unwrap_model() of its pruner before shrinking")
    first = next(model.parameters(), None)
    if first is None:
        raise UserError(f"{type(model).__name__} has no parameters, so there is nothing to shrink")
    device, dtype = first.device, first.dtype

    # All on the CPU in single precision: the same result everywhere, and NNI builds its new layers that way.
    masked = deepcopy(model).cpu().float().eval()
    arguments = tree_map(_to_cpu, input_arguments(dummy_input, None))
    if isinstance(dummy_input, dict):
        arguments = tree_map(_to_cpu, input_arguments(dummy_input, trace(masked, tree_map(_to_cpu, dummy_input))))
    parameter_masks = _parameter_masks(masked, masks)
    emptied = next((name for name, targets in parameter_masks.items() if "weight" in targets
                    and not bool(targets["weight"].any())), None)  # fmt: skip
    if emptied is not None:
        raise UserError(f"the masks leave no channel of {emptied}; prune it with a smaller sparse_ratio")
    multiply_in(masked, parameter_masks)
    before = sum(parameter.numel() for parameter in model.parameters())
    sparsity = _sparsity(parameter_masks)

    whole = {name: _whole_channels(targets) for name, targets in parameter_masks.items()}

    def unshrunken(note: str) -> ShrinkResult:
        result = _dressed_like(masked, model, device, dtype)
        layers = _widths(model, result)
        return ShrinkResult(
            result, before, before, 0.0, None, "none was needed", layers, sparsity=sparsity, shrunken=False, note=note
        )

    if not any(_removes_whole_channels(targets) for targets in whole.values()):
        return unshrunken(
            f"the masks zero {sparsity:.1%} of what they cover but no whole channel, so there is nothing to remove"
        )
    try:
        candidate, kept, notes = _remove(masked, whole, arguments, graph)
        candidate.eval()  # NNI's new layers are in training mode
        difference, agreement = compare(masked, candidate, arguments)
        if not difference <= tolerance:
            raise CannotShrinkError(
                f"the shrunken {type(model).__name__} differs from the masked one by {difference:.2g} relative to the "
                f"logits, more than the tolerance {tolerance:g}, so it is refused{_colon(notes)}"
            )
    except UserError:
        weights = [targets["weight"] for targets in parameter_masks.values() if "weight" in targets]
        if not all(is_fine_grained(mask) for mask in weights if not mask.all()):
            raise
        # Masks of single weights: nobody asked for channels to go, and those that are empty by chance may stay.
        return unshrunken(
            f"the masks zero {sparsity:.1%} of single weights, and what channels they empty by chance cannot be removed"
        )
    shrunken = _dressed_like(candidate, model, device, dtype)
    after = sum(parameter.numel() for parameter in shrunken.parameters())
    layers = _widths(model, shrunken)
    criterion = f"logits within {tolerance:g} of the masked network's, relative to max(1, |logit|)"
    return ShrinkResult(
        shrunken,
        parameters_before=before,
        parameters_after=after,
        max_logit_difference=difference,
        argmax_agreement=agreement,
        criterion=criterion,
        layers=layers,
        kept=kept,
        sparsity=sparsity,
        # Not by their number: folded constants may bring more biases than there were weights to remove.
        shrunken=any(
            layer.inputs_after < layer.inputs_before or layer.outputs_after < layer.outputs_before for layer in layers
        ),
        note="; ".join(notes),
    )


def compare(masked: nn.Module, shrunken: nn.Module, arguments: tuple[Any, ...]) -> tuple[float, float | None]:
    """How far two networks' evaluation outputs are apart.

    Args:
        masked: the reference; both networks are on the CPU and in evaluation mode.
        shrunken: the other network.
        arguments: the dummy input. It is one of the inputs compared on; the others are random and of its shape.

    Returns:
        The relative difference as in ``ShrinkResult.max_logit_difference`` (infinite where the outputs do not even
        have the same form, or are not numbers), and the share of equal arg-max classes (None where the output is
        not ``(N, C)``).

    Raises:
        UserError: the shrunken network does not run.
    """
    largest, equal, total = 0.0, 0, 0
    generator = torch.Generator().manual_seed(0)
    for given in (arguments, *(_random_like(arguments, generator, flat) for flat in (False, False, True))):
        with torch.no_grad():
            expected = masked(*copied(given))
            try:
                actual = shrunken(*copied(given))
            except Exception as error:
                raise CannotShrinkError(
                    f"the shrunken {type(masked).__name__} does not run: {' '.join(str(error).splitlines()[:1])}"
                ) from error
        left, right = tree_leaves(expected), tree_leaves(actual)
        if len(left) != len(right):
            return float("inf"), None
        for a, b in zip(left, right, strict=True):
            if not isinstance(a, Tensor):
                continue
            if not isinstance(b, Tensor) or a.shape != b.shape:
                return float("inf"), None
            worst = _relative_distance(a, b)
            largest = max(largest, worst if worst == worst else float("inf"))
        if len(left) == 1 and isinstance(left[0], Tensor) and left[0].dim() == 2:
            equal += int((left[0].argmax(1) == right[0].argmax(1)).sum())
            total += left[0].shape[0]
    return largest, equal / total if total else None


def _relative_distance(expected: Tensor, actual: Tensor) -> float:
    if not expected.numel():
        return 0.0
    # Where all logits are small, the largest of them is the scale: 1 would forgive anything.
    scale = min(1.0, expected.abs().max().item()) or 1.0
    return ((expected - actual).abs() / expected.abs().clamp_min(scale)).max().item()


# ---- the masks


def _parameter_masks(
    model: nn.Module, masks: Mapping[str, Mapping[str, Tensor | None]]
) -> dict[str, dict[str, Tensor]]:
    """The masks as 0/1 tensors of the parameters' shapes; a mask on a layer's output becomes one on its parameters."""
    modules = dict(model.named_modules())
    result: dict[str, dict[str, Tensor]] = {}
    for name, targets in masks.items():
        if name not in modules:
            raise UserError(f"the masks name {name!r}, which {type(model).__name__} has not got")
        module = modules[name]
        for target, mask in targets.items():
            if mask is None:
                continue
            mask = (mask.detach().cpu() != 0).float()
            parameter = getattr(module, target, None)
            own = result.setdefault(name, {})
            if isinstance(parameter, nn.Parameter):
                try:
                    mask = mask.expand(parameter.shape)
                except RuntimeError:
                    raise UserError(
                        f"the mask of {name}.{target} has the shape {tuple(mask.shape)}, "
                        f"which does not fit the parameter's {tuple(parameter.shape)}"
                    ) from None
                own[target] = own[target] * mask if target in own else mask.clone()
            elif target.startswith("_output_") and isinstance(module, (nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d,
                                                                       *CONVOLUTIONS)):  # fmt: skip
                for each, value in _output_mask(name, module, mask).items():
                    own[each] = own[each] * value if each in own else value
            else:
                raise UserError(
                    f"the mask {name}.{target} covers neither a parameter nor the output channels of a convolution, "
                    f"linear layer or BatchNorm, so it cannot be shrunken; prune weights instead"
                )
    return result


def _output_mask(name: str, module: Any, mask: Tensor) -> dict[str, Tensor]:
    if module.weight is None or mask.numel() != module.weight.shape[0]:
        raise UserError(f"the output mask of {name} has the shape {tuple(mask.shape)}, not one value a channel")
    flat = mask.flatten()
    shaped = flat.view(-1, *[1] * (module.weight.dim() - 1)).expand(module.weight.shape).clone()
    return {"weight": shaped} if module.bias is None else {"weight": shaped, "bias": flat}


def _sparsity(masks: dict[str, dict[str, Tensor]]) -> float:
    tensors = [mask for targets in masks.values() for mask in targets.values()]
    count = sum(mask.numel() for mask in tensors)
    return 1.0 - sum(mask.sum().item() for mask in tensors) / count if count else 0.0


def is_fine_grained(mask: Tensor) -> bool:
    """Whether the mask zeroes more than whole output and input channels."""
    if mask.dim() < 2:
        return False
    rows, columns = mask.flatten(1).any(1), mask.transpose(0, 1).flatten(1).any(1)
    product = rows[:, None] & columns[None, :]
    return not bool((mask.bool() == product.view(*product.shape, *[1] * (mask.dim() - 2))).all())


def _whole_channels(targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """The masks without the zeros of single weights, which are in the weights already.

    Of those only empty output channels are looked for: NNI takes an empty column of a linear layer for a channel of
    the layer in front, of which it may be a single pixel.
    """
    weight = targets.get("weight")
    if weight is None or not is_fine_grained(weight):
        return targets
    rows = weight.flatten(1).any(1).to(weight.dtype)
    return {**targets, "weight": rows.view(-1, *[1] * (weight.dim() - 1)).expand(weight.shape).clone()}


def _removes_whole_channels(targets: dict[str, Tensor]) -> bool:
    weight = targets.get("weight")
    if weight is None:
        return False
    rows = weight.flatten(1) if weight.dim() > 1 else weight[:, None]
    columns = weight.transpose(0, 1).flatten(1) if weight.dim() > 1 else rows
    return bool((rows.sum(1) == 0).any()) or bool((columns.sum(1) == 0).any())


# ---- NNI's part


def _remove(
    masked: nn.Module, masks: dict[str, dict[str, Tensor]], arguments: tuple[Any, ...], graph: GraphModule | None
) -> tuple[nn.Module, dict[str, KeptChannels], list[str]]:
    """A copy of the masked network without the channels that are zero, what was kept, and what to know about it."""
    candidate = deepcopy(masked)
    notes: list[str] = []
    graph_module = trace(candidate, arguments) if graph is None else retrace(graph, candidate)
    for node in unread_nodes(graph_module):  # NNI stumbles over nodes without a gradient
        graph_module.graph.erase_node(node)
    graph_module.recompile()
    called = Counter(str(node.target) for node in graph_module.graph.nodes if node.op == "call_module")
    dropped = _drop_auxiliary_heads(candidate, called)
    if dropped:
        notes.append(f"{', '.join(dropped)}, which only run in training, are dropped")
    names = shared_layers(candidate)
    # NNI looks its masks up in the graph, and changes them in place.
    in_graph = {name: {k: v.clone() for k, v in targets.items()} for name, targets in masks.items() if name in called}
    _spread_norm_masks(candidate, in_graph, graph_module)
    try:
        with _quiet_nni(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            speedup = _model_speedup(candidate, graph_module, in_graph, arguments)
            speedup.speedup_model()
    except UserError:
        raise
    except Exception as error:
        what = str(error).strip().splitlines()
        raise CannotShrinkError(
            f"NNI cannot shrink {type(masked).__name__}: {type(error).__name__}{': ' + what[0] if what else ''}"
        ) from error
    notes += _fold_constants(masked, candidate, speedup, called, arguments)
    replace_everywhere(candidate, names)
    if any(isinstance(module, PrunedLocalResponseNorm) for module in candidate.modules()):
        notes.append("local response normalisation keeps the neighbourhoods of the original channels")
    return candidate, _kept_channels(speedup), notes


def _spread_norm_masks(model: nn.Module, masks: dict[str, dict[str, Tensor]], graph_module: GraphModule) -> None:
    """Where only normalisations are masked, mask the layers in front of them, which NNI would not find by itself.

    What such a layer gives for a silenced channel is multiplied by zero; should anything else read it after all, the
    comparison with the masked network shows.
    """
    norms = [name for name in masks if isinstance(model.get_submodule(name), nn.BatchNorm1d | nn.BatchNorm2d)]
    if not norms:
        return
    flow = channel_flow(graph_module)
    for name in norms:
        weight, bias = (masks[name].get(target) for target in ("weight", "bias"))
        if name not in flow.followers or weight is None or bias is None:
            continue
        tied = flow.tied(name)
        if any(other in masks and other not in norms for other in tied):
            continue
        silenced = (weight + bias) == 0
        for other in tied:
            if other in norms:
                silenced &= sum(masks[other].values()) == 0
        for other in tied:
            if other not in norms and isinstance(model.get_submodule(other), (nn.Linear, *CONVOLUTIONS)):
                module: Any = model.get_submodule(other)
                targets = {"weight": module.weight} | ({} if module.bias is None else {"bias": module.bias})
                masks[other] = {}
                for target, parameter in targets.items():
                    masks[other][target] = torch.ones_like(parameter).detach()
                    masks[other][target][silenced] = 0
                    with torch.no_grad():
                        parameter[silenced] = 0


def _model_speedup(
    model: nn.Module, graph_module: GraphModule, masks: dict[str, dict[str, Tensor]], arguments: tuple[Any, ...]
) -> Any:
    # Imported here: the import registers pytree nodes for all of torch once more, and torch warns of that.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", ".*already registered as pytree node", UserWarning)
        from nni.compression.speedup import ModelSpeedup
        from nni.compression.speedup.mask_updater import DefaultMaskUpdater, NoChangeMaskUpdater, NoMaskUpdater
        from nni.compression.speedup.replacer import DefaultReplacer

    class RelativeModelSpeedup(ModelSpeedup):
        """NNI takes a channel that varies by less than 1e-6 for a constant; here that is relative to its tensor."""

        def direct_calc_mask(self, output: Any, output_mask: Tensor | None = None, batch_dim: int | None = None) -> Any:
            if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                self.STD_DELTA = max(ModelSpeedup.STD_DELTA * output.abs().max().item(), 1e-30)
            return super().direct_calc_mask(output, output_mask, batch_dim)

    class SizeMaskUpdater(NoMaskUpdater):
        """NNI's own frees a tensor whose size was asked for under a name that it has not got."""

        def direct_update_process(self, model_speedup: Any, node: Any) -> None:
            info = model_speedup.node_infos[node]
            info.output_masks = tree_map(lambda _: None, info.output_origin)
            for done in model_speedup.user_to_last_uses.get(node, []):
                model_speedup.node_infos[done].output_randomize = None

    class SelectionMaskUpdater(DefaultMaskUpdater):
        """Channels that a slice does not pick are not removed for that: the slice would then pick others."""

        def detect(self, model_speedup: Any, node: Any) -> bool:
            name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
            source = node.all_input_nodes[0] if node.all_input_nodes else None
            return name in _SELECTIONS and isinstance(model_speedup.node_infos[source].output_origin, Tensor)

        def indirect_update_process(self, model_speedup: Any, node: Any) -> None:
            super().indirect_update_process(model_speedup, node)
            source = node.all_input_nodes[0]
            whole = torch.zeros_like(model_speedup.node_infos[source].output_origin)
            whole.grad = torch.ones_like(whole)
            model_speedup.indirect_pass_grad(source, whole)

    speedup = RelativeModelSpeedup(
        model,
        copied(arguments),
        masks,
        customized_mask_updaters=[
            NoChangeMaskUpdater((nn.LocalResponseNorm, nn.Dropout, nn.Dropout2d, nn.Identity)),
            SizeMaskUpdater(),
            SelectionMaskUpdater(),
        ],
        customized_replacers=[
            DefaultReplacer(
                {
                    "LocalResponseNorm": _replace_response_norm,
                    **dict.fromkeys(("Identity", "AdaptiveMaxPool2d", "Softmax2d", "Dropout1d"), _keep),
                }
            )
        ],
        graph_module=graph_module,
        logger=logging.getLogger(f"{__name__}.nni"),
    )
    # The last one is NNI's own, which is also asked for what the others have replaced.
    own = speedup.replacers[-1]
    own.replace_module_func_dict = {**own.replace_module_func_dict, "LayerNorm": _replace_layer_norm}
    return speedup


def _replace_response_norm(module: nn.LocalResponseNorm, masks: Any) -> nn.Module:
    kept = _kept(masks[0][0], 1)
    if len(kept) == masks[0][0].shape[1]:
        return module
    return PrunedLocalResponseNorm.of(module, kept)


def _replace_layer_norm(module: nn.LayerNorm, masks: Any) -> nn.Module:
    # NNI's own stumbles over a normalisation of several dimensions, even where nothing in front of it is removed.
    if all(bool(mask.all()) for mask in masks[0] if isinstance(mask, Tensor)):
        return module
    from nni.compression.speedup.replacement import replace_layernorm

    return cast(nn.Module, replace_layernorm(module, masks))


def _keep(module: nn.Module, masks: Any) -> nn.Module:
    return module


@contextlib.contextmanager
def _quiet_nni() -> Iterator[None]:
    """NNI prints, and logs each node at level INFO; neither is for the user here."""
    names = ["nni.compression.speedup", "Shape Dependency", f"{__name__}.nni"]
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _drop_auxiliary_heads(model: nn.Module, called: Counter[str]) -> list[str]:
    """Heads like GoogLeNet's read channels that go, but the evaluation graph does not show them."""
    if not getattr(model, "aux_logits", False):
        return []
    unused = [
        name
        for name, child in model.named_children()
        if next(child.parameters(), None) is not None
        and not any(target == name or target.startswith(f"{name}.") for target in called)
    ]
    drop_modules(model, unused)
    return unused


def _fold_constants(
    masked: nn.Module, candidate: nn.Module, speedup: Any, called: Counter[str], arguments: tuple[Any, ...]
) -> list[str]:
    """Add to the biases what the removed input channels contributed as constants."""
    readers = {
        str(node.target): node
        for node in speedup.graph_module.graph.nodes
        if node.op == "call_module"
        and isinstance(masked.get_submodule(node.target), (nn.Linear, *CONVOLUTIONS))
        and called[str(node.target)] == 1
    }
    generator = torch.Generator().manual_seed(1)
    with InputRanges(masked, list(readers)) as ranges, torch.no_grad():
        for flat in (False, True):
            masked(*_random_like(arguments, generator, flat))
    folded, unfoldable = [], []
    for name, node in readers.items():
        module, smaller = masked.get_submodule(name), cast(Any, candidate.get_submodule(name))
        dim = -1 if isinstance(module, nn.Linear) else 1
        in_mask, out_mask = (speedup.node_infos[n].output_masks for n in (node.args[0], node))
        if not isinstance(in_mask, Tensor) or not isinstance(out_mask, Tensor):
            continue
        removed = _removed(in_mask, dim)
        if not len(removed):
            continue
        values = ranges.constants(name, removed)
        if values is None or not bool(values.any()):
            continue  # a channel that varies must not have been removed: the comparison will refuse that
        bias = bias_of_constants(module, removed, values)
        if bias is None:
            unfoldable.append(name)
            continue
        bias = bias[_kept(out_mask, dim)].detach()
        if smaller.bias is None:
            smaller.bias = nn.Parameter(bias)
        else:
            smaller.bias.data += bias
        folded.append(name)
    notes = []
    if folded:
        notes.append(f"constants of removed channels are folded into the biases of {len(folded)} layers")
    if unfoldable:
        notes.append(
            f"removed channels are not zero at the padded {', '.join(unfoldable[:3])}: a bias or BatchNorm before it "
            f"is not pruned with its layer"
        )
    return notes


def _kept_channels(speedup: Any) -> dict[str, KeptChannels]:
    kept = {}
    for node in speedup.graph_module.graph.nodes:
        if node.op != "call_module" or len(node.all_input_nodes) != 1:
            continue
        masks = [speedup.node_infos[each].output_masks for each in (node.all_input_nodes[0], node)]
        dim = -1 if isinstance(speedup.graph_module.get_submodule(node.target), nn.Linear) else 1
        if all(isinstance(mask, Tensor) and mask.dim() > 1 for mask in masks):
            kept[str(node.target)] = KeptChannels(*(_kept(mask, dim) for mask in masks))
    return kept


def _kept(mask: Tensor, dim: int) -> Tensor:
    return mask.detach().cpu().movedim(dim, 0).flatten(1).sum(1).nonzero().flatten()


def _removed(mask: Tensor, dim: int) -> Tensor:
    return (mask.detach().cpu().movedim(dim, 0).flatten(1).sum(1) == 0).nonzero().flatten()


# ---- around it


def _dressed_like(candidate: nn.Module, original: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The new network with the original's device, precision, training flags and trainable parameters."""
    candidate = candidate.to(device=device, dtype=dtype)
    trainable = {name: parameter.requires_grad for name, parameter in original.named_parameters()}
    for name, parameter in candidate.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(trainable.get(name, True))
    modes = {name: module.training for name, module in original.named_modules()}
    for name, module in candidate.named_modules():
        module.training = modes.get(name, original.training)
    return candidate


def _widths(before: nn.Module, after: nn.Module) -> list[LayerWidths]:
    rows = []
    smaller = dict(after.named_modules())
    for name, module in before.named_modules():
        other = smaller.get(name)
        if other is None:
            continue
        if isinstance(module, CONVOLUTIONS):
            sizes = [(each.in_channels, each.out_channels) for each in (module, other)]
        elif isinstance(module, nn.Linear):
            sizes = [(each.in_features, each.out_features) for each in (module, other)]
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            sizes = [(each.num_features, each.num_features) for each in (module, other)]
        else:
            continue
        (inputs_before, outputs_before), (inputs_after, outputs_after) = sizes
        kind = type(module).__name__
        rows.append(LayerWidths(name, kind, inputs_before, inputs_after, outputs_before, outputs_after))
    return rows


def _random_like(arguments: tuple[Any, ...], generator: torch.Generator, flat: bool) -> tuple[Any, ...]:
    """A batch of other inputs: normal values, or uniform ones between 0 and 1; integers are drawn from the dummy's."""

    def draw(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        shape = (_CHECK_BATCH_SIZE, *value.shape[1:])
        if not value.is_floating_point():
            return value.flatten()[torch.randint(value.numel(), shape, generator=generator)]
        return (torch.rand if flat else torch.randn)(shape, generator=generator)

    return tree_map(draw, arguments)


def _to_cpu(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()


def _colon(notes: list[str]) -> str:
    return f" ({'; '.join(notes)})" if notes else ""
