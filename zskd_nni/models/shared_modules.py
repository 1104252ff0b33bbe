"""Layers that a network has at several paths, and which of these paths ``forward`` calls."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn

from zskd_nni.models.hooks import hooked
from zskd_nni.runtime.errors import UserError


def set_module(network: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the one at ``path``."""
    parent, _, name = path.rpartition(".")
    network.get_submodule(parent).register_module(name, module)


def shared_layers(network: nn.Module) -> dict[str, list[str]]:
    """The layers with parameters that stand in several places: first path -> the other paths.

    The first path is that of ``network.named_modules()``. A container that stands in several places counts as one place
    for the layers in it.
    """
    paths: dict[nn.Module, list[str]] = {module: [path] for path, module in network.named_modules()}
    for parent, container in network.named_modules():
        for name, module in container._modules.items():
            path = f"{parent}.{name}" if parent else name
            if module is not None and path not in paths[module]:
                paths[module].append(path)
    return {first: others for module, (first, *others) in paths.items() if others and _has_parameters(module)}


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def replace_everywhere(network: nn.Module, shared: dict[str, list[str]]) -> None:
    """Put the layer at each first path in the other places too.

    Args:
        network: changed in place.
        shared: :func:`shared_layers` of the network before layers were replaced at their first paths.
    """
    for first, others in shared.items():
        for path in others:
            set_module(network, path, network.get_submodule(first))


@torch.no_grad()
def called_paths(network: nn.Module, images: Tensor) -> set[str]:
    """The paths by which ``forward`` calls layers with parameters in ``eval()`` mode.

    Args:
        network: left as it is.
        images: ``(N, C, H, W)``, normalised.
    """
    probe = copy.deepcopy(network).eval()
    for first, others in shared_layers(probe).items():
        for path in (first, *others):
            twin = copy.copy(probe.get_submodule(path))  # another module with the same parameters
            twin._forward_pre_hooks = OrderedDict(twin._forward_pre_hooks)
            set_module(probe, path, twin)
    called: set[str] = set()
    paths = [path for path, module in probe.named_modules() if _has_parameters(module)]
    with hooked(probe, paths, before=lambda path, _: called.add(path)):
        probe(images.clone())
    return called


def check_not_wrapped(network: nn.Module) -> None:
    """Refuse a network, or a part of it, inside one of PyTorch's wrappers, which hide its layers.

    Raises:
        UserError: says what to pass instead.

    Example:
        >>> check_not_wrapped(nn.DataParallel(nn.Linear(2, 2)))
        Traceback (most recent call last):
        zskd_nni.runtime.errors.UserError: the network is wrapped in DataParallel, which hides its layers;
            pass model.module
    """
    for path, module in network.named_modules():
        for parent in type(module).__mro__:
            inner = _WRAPPERS.get(parent.__name__) if parent.__module__.startswith("torch.") else None
            if inner is not None:
                name = parent.__name__
                if not path:
                    raise UserError(f"the network is wrapped in {name}, which hides its layers; pass model.{inner}")
                raise UserError(
                    f"{path!r} of the network is wrapped in {name}, which hides its layers; unwrap it first: "
                    f"model.{path} = model.{path}.{inner}"
                )


# PyTorch's wrappers by class name, and where the network is in them.
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "AveragedModel": "module",
    "OptimizedModule": "_orig_mod",
}


def check_compressible(network: nn.Module, images: Tensor) -> None:
    """Refuse layers that NNI cannot compress.

    NNI needs weights that are stored parameters, and layers that ``forward`` calls by their first path alone.

    Args:
        network: left as it is.
        images: ``(N, C, H, W)``, normalised.

    Raises:
        UserError: names the layer.
    """
    check_not_wrapped(network)
    for path, module in network.named_modules():
        if "weight_orig" in module._parameters and "weight" not in module._parameters:
            raise UserError(
                f"the weight of {path!r} is computed anew at every call, as by torch.nn.utils.spectral_norm, and NNI "
                "compresses stored weights; remove that first (torch.nn.utils.remove_spectral_norm)"
            )
    shared = shared_layers(network)
    called = called_paths(network, images) if shared else set()
    for first, others in shared.items():
        for path in called.intersection(others):
            raise UserError(
                f"{first!r} and {path!r} are one layer of {type(network).__name__}, and forward calls it as {path!r}; "
                f"NNI would compress {first!r} alone; give the layer one name"
            )
