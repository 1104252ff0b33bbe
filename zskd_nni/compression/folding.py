"""Which modules of a network act as one under quantization: a convolution, its BatchNorm, its ReLU."""

from __future__ import annotations

from collections import Counter
from typing import Any

from nni.compression.base.config import select_modules_by_config
from nni.compression.base.setting import canonicalize_settings
from torch import nn
from torch.fx import Node

from zskd_nni.compression.graph import trace

# What NNI knows to fold.
_FIRST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}


def targets_of(module: nn.Module, configs: list[dict[str, Any]]) -> set[str]:
    """The quantized targets of a module that several entries of a config list may select, in NNI's names for them."""
    return {target for config in configs for target in canonicalize_settings(module, config, "quantization")}


def batch_norm_folds(model: nn.Module, config_list: list[dict[str, Any]], dummy_input: Any) -> list[tuple[str, ...]]:
    """The folds of a quantization config, read from the network's graph.

    A convolution or linear layer folds with the batch normalisation that alone reads it, and that normalisation with
    the ReLU that alone reads it, where the config quantizes the layer's weight and, for the ReLU, names its output. A
    module that ``forward`` calls more than once folds with nothing.

    Args:
        model: any module that torch.fx can trace.
        config_list: NNI's quantization config; layers that it does not select, or whose folds it names itself, are
            left out.
        dummy_input: one input.
    """
    configs: dict[str, list[dict[str, Any]]] = {}
    named: set[str] = set()
    for config in config_list:
        named.update(names[0] for names in config.get("fuse_names", ()))
        selected, public, _ = select_modules_by_config(model, config)
        for name in selected:
            configs.setdefault(name, []).append(public)
    graph = trace(model, dummy_input)
    calls = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")

    def sole_reader(node: Node, kind: type[nn.Module]) -> Node | None:
        readers = list(node.users)
        if len(readers) != 1 or readers[0].op != "call_module" or calls[readers[0].target] != 1:
            return None
        return readers[0] if type(graph.get_submodule(str(readers[0].target))) is kind else None

    folds = []
    for node in graph.graph.nodes:
        if node.op != "call_module" or calls[node.target] != 1 or node.target in named or node.target not in configs:
            continue
        module, of_module = graph.get_submodule(str(node.target)), configs[node.target]
        follower = _FIRST.get(type(module))
        if follower is None or "weight" not in targets_of(module, of_module):
            continue
        norm = sole_reader(node, follower)
        if norm is None:
            continue
        fold = [str(node.target), str(norm.target)]
        # NNI folds a ReLU only where the entry that holds the fold names the output.
        outputs = any("_output_" in config.get("target_names", ()) for config in of_module)
        relu = sole_reader(norm, nn.ReLU) if outputs else None
        folds.append((*fold, str(relu.target)) if relu is not None else tuple(fold))
    return folds
