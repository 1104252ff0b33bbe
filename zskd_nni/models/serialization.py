"""A network on disk: weights as safetensors, and a JSON description from which it is built again.

The description names the factory and its arguments, and lists every layer whose sizes differ from what the factory
makes, and every module that is gone: a shrunken network is the factory's network with those layers put in their place
and without those modules. No pruning code is needed to load it, and nothing in either file can run code beyond the
named factory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zskd_nni.models.build import build_network, load_into
from zskd_nni.models.local_response_norm import PrunedLocalResponseNorm
from zskd_nni.models.shared_modules import same_under_all_names, second_names
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json, sha256_of_file, write_json
from zskd_nni.runtime.tensors import load_tensors, save_tensors

FORMAT = "zskd_nni network 1"

# What says how large a layer is, by type; all of it are constructor arguments.
_LAYERS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    kind.__name__: (kind, arguments)
    for kind, arguments in (
        (nn.Linear, ("in_features", "out_features")),
        *(
            (
                kind,
                (
                    "in_channels",
                    "out_channels",
                    "kernel_size",
                    "stride",
                    "padding",
                    "dilation",
                    "groups",
                    "padding_mode",
                ),
            )
            for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        ),
        *(
            (kind, ("num_features", "eps", "momentum", "affine", "track_running_stats"))
            for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        ),
        *(
            (kind, ("num_features", "eps", "momentum", "affine", "track_running_stats"))
            for kind in (nn.InstanceNorm1d, nn.InstanceNorm2d)
        ),
        (
            nn.ConvTranspose2d,
            (
                "in_channels",
                "out_channels",
                "kernel_size",
                "stride",
                "padding",
                "output_padding",
                "groups",
                "dilation",
                "padding_mode",
            ),
        ),
        (nn.LayerNorm, ("normalized_shape", "eps", "elementwise_affine")),
        (nn.GroupNorm, ("num_groups", "num_channels", "eps", "affine")),
        (nn.PReLU, ("num_parameters",)),
        (PrunedLocalResponseNorm, ("kept", "size", "alpha", "beta", "k")),
    )
}


def drop_modules(network: nn.Module, paths: Iterable[str]) -> None:
    """Set submodules to None, as a forward that asks for them expects: heads that only run in training.

    torchvision's networks with such heads have a flag ``aux_logits`` beside them, which promises their answers.
    """
    for path in paths:
        parent, _, child = path.rpartition(".")
        owner = network.get_submodule(parent)
        setattr(owner, child, None)
        if getattr(owner, "aux_logits", False):
            owner.aux_logits = False  # type: ignore[assignment]


def describe_layer(layer: nn.Module) -> dict[str, Any] | None:
    """Type and constructor arguments of a layer whose size can change, or None for any other module."""
    name = type(layer).__name__
    if name not in _LAYERS or type(layer) is not _LAYERS[name][0]:
        return None
    description: dict[str, Any] = {"type": name}
    for argument in _LAYERS[name][1]:
        value = getattr(layer, argument)
        description[argument] = list(value) if isinstance(value, tuple) else value
    if hasattr(layer, "bias") and not name.startswith(("Batch", "Instance", "Group")):
        description["bias"] = layer.bias is not None
    return description


def _build_layer(description: dict[str, Any], path: str, source: Path) -> nn.Module:
    arguments = dict(description)
    kind = arguments.pop("type", None)
    if not isinstance(kind, str) or kind not in _LAYERS or not set(arguments) <= {*_LAYERS[kind][1], "bias"}:
        raise UserError(f"{source}: the layer {path!r} is described as {kind!r}, which is not a layer known here.")
    try:
        return _LAYERS[kind][0](**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()})
    except Exception as error:  # the arguments may be anything
        raise UserError(f"{source}: the layer {path!r} cannot be built as described ({error}).") from error


def _check_size(description: dict[str, Any], path: str, tensors: dict[str, Tensor], source: Path) -> None:
    """Before memory is taken: a layer is as large as its weights in the file, or it is not made."""
    with torch.device("meta"):
        for name, expected in _build_layer(description, path, source).state_dict().items():
            there = tensors.get(f"{path}.{name}")
            if there is None or there.shape != expected.shape:
                shape = "not there" if there is None else list(there.shape)
                raise UserError(
                    f"{source}: the layer {path!r} is described with a {name} of {list(expected.shape)}, in the "
                    f"weights it is {shape}."
                )


def save_network(
    network: nn.Module,
    reference: str,
    arguments: dict[str, Any],
    weights: Path,
    description: Path,
    base: Path | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write ``weights`` (safetensors) and ``description`` (JSON).

    Args:
        network: in any state; made from the factory, layers replaced or modules set to None at most.
        reference: how :func:`zskd_nni.models.build.build_network` names the factory.
        arguments: of the factory.
        weights: file to write.
        description: file to write; it names the weights file beside it.
        base: the folder that a relative ``file.py`` is meant from.
        extra: further JSON-able content (input, classes, provenance).
    """
    original = dict(build_network(reference, arguments, base).named_modules())
    changed = {}
    for path, layer in network.named_modules():
        described = describe_layer(layer)
        if described is not None and (path not in original or describe_layer(original[path]) != described):
            changed[path] = described
    dropped: list[str] = []
    for path in original:
        parent, _, child = path.rpartition(".")
        if path and not any(path.startswith(f"{gone}.") for gone in dropped):
            owner = network.get_submodule(parent)
            if owner._modules.get(child, owner) is None:
                dropped.append(path)
    save_tensors(weights, network.state_dict())
    content = {
        "format": FORMAT,
        "network": _seen_from(description.parent, reference, base),
        **_found_from(description.parent, reference, base),
        "arguments": arguments,
        "layers": changed,
        **({"dropped": dropped} if dropped else {}),
        "weights": weights.name,
        "sha256": sha256_of_file(weights),
        **(extra or {}),
    }
    write_json(description, content)


def _seen_from(folder: Path, reference: str, base: Path | None) -> str:
    # A relative file.py is meant from the recipe's folder; whoever loads the description knows only its own.
    source, _, name = reference.rpartition(":")
    if not source.endswith(".py") or Path(source).is_absolute():
        return reference
    return f"{os.path.relpath((base or Path.cwd()) / source, folder)}:{name}"


def _found_from(folder: Path, reference: str, base: Path | None) -> dict[str, str]:
    """Where a module beside the recipe is looked for, as seen from the description."""
    source = reference.rpartition(":")[0]
    if base is None or source.endswith(".py") or source in ("zoo", "torchvision"):
        return {}
    return {"base": os.path.relpath(base, folder)}


def load_network(description: str | Path) -> nn.Module:
    """Build the network that a JSON description describes and load its weights; in ``eval()`` mode.

    Raises:
        UserError: a file is missing, damaged or not of this kind, or they do not belong together.
    """
    description = Path(description)
    content = read_json(description)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{description} does not describe a network (its format is not {FORMAT!r}).")
    for key, kind in (("network", str), ("arguments", dict), ("layers", dict)):
        if not isinstance(content.get(key), kind):
            raise UserError(f"{description}: {key!r} must be a {kind.__name__}, not {content.get(key)!r}.")
    name = content.get("weights")
    if not isinstance(name, str) or Path(name).name != name:
        raise UserError(f"{description}: 'weights' must be the name of a file beside it, not {name!r}.")
    weights = description.parent / name
    tensors, _ = load_tensors(weights)
    if sha256_of_file(weights) != content.get("sha256"):
        raise UserError(f"{weights} is not the file that {description.name} describes: its checksum differs.")
    base = content.get("base", "")
    if not isinstance(base, str):
        raise UserError(f"{description}: 'base' must be the name of a folder, not {base!r}.")
    network = build_network(content["network"], content.get("arguments"), description.parent / base)
    dropped = content.get("dropped", [])
    there = {path for path, _ in network.named_modules()} - {""}
    if not isinstance(dropped, list) or not all(isinstance(path, str) for path in dropped) or set(dropped) - there:
        raise UserError(f"{description}: 'dropped' must list modules of {content['network']}, not {dropped!r}.")
    drop_modules(network, dropped)
    names = second_names(network)
    for path, described in content.get("layers", {}).items():
        parent, _, child = path.rpartition(".")
        try:
            owner = network.get_submodule(parent)
            owner.get_submodule(child)
        except AttributeError as error:
            raise UserError(f"{description}: {content['network']} has no layer {path!r}.") from error
        if not child or not isinstance(described, dict):
            raise UserError(f"{description}: the layer {path!r} is not described.")
        _check_size(described, path, tensors, description)
        owner.register_module(child, _build_layer(described, path, description))
    same_under_all_names(network, names)
    load_into(network, tensors, str(weights))
    return network.eval()
