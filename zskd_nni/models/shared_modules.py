"""Layers that a network knows by several names, and which names its forward calls."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from zskd_nni.runtime.errors import UserError


def set_module(network: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the one at ``path``."""
    parent, _, name = path.rpartition(".")
    network.get_submodule(parent).register_module(name, module)


def second_names(network: nn.Module) -> dict[str, list[str]]:
    """The layers with parameters that stand in several places: first path -> the others.

    The first is that of ``network.named_modules()``. A container that stands in several places is one place for what it
    holds.
    """
    paths: dict[nn.Module, list[str]] = {module: [path] for path, module in network.named_modules()}
    for parent, container in network.named_modules():
        for name, module in container._modules.items():
            path = f"{parent}.{name}" if parent else name
            if module is not None and path not in paths[module]:
                paths[module].append(path)
    return {
        first: others
        for module, (first, *others) in paths.items()
        if others and next(module.parameters(recurse=False), None) is not None
    }


def same_under_all_names(network: nn.Module, names: dict[str, list[str]]) -> None:
    """What has replaced a layer at its first place is put in its other places too.

    Args:
        network: changed in place.
        names: :func:`second_names` of the network before layers were replaced.
    """
    for first, others in names.items():
        module = network.get_submodule(first)
        for path in others:
            set_module(network, path, module)


@torch.no_grad()
def called_names(network: nn.Module, images: Tensor) -> set[str]:
    """The places of layers with parameters that ``forward`` calls in ``eval()``, by any of their names.

    Args:
        network: left as it is.
        images: ``(N, C, H, W)``, normalised.
    """
    probe = copy.deepcopy(network).eval()
    called: set[str] = set()

    def listen(module: nn.Module, path: str) -> None:
        def note(*_: Any) -> None:
            called.add(path)

        module.register_forward_pre_hook(note)

    names = second_names(probe)
    for path, module in list(probe.named_modules()):
        if path not in names and next(module.parameters(recurse=False), None) is not None:
            listen(module, path)
    for first, others in names.items():
        for path in (first, *others):
            twin = copy.copy(probe.get_submodule(path))  # another module with the same parameters
            twin._forward_pre_hooks = OrderedDict()
            set_module(probe, path, twin)
            listen(twin, path)
    probe(images.clone())
    return called


def check_layers(network: nn.Module, images: Tensor) -> None:
    """Whether NNI can compress the layers: by weights that are parameters, and in their first place alone.

    Args:
        network: left as it is.
        images: ``(N, C, H, W)``, normalised.

    Raises:
        UserError: names the layer.
    """
    for path, module in network.named_modules():
        if "weight_orig" in module._parameters and "weight" not in module._parameters:
            raise UserError(
                f"the weight of {path!r} is computed anew at every call, as by torch.nn.utils.spectral_norm, and NNI "
                "compresses weights that are stored; take that away first (torch.nn.utils.remove_spectral_norm)"
            )
    names = second_names(network)
    if not names:
        return
    called = called_names(network, images)
    for first, others in names.items():
        for path in others:
            if path in called:
                raise UserError(
                    f"{first!r} and {path!r} are one layer of {type(network).__name__}, and forward calls it as "
                    f"{path!r}; NNI would compress {first!r} alone; give the layer one name"
                )
