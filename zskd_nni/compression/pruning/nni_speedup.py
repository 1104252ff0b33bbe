"""NNI's ``ModelSpeedup``, made to work with the layers and tensors on which it fails by itself."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from zskd_nni.compression.fx_trace import copied
from zskd_nni.compression.nni_messages import quiet
from zskd_nni.compression.pruning.masks import kept_channels
from zskd_nni.models.local_response_norm import PrunedLocalResponseNorm

_SELECTIONS = {"getitem", "chunk", "split", "narrow", "unbind", "select", "index_select"}


def run_speedup(
    model: nn.Module, graph_module: GraphModule, masks: dict[str, dict[str, Tensor]], arguments: tuple[Any, ...]
) -> Any:
    """Replace the layers of ``model`` by smaller ones, with NNI's output, logging and random state kept away.

    Args:
        model: on the CPU; changed in place.
        graph_module: the traced model.
        masks: of the modules in the graph; changed in place.
        arguments: the positional arguments of its forward.

    Returns:
        NNI's ``ModelSpeedup`` after its work; it knows the masks of every node.
    """
    printed = contextlib.redirect_stdout(io.StringIO())
    # "Shape Dependency" is NNI's as well; ours is given to ModelSpeedup.
    with printed, quiet("nni.compression.speedup", "Shape Dependency", __name__), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        speedup = _model_speedup(model, graph_module, masks, arguments)
        speedup.speedup_model()
    return speedup


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
        """NNI's own frees a tensor after a question about its size, by an attribute that does not exist."""

        def direct_update_process(self, model_speedup: Any, node: Any) -> None:
            info = model_speedup.node_infos[node]
            info.output_masks = tree_map(lambda _: None, info.output_origin)
            for done in model_speedup.user_to_last_uses.get(node, []):
                model_speedup.node_infos[done].output_randomize = None

    class SelectionMaskUpdater(DefaultMaskUpdater):
        """Keeps the channels that a slice does not pick: without them the slice would pick others."""

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

    unchanged = dict.fromkeys(("Identity", "AdaptiveMaxPool2d", "Softmax2d", "Dropout1d"), lambda module, _: module)
    speedup = RelativeModelSpeedup(
        model,
        copied(arguments),
        masks,
        customized_mask_updaters=[
            NoChangeMaskUpdater((nn.LocalResponseNorm, nn.Dropout, nn.Dropout2d, nn.Identity)),
            SizeMaskUpdater(),
            SelectionMaskUpdater(),
        ],
        customized_replacers=[DefaultReplacer({"LocalResponseNorm": _replace_response_norm, **unchanged})],
        graph_module=graph_module,
        logger=logging.getLogger(__name__),
    )
    # The last replacer is NNI's own, which is also asked for the layers that the others have replaced.
    own = speedup.replacers[-1]
    own.replace_module_func_dict = {**own.replace_module_func_dict, "LayerNorm": _replace_layer_norm}
    return speedup


def _replace_response_norm(module: nn.LocalResponseNorm, masks: Any) -> nn.Module:
    kept = kept_channels(masks[0][0], 1)
    return module if len(kept) == masks[0][0].shape[1] else PrunedLocalResponseNorm.of(module, kept)


def _replace_layer_norm(module: nn.LayerNorm, masks: Any) -> Any:
    # NNI's own fails for a normalisation over several dimensions, even if nothing in front of it is removed.
    if all(bool(mask.all()) for mask in masks[0] if isinstance(mask, Tensor)):
        return module
    from nni.compression.speedup.replacement import replace_layernorm

    return replace_layernorm(module, masks)
