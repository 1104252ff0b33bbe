"""A network on disk: weights as safetensors, and a JSON description to build it from.

The description names the factory and its arguments. It lists every layer whose sizes differ from what the factory
makes, and every module that was removed. A shrunken network is the factory's network with those layers exchanged and
without those modules, so that loading it needs no pruning code. The source of a user's own factory is copied
beside them. Nothing in the two files can run code but the named factory.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zskd_nni.models.build import build_network, load_into
from zskd_nni.models.local_response_norm import PrunedLocalResponseNorm
from zskd_nni.models.own_source import copy_source
from zskd_nni.models.shared_modules import replace_everywhere, set_module, shared_layers
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json, sha256_of_file, write_json
from zskd_nni.runtime.tensors import load_tensors, save_tensors

FORMAT = "zskd_nni network 1"

# Key of a description -> its type, and what it is in words.
_ENTRIES: dict[str, tuple[type, str]] = {
    "network": (str, "the name of a network"),
    "arguments": (dict, "a mapping"),
    "layers": (dict, "a mapping"),
    "dropped": (list, "a list of modules"),
    "weights": (str, "the name of a file beside it"),
    "base": (str, "the name of a folder"),
}

_CONVOLUTION = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
_NORM = "num_features eps momentum affine track_running_stats"
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d)
# The constructor arguments that fix a layer's size and behaviour. A bias is handled apart.
_ARGUMENTS: dict[type[nn.Module], str] = {
    nn.Linear: "in_features out_features",
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONVOLUTION),
    nn.ConvTranspose2d: f"{_CONVOLUTION} output_padding",
    **dict.fromkeys(_NORMS, _NORM),
    nn.LayerNorm: "normalized_shape eps elementwise_affine",
    nn.GroupNorm: "num_groups num_channels eps affine",
    nn.PReLU: "num_parameters",
    PrunedLocalResponseNorm: "kept size alpha beta k",
}
_KINDS = {kind.__name__: kind for kind in _ARGUMENTS}
# Of a layer of any other class, which the factory makes: the attributes that hold its sizes.
SIZES = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features")
_RESIZED = "resized"


def drop_modules(network: nn.Module, paths: Iterable[str]) -> None:
    """Set submodules to None, such as heads that only run in training; ``forward`` must expect that.

    torchvision's networks with such heads have a flag ``aux_logits`` beside them, which is set to False.
    """
    for path in paths:
        parent, _, child = path.rpartition(".")
        owner = network.get_submodule(parent)
        setattr(owner, child, None)
        if getattr(owner, "aux_logits", False):
            owner.aux_logits = False  # type: ignore[assignment]


def describe_layer(layer: nn.Module) -> dict[str, Any] | None:
    """Type and constructor arguments of a layer whose size can change, or None for any other module."""
    kind = type(layer)
    if kind not in _ARGUMENTS:
        return None
    values = {name: getattr(layer, name) for name in _ARGUMENTS[kind].split()}
    description = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    if hasattr(layer, "bias") and not kind.__name__.startswith(("Batch", "Instance", "Group")):
        description["bias"] = layer.bias is not None
    return {"type": kind.__name__, **description}


def _own_tensors(layer: nn.Module) -> dict[str, Tensor]:
    tensors = {**layer._parameters, **layer._buffers}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _resized_layer(layer: nn.Module, original: nn.Module) -> dict[str, Any] | None:
    """The sizes of a layer of the user's own class, where they are not those that the factory makes."""
    shapes = {name: list(tensor.shape) for name, tensor in _own_tensors(layer).items()}
    if shapes == {name: list(tensor.shape) for name, tensor in _own_tensors(original).items()}:
        return None
    sizes = {name: value for name in SIZES if isinstance(value := getattr(layer, name, None), int)}
    return {"type": _RESIZED, "shapes": shapes, "sizes": sizes}


def _resize(layer: nn.Module, description: dict[str, Any], path: str, tensors: dict[str, Tensor], source: Path) -> None:
    """Give a layer that the factory made the sizes of the description, which must be those of the weights."""
    shapes, sizes = description.get("shapes"), description.get("sizes")
    if not isinstance(shapes, dict) or not isinstance(sizes, dict) or not sizes.keys() <= set(SIZES):
        raise UserError(f"{source}: the layer {path!r} is not described.")
    for name, shape in shapes.items():
        if name not in layer._parameters and name not in layer._buffers:
            raise UserError(f"{source}: the layer {path!r} is described with {name!r}, which is no tensor of its own.")
        found = tensors.get(f"{path}.{name}")
        if found is None or list(found.shape) != shape:
            raise UserError(
                f"{source}: the layer {path!r} is described with a {name} of {shape}, in the weights it is "
                f"{'missing' if found is None else list(found.shape)}."
            )
        empty = torch.empty(shape, dtype=found.dtype)
        if name in layer._buffers:
            layer._buffers[name] = empty
        else:
            layer.register_parameter(name, nn.Parameter(empty))
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{source}: the layer {path!r} is described with {name} {value!r}, which is no size.")
        setattr(layer, name, value)


def _build_layer(description: dict[str, Any], path: str, source: Path) -> nn.Module:
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in description.items()}
    name = arguments.pop("type", None)
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None or not arguments.keys() <= {*_ARGUMENTS[kind].split(), "bias"}:
        raise UserError(f"{source}: the layer {path!r} is described as {name!r}, which is not a layer known here.")
    try:
        return kind(**arguments)
    except Exception as error:  # the arguments may be anything
        raise UserError(f"{source}: the layer {path!r} cannot be built as described ({error}).") from error


def _check_size(description: dict[str, Any], path: str, tensors: dict[str, Tensor], source: Path) -> None:
    """Refuse a layer that is not of the size of its weights in the file, before any memory is allocated for it."""
    with torch.device("meta"):
        expected = _build_layer(description, path, source).state_dict()
    for name, value in expected.items():
        found = tensors.get(f"{path}.{name}")
        if found is None or found.shape != value.shape:
            raise UserError(
                f"{source}: the layer {path!r} is described with a {name} of {list(value.shape)}, in the weights it is "
                f"{'missing' if found is None else list(found.shape)}."
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
        network: in any mode; may differ from what the factory makes by exchanged layers and modules set to None.
        reference: names the factory, as in :func:`zskd_nni.models.build.build_network`.
        arguments: of the factory.
        weights: file to write.
        description: file to write; it names the weights file beside it.
        base: the folder that a relative ``file.py`` is in.
        extra: further content of the description (input, classes, provenance).
    """
    original = dict(build_network(reference, arguments, base).named_modules())
    layers = {}
    for path, layer in network.named_modules():
        described = describe_layer(layer)
        if described is None and path in original:
            described = _resized_layer(layer, original[path])
        if described is not None and (path not in original or describe_layer(original[path]) != described):
            layers[path] = described
    dropped: list[str] = []
    for path in original:
        parent, _, child = path.rpartition(".")
        if path and not path.startswith(tuple(f"{above}." for above in dropped)):
            owner = network.get_submodule(parent)
            if owner._modules.get(child, owner) is None:
                dropped.append(path)
    save_tensors(weights, network.state_dict())
    content = {
        "format": FORMAT,
        **copy_source(reference, base, description),
        "arguments": arguments,
        "layers": layers,
        **({"dropped": dropped} if dropped else {}),
        "weights": weights.name,
        "sha256": sha256_of_file(weights),
        **(extra or {}),
    }
    write_json(description, content)


def load_network(description: str | Path) -> nn.Module:
    """Build the network that a JSON description describes and load its weights; in ``eval()`` mode.

    The network takes images as its layers do: normalised. ``Teacher`` and the exported ONNX files take pixels in the
    value range instead, and normalise them. The description's ``input`` has the shape, value range, mean and standard
    deviation: ``InputSpec(**input).normalise(images)`` makes one of the other.

    Raises:
        UserError: a file is missing, damaged or not of this kind, or the two do not belong together.

    Example:
        >>> import tempfile
        >>> from zskd_nni.models.zoo import lenet5
        >>> network = lenet5()
        >>> network.conv1 = nn.Conv2d(1, 3, 5)
        >>> network.conv2 = nn.Conv2d(3, 16, 5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_network(network, "zoo:lenet5", {}, Path(folder, "n.safetensors"), Path(folder, "n.json"))
        ...     load_network(f"{folder}/n.json").conv1.out_channels
        3
    """
    description = Path(description)
    found = read_json(description)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{description} does not describe a network (its format is not {FORMAT!r}).")
    content: dict[str, Any] = {"dropped": [], "base": "", **found}
    for key, (kind, meaning) in _ENTRIES.items():
        value = content.get(key)
        if not isinstance(value, kind) or (key == "weights" and Path(str(value)).name != value):
            raise UserError(f"{description}: {key!r} must be {meaning}, not {value!r}.")
    weights = description.parent / content["weights"]
    tensors, _ = load_tensors(weights)
    if sha256_of_file(weights) != content.get("sha256"):
        raise UserError(f"{weights} is not the file that {description.name} describes: its checksum differs.")
    network = build_network(content["network"], content["arguments"], description.parent / content["base"])
    dropped = content["dropped"]
    paths = {path for path, _ in network.named_modules()} - {""}
    if not all(isinstance(path, str) and path in paths for path in dropped):
        raise UserError(f"{description}: 'dropped' must list modules of {content['network']}, not {dropped!r}.")
    drop_modules(network, dropped)
    shared = shared_layers(network)
    paths = {path for path, _ in network.named_modules()}
    for path, described in content["layers"].items():
        if path not in paths:
            raise UserError(f"{description}: {content['network']} has no layer {path!r}.")
        if not path or not isinstance(described, dict):
            raise UserError(f"{description}: the layer {path!r} is not described.")
        if described.get("type") == _RESIZED:
            _resize(network.get_submodule(path), described, path, tensors, description)
            continue
        _check_size(described, path, tensors, description)
        set_module(network, path, _build_layer(described, path, description))
    replace_everywhere(network, shared)
    load_into(network, tensors, str(weights))
    return network.eval()
