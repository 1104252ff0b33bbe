"""How NNI's ``ModelSpeedup`` follows masks, where its own way fails.

NNI runs the graph on random batches. A channel that is the same for all images counts as removed, and so does one on
which the sum of the outputs does not depend. Importing this module imports NNI's speedup.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from nni.compression.speedup import ModelSpeedup, mask_updater
from nni.compression.speedup.mask_conflict import (
    fix_channel_mask_conflict,
    fix_group_mask_conflict,
    fix_weight_sharing_mask_conflict,
)
from nni.compression.speedup.mask_updater import DefaultMaskUpdater, LeafModuleMaskUpdater, NoMaskUpdater
from nni.compression.speedup.utils import (
    randomize_if_tensor,
    randomize_tensor_inplace,
    torch_float_dtype,
    tree_map_zip,
)
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from zskd_nni.compression.fx_trace import depends_on_input
from zskd_nni.compression.pruning.tried_functions import is_apart

_SELECTIONS = {"getitem", "chunk", "split", "narrow", "unbind", "select", "index_select"}


def drawn(value: Any, batch_dim: int, batch_size: int) -> Any:
    """Random numbers in a tensor's place, as NNI draws them, whatever its first dimension holds.

    NNI keeps a tensor whose first dimension is not the batch, such as one of all patches of all images. A channel that
    a ReLU happens to cut off for the dummy input would then count as removed, although it answers to other images.
    """
    if isinstance(value, Tensor) and value.dtype in torch_float_dtype and value.numel() > 1:
        value = value.clone().detach().contiguous()
        randomize_tensor_inplace(value, 0.1, 8.0)
        return value
    if isinstance(value, Tensor) and value.is_complex():
        return torch.randn_like(value)
    return randomize_if_tensor(value, batch_dim, batch_size)


@contextlib.contextmanager
def all_drawn() -> Iterator[None]:
    """Within the block NNI draws the numbers of all tensors."""
    theirs = mask_updater.randomize_if_tensor
    mask_updater.randomize_if_tensor = drawn
    try:
        yield
    finally:
        mask_updater.randomize_if_tensor = theirs


class RobustModelSpeedup(ModelSpeedup):
    """NNI's own, for tensors of any scale and layout, for constant sums, and for layers with one channel a group."""

    def speedup_model(self) -> Any:
        """As NNI's."""
        with all_drawn():
            return super().speedup_model()

    def direct_calc_mask(self, output: Any, output_mask: Tensor | None = None, batch_dim: int | None = None) -> Any:
        """NNI takes a channel that varies by less than 1e-6 for a constant; here that is relative to its tensor.

        Whole numbers and truth values lose nothing: NNI draws positive values, whose comparison with 0 is constant. Nor
        does what has a first dimension of one, where nothing can vary.
        """
        followed = isinstance(output, Tensor) and self.tensor_propagate_check(output)
        if followed and (len(output) == 1 or not (output.is_floating_point() or output.is_complex())):
            return torch.ones(1, *output.shape[1:]) if output_mask is None else output_mask
        if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
            self.STD_DELTA = max(ModelSpeedup.STD_DELTA * output.abs().max().item(), 1e-30)
        return super().direct_calc_mask(output, output_mask, batch_dim)

    def tensor_propagate_check(self, obj: Tensor) -> bool:
        """As NNI's, but a batch of single numbers is a batch as well."""
        return super().tensor_propagate_check(obj) or (obj.dim() > 1 and obj.shape[0] == obj.numel() == self.batch_size)

    def indirect_backward(self, output: Any, output_mask: Tensor | None) -> None:
        """The gradient of a weighted sum: the plain sum of a softmax, or of a normalisation, is constant."""
        if isinstance(output, Tensor) and self.tensor_propagate_check(output) and output_mask is not None:
            if output.grad_fn is not None:
                weights = output_mask.expand_as(output) * (torch.rand_like(output) + 0.5)
                output.backward(weights, retain_graph=True)  # a layer may have further outputs
        else:
            super().indirect_backward(output, output_mask)

    def fix_mask_conflict(self) -> None:
        """NNI takes any layer with as many outputs as groups for a depthwise one, and stops where it is not.

        Then the masks stay as they are: a completed config has no conflicts, and the result is compared.
        """
        for fix in (fix_group_mask_conflict, fix_channel_mask_conflict, fix_weight_sharing_mask_conflict):
            with contextlib.suppress(AssertionError):
                fix(self.graph_module, self.masks)


class SizeMaskUpdater(NoMaskUpdater):
    """NNI's own frees a tensor after a question about its size, by an attribute that does not exist."""

    def direct_update_process(self, model_speedup: Any, node: Node) -> None:
        """Without a mask."""
        info = model_speedup.node_infos[node]
        info.output_masks = tree_map(lambda _: None, info.output_origin)
        _free(model_speedup, node)


class SelectionMaskUpdater(DefaultMaskUpdater):
    """Keeps the channels that a slice does not pick: without them the slice would pick others."""

    def detect(self, model_speedup: Any, node: Node) -> bool:
        """Whether it is a slice of a tensor."""
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        return name in _SELECTIONS and isinstance(model_speedup.node_infos[source].output_origin, Tensor)

    def indirect_update_process(self, model_speedup: Any, node: Node) -> None:
        """As NNI's, and all of the source is needed."""
        super().indirect_update_process(model_speedup, node)
        source = node.all_input_nodes[0]
        whole = torch.zeros_like(model_speedup.node_infos[source].output_origin)
        whole.grad = torch.ones_like(whole)
        model_speedup.indirect_pass_grad(source, whole)


class ConstantMaskUpdater(DefaultMaskUpdater):
    """A tensor that does not depend on the input, such as a parameter that forward reads, loses nothing.

    Its first dimension need not be a batch, and a channel of equal values need not be empty. It takes part with random
    values in its place, which may be anything else in another network.
    """

    def detect(self, model_speedup: Any, node: Node) -> bool:
        """Whether it is one; layers are NNI's to replace."""
        if node.op not in ("get_attr", "call_function", "call_method") or depends_on_input(node):
            return False
        return any(isinstance(part, Tensor) for part in tree_leaves(model_speedup.node_infos[node].output_origin))

    def direct_update_preprocess(self, model_speedup: Any, node: Node) -> None:
        """Random values for floating-point numbers; integers may be positions."""
        info = model_speedup.node_infos[node]

        def draw(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.dtype in torch_float_dtype
            return torch.rand_like(value) + 0.5 if floating else value

        info.output_origin = tree_map(draw, info.output_origin)
        info.output_randomize = tree_map(lambda value: value, info.output_origin)

    def direct_update_process(self, model_speedup: Any, node: Node) -> None:
        """A mask of ones."""
        info = model_speedup.node_infos[node]

        def ones(value: Any) -> Any:
            followed = isinstance(value, Tensor) and value.dim() and model_speedup.tensor_propagate_check(value)
            return torch.ones(1, *value.shape[1:]) if followed else None

        info.output_masks = tree_map(ones, info.output_origin)
        _free(model_speedup, node)

    def indirect_update_process(self, model_speedup: Any, node: Node) -> None:
        """What it is computed from is constant as well."""


class BesideConstantsMaskUpdater(DefaultMaskUpdater):
    """Functions of constants: NNI asks for gradients of all arguments, and running statistics have none."""

    def detect(self, model_speedup: Any, node: Node) -> bool:
        """Whether a function reads something that does not depend on the input."""
        return node.op in ("call_function", "call_method") and any(map(self.is_constant, node.all_input_nodes))

    @staticmethod
    def is_constant(node: Node) -> bool:
        """Whether an argument is one; a layer's answer to a constant counts as any other."""
        return node.op != "call_module" and not depends_on_input(node)

    def indirect_update_process(self, model_speedup: Any, node: Node) -> None:
        """As NNI's, with gradients of what depends on the input."""
        pass_gradients(model_speedup, node, self.is_constant)


def pass_gradients(model_speedup: Any, node: Node, is_constant: Callable[[Node], bool]) -> None:
    """NNI's way back through a function, from the gradients of its output to those of its arguments.

    A function of steps, such as a rounding or a sign, has no gradient, although its result depends on all that it
    reads: an argument without one is needed as it is.

    Args:
        model_speedup: NNI's.
        node: a function or a method.
        is_constant: whether an argument gets no gradient.
    """
    speedup, infos = model_speedup, model_speedup.node_infos
    info = infos[node]
    info.output_masks = tree_map_zip(speedup.indirect_calc_mask, info.output_grad, info.output_masks)
    given: list[tuple[Node, Any]] = []

    def prepared(mask: Any, value: Any) -> Any:
        value = drawn(value, speedup.batch_dim, speedup.batch_size)
        if not isinstance(value, Tensor):
            return value
        if mask is not None:
            value = (value * mask).type_as(value)
        if speedup.tensor_propagate_check(value) and value.dtype in torch_float_dtype:
            value.requires_grad_(True)
        return value

    def argument(source: Node) -> Any:
        if is_constant(source):
            return tree_map(lambda value: value, infos[source].output_origin)
        value = tree_map_zip(
            lambda part, mask: prepared(mask, part), infos[source].output_origin, infos[source].output_masks
        )
        given.append((source, value))
        return tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, value)

    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), argument)
    output = getattr(speedup, node.op)(node.target, args, kwargs)
    tree_map_zip(speedup.indirect_backward, output, info.output_masks)
    read = any(bool(mask.any()) for mask in tree_leaves(info.output_masks) if isinstance(mask, Tensor))
    for source, value in given:
        for part in tree_leaves(value) if read else ():
            flat = isinstance(part, Tensor) and part.requires_grad and (part.grad is None or not bool(part.grad.any()))
            if flat:
                part.grad = torch.ones_like(part)
        speedup.indirect_pass_grad(source, value)


class ApartMaskUpdater(DefaultMaskUpdater):
    """A function that was found to treat each channel by itself: its masks are those of what it reads.

    NNI draws positive numbers, of which a comparison or a sign is constant.
    """

    def detect(self, model_speedup: Any, node: Node) -> bool:
        """Whether it is one."""
        return is_apart(node)

    def direct_update_process(self, model_speedup: Any, node: Node) -> None:
        """Constant where all that it reads is."""
        infos = model_speedup.node_infos
        masks = [infos[source].output_masks for source in node.all_input_nodes if not _is_number(infos[source])]
        infos[node].output_masks = torch.stack(list(torch.broadcast_tensors(*masks))).amax(0)
        _free(model_speedup, node)

    def indirect_update_process(self, model_speedup: Any, node: Node) -> None:
        """All that is needed of the result is needed of each argument."""
        infos = model_speedup.node_infos
        info = infos[node]
        info.output_masks = model_speedup.indirect_calc_mask(info.output_grad, info.output_masks)
        for source in node.all_input_nodes:
            if not _is_number(infos[source]):
                needed = torch.zeros(infos[source].output_origin.shape)
                needed.grad = info.output_masks.expand_as(needed).clone()
                model_speedup.indirect_pass_grad(source, needed)


def _is_number(info: Any) -> bool:
    return not isinstance(info.output_origin, Tensor) or info.output_origin.numel() == 1


class FunctionMaskUpdater(DefaultMaskUpdater):
    """A function of what loses nothing loses nothing, though it may be constant: the softmax of one number is one."""

    def direct_update_process(self, model_speedup: Any, node: Node) -> None:
        """As NNI's, if anything that the function reads loses something."""
        super().direct_update_process(model_speedup, node)
        infos = model_speedup.node_infos
        read = [mask for source in node.all_input_nodes for mask in tree_leaves(infos[source].output_masks)]
        if all(bool(mask.all()) for mask in read if isinstance(mask, Tensor)):
            infos[node].output_masks = tree_map(
                lambda mask: torch.ones_like(mask) if isinstance(mask, Tensor) else mask, infos[node].output_masks
            )

    def indirect_update_process(self, model_speedup: Any, node: Node) -> None:
        """As NNI's; what has no gradient is needed."""
        if node.op in ("call_function", "call_method"):
            pass_gradients(model_speedup, node, lambda _: False)
        else:
            super().indirect_update_process(model_speedup, node)


class LayerMaskUpdater(LeafModuleMaskUpdater):
    """As NNI's, also for layers whose weights are all equal, or whose output nothing depends on."""

    def direct_update_preprocess(self, model_speedup: Any, node: Node) -> None:
        """Weights that are all equal are drawn too: NNI draws between the smallest and the largest."""
        info = model_speedup.node_infos[node]
        named = info.module.named_parameters()  # a bias may be equal: it is added to what varies
        equal = [name for name, weight in named if weight.dim() > 1 and weight.min() == weight.max()]
        super().direct_update_preprocess(model_speedup, node)
        with torch.no_grad():
            for name in equal:
                weight = info.module.get_parameter(name)
                weight.copy_((torch.rand_like(weight) + 0.5) * info.param_masks[name])

    def indirect_update_process(self, model_speedup: Any, node: Node) -> None:
        """As NNI's; a parameter without a gradient is needed as it is."""
        DefaultMaskUpdater.indirect_update_process(self, model_speedup, node)
        info = model_speedup.node_infos[node]
        for name, weight in info.module.named_parameters():
            if weight.requires_grad and weight.grad is not None and model_speedup.tensor_propagate_check(weight):
                info.param_masks[name][weight.grad == 0] = 0


def _free(model_speedup: Any, node: Node) -> None:
    for done in model_speedup.user_to_last_uses.get(node, []):
        model_speedup.node_infos[done].output_randomize = None
