"""Which modules of a network act as one under quantization: a convolution, its BatchNorm, its ReLU."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from nni.compression.base.config import select_modules_by_config
from nni.compression.base.setting import canonicalize_settings
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from zskd_nni.compression.fx_trace import trace
from zskd_nni.models.hooks import hooked
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.shared_modules import set_module
from zskd_nni.models.teacher import first_tensor
from zskd_nni.runtime.errors import UserError

# The normalisation that NNI can fold into each layer.
_FOLDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}
# A right fold differs by rounding, a wrong one by hundredths of the largest logit and more.
_LARGEST_DIFFERENCE = 1e-3


def batch_norm_folds(model: nn.Module, config_list: list[dict[str, Any]], dummy_input: Any) -> list[tuple[str, ...]]:
    """The folds of a quantization config, read from the network's graph.

    A convolution or linear layer folds with a batch normalisation that is its only reader, if the config quantizes the
    layer's weight. That normalisation folds with a ReLU that is its only reader, if the config names the layer's
    output. A module that ``forward`` calls more than once folds with nothing.

    Args:
        model: any module that torch.fx can trace.
        config_list: NNI's quantization config. Layers that it does not select, or whose folds it names, are left out.
        dummy_input: one input.
    """
    configs: dict[str, list[dict[str, Any]]] = {}
    named = {names[0] for config in config_list for names in config.get("fuse_names", ())}
    for config in config_list:
        selected, public, _ = select_modules_by_config(model, config)
        for name in selected:
            configs.setdefault(name, []).append(public)
    graph = trace(model, dummy_input)
    calls = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")

    def called_once(node: Node) -> bool:
        return node.op == "call_module" and calls[node.target] == 1

    def only_reader(node: Node, kind: type[nn.Module] | None) -> Node | None:
        called = [reader for reader in node.users if called_once(reader)]
        readers = [reader for reader in called if type(model.get_submodule(str(reader.target))) is kind]
        return readers[0] if len(readers) == len(node.users) == 1 else None

    folds = []
    for node in graph.graph.nodes:
        if not called_once(node) or node.target in named or node.target not in configs:
            continue
        module, entries = model.get_submodule(str(node.target)), configs[str(node.target)]
        targets = {target for entry in entries for target in canonicalize_settings(module, entry, "quantization")}
        norm = only_reader(node, _FOLDED.get(type(module))) if "weight" in targets else None
        if norm is None:
            continue
        # NNI folds a ReLU only if the entry with the fold names the output.
        outputs = any("_output_" in entry.get("target_names", ()) for entry in entries)
        relu = only_reader(norm, nn.ReLU) if outputs else None
        folds.append(tuple(str(one.target) for one in (node, norm, relu) if one is not None))
    return folds


@torch.no_grad()
def check_folds(model: nn.Module, folds: Iterable[Sequence[str]], spec: InputSpec) -> None:
    """Check that the network computes the same when the first module of each fold does the work of all.

    NNI removes the other modules of a fold wherever they are called.

    Args:
        model: left as it is.
        folds: by module path.
        spec: its input; compared on noise.

    Raises:
        UserError: a module that does not exist, or a fold that changes the network's logits in ``eval()``.
    """
    folds = [tuple(names) for names in folds]
    if not folds:
        return
    known = dict(model.named_modules())
    for names in folds:
        for name in (name for name in names if name not in known):
            raise UserError(f"fuse_names: the model has no module {name!r}, which the fold {list(names)} names.")
    images = spec.normalise(spec.uniform_noise(4)).to(next(model.parameters()).device)
    expected = first_tensor(copy.deepcopy(model).eval()(images.clone()))
    if _changed(model, folds, images, expected):
        for names in folds:
            if _changed(model, [names], images, expected):
                raise UserError(
                    f"fuse_names: {', '.join(names)} cannot act as one: without {' and '.join(names[1:])} wherever "
                    f"forward calls them, and {names[0]} in their place, the network answers otherwise. A fold is a "
                    "layer, the BatchNorm and the ReLU that alone read it, each called once; leave the fold out, "
                    "fuse_batch_norm finds those that are."
                )


def _changed(model: nn.Module, folds: Iterable[Sequence[str]], images: Tensor, expected: Tensor) -> bool:
    folded = copy.deepcopy(model).eval()
    with_relu = []  # paths of the layers into which a ReLU is folded
    for first, *others in folds:
        module, followers = folded.get_submodule(first), [folded.get_submodule(name) for name in others]
        for name, value in folded_parameters(module, followers, first).items():
            module.register_parameter(name, nn.Parameter(value))
        if any(isinstance(follower, nn.ReLU) for follower in followers):
            with_relu.append(first)
        for name in others:
            set_module(folded, name, nn.Identity())
    with hooked(folded, with_relu, after=lambda _, output: functional.relu(output)):
        actual = first_tensor(folded(images.clone()))
    return not bool(((actual - expected).abs().max() <= _LARGEST_DIFFERENCE * expected.abs().max()).all())


def folded_parameters(module: nn.Module, followers: list[nn.Module], path: str) -> dict[str, Tensor]:
    """The parameters with which ``module`` computes what it and the BatchNorms among ``followers`` compute.

    Raises:
        UserError: a BatchNorm without running statistics.
    """
    parameters = {name: value.detach().clone() for name, value in module.named_parameters(recurse=False)}
    for norm in followers:
        if not isinstance(norm, _BatchNorm):
            continue
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None:
            raise UserError(f"{path} is folded with a BatchNorm that keeps no running statistics.")
        weight, bias = parameters["weight"], parameters.get("bias")
        fused = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, norm.weight, norm.bias)
        parameters["weight"], parameters["bias"] = (value.detach() for value in fused)
    return parameters
