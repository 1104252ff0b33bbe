"""NNI's ``ModelSpeedup``, made to work with the layers and tensors on which it fails by itself."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from zskd_nni.compression.fx_trace import copied
from zskd_nni.compression.nni_messages import quiet
from zskd_nni.compression.pruning.masks import kept_channels
from zskd_nni.models.local_response_norm import PrunedLocalResponseNorm
from zskd_nni.runtime.gradients import with_gradients

# Layers without a size of their own that NNI does not know.
_UNCHANGED = (
    "Identity", "AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AdaptiveAvgPool1d", "AvgPool1d", "MaxPool1d", "LPPool1d",
    "LPPool2d", "Softmax2d", "Dropout1d", "AlphaDropout", "FeatureAlphaDropout", "Hardshrink", "Softsign", "Threshold",
    "Unflatten",
)  # fmt: skip


@with_gradients()
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
        from nni.compression.speedup.mask_updater import NoChangeMaskUpdater
        from nni.compression.speedup.replacer import DefaultReplacer

        from zskd_nni.compression.pruning import mask_updaters

    unchanged = dict.fromkeys(_UNCHANGED, lambda module, _: module)
    speedup = mask_updaters.RobustModelSpeedup(
        model,
        copied(arguments),
        masks,
        customized_mask_updaters=[
            mask_updaters.ApartMaskUpdater(),
            mask_updaters.ConstantMaskUpdater(),
            NoChangeMaskUpdater((nn.LocalResponseNorm, nn.Dropout, nn.Dropout2d, nn.Identity)),
            mask_updaters.SizeMaskUpdater(),
            mask_updaters.SelectionMaskUpdater(),
            mask_updaters.BesideConstantsMaskUpdater(),
            mask_updaters.LayerMaskUpdater(),
            mask_updaters.FunctionMaskUpdater(),
        ],
        customized_replacers=[DefaultReplacer({"LocalResponseNorm": _replace_response_norm, **unchanged})],
        graph_module=graph_module,
        logger=logging.getLogger(__name__),
    )
    # The last replacer is NNI's own, which is also asked for the layers that the others have replaced.
    own = speedup.replacers[-1]
    own.replace_module_func_dict = {
        name: _unless_untouched(replace) for name, replace in own.replace_module_func_dict.items()
    }
    return speedup


def _replace_response_norm(module: nn.LocalResponseNorm, masks: Any) -> nn.Module:
    kept = kept_channels(masks[0][0], 1)
    return module if len(kept) == masks[0][0].shape[1] else PrunedLocalResponseNorm.of(module, kept)


def _unless_untouched(replace: Callable[..., Any]) -> Callable[..., Any]:
    """A replacement that leaves a layer alone where nothing is removed.

    Some of NNI's fail then: for a normalisation over several dimensions, or a weight that is computed at every call.
    """

    def replaced(module: nn.Module, masks: Any) -> Any:
        removed = any(isinstance(mask, Tensor) and not bool(mask.all()) for mask in tree_leaves(masks))
        if not removed:
            return module
        smaller = replace(module, masks)
        for name, child in module._modules.items():  # of a class of the user's, for which the layer stands
            smaller._modules.setdefault(name, child)
        return smaller

    return replaced
