"""Networks of other packages: timm, transformers, and ONNX files. Each package is imported where it is needed alone."""

from __future__ import annotations

import copy
import difflib
import importlib
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zskd_nni.models.onnx_session import onnx_session
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import is_file

ONNX_SUFFIX = ".onnx"


def _package(name: str, extra: str, what: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{what} needs the package {name}, which is not installed. It comes with the extra {extra}: "
            f"pip install '.[{extra}]' in the clone of zskd_nni."
        ) from error


def timm_factory(name: str) -> Callable[..., nn.Module]:
    """What makes a network of timm, with random weights.

    Raises:
        UserError: timm is not installed, or has no such model. The factory refuses a ``checkpoint_path``.
    """
    timm = _package("timm", "timm", f"timm:{name}")
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else "timm.list_models() lists them."
        raise UserError(f"timm has no model {name!r}; {hint}")

    def build(**arguments: Any) -> nn.Module:
        if "checkpoint_path" in arguments:  # timm unpickles such a file, which runs code
            raise UserError(f"timm:{name} takes no checkpoint_path; name the file of its weights as weights.")
        return timm.create_model(name, pretrained=False, **arguments)

    return build


def has_weights(folder: Path) -> bool:
    """Whether a folder of transformers holds weights as safetensors."""
    return any(is_file(folder / name) for name in ("model.safetensors", "model.safetensors.index.json"))


def transformers_factory(folder: Path) -> Callable[..., nn.Module]:
    """What makes an image classifier of transformers from a local folder, with its weights if they are there.

    The folder is what ``save_pretrained`` writes: ``config.json`` and safetensors. Nothing is downloaded, and no code
    of the folder runs.

    Raises:
        UserError: transformers is not installed, or the folder does not hold such a network.
    """
    transformers = _package("transformers", "transformers", f"transformers:{folder}")
    if not is_file(folder / "config.json"):
        raise UserError(
            f"transformers:{folder}: the folder has no config.json; name one that save_pretrained has written."
        )
    classifiers = transformers.AutoModelForImageClassification
    options = {"local_files_only": True, "trust_remote_code": False}

    def build(**arguments: Any) -> nn.Module:
        if has_weights(folder):
            return classifiers.from_pretrained(str(folder), use_safetensors=True, **options, **arguments)
        config = transformers.AutoConfig.from_pretrained(str(folder), **options, **arguments)
        return classifiers.from_config(config, trust_remote_code=False)

    return build


def onnx_factory(file: Path) -> Callable[..., nn.Module]:
    """What makes a network of an ONNX file, with its weights.

    The file must hold a classifier in floating point: one input ``(N, C, H, W)``, one output ``(N, classes)``.

    Raises:
        UserError: onnx2torch is not installed, or there is no such file.
    """
    if not is_file(file):
        raise UserError(f"There is no file {file} to take a network from.")

    def build() -> nn.Module:
        return network_of_onnx(file)

    return build


def network_of_onnx(file: Path) -> nn.Module:
    """The network of an ONNX file with layers of ``torch.nn``, in ``eval()`` mode.

    Raises:
        UserError: onnx2torch is not installed, the file is damaged or quantized, or has operators that it lacks.
    """
    import onnx

    onnx2torch = _package("onnx2torch", "onnx-teacher", f"{file.name} as a network")
    try:
        model = onnx.load(str(file))
    except Exception as error:  # protobuf raises anything
        raise UserError(f"{file} is not a sound ONNX file ({error}).") from error
    operators = {node.op_type for node in model.graph.node}
    integers = sorted(each for each in operators if "Linear" in each or each.endswith("Integer"))
    if integers:
        raise UserError(
            f"{file} is quantized already (its operators include {integers[0]}), and integers have no gradients; name "
            f"the file in floating point that it was made from, and quantize the student."
        )
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [each.name for each in model.graph.input if each.name not in weights]
    if len(inputs) != 1:
        raise UserError(f"{file} has the inputs {', '.join(inputs) or 'none'}; a classifier takes one, the images.")
    known = _simplify(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = onnx2torch.convert(model)
    except NotImplementedError as error:
        raise UserError(f"{file} has an operator that onnx2torch lacks: {error}.") from error
    except Exception as error:  # a converter may raise anything
        raise UserError(f"{file} cannot be converted by onnx2torch: {error}.") from error
    network = network.eval()
    _with_plain_layers(network, known)
    _check_answers(file, network)
    return network.requires_grad_(True)


def _check_answers(file: Path, network: nn.Module) -> None:
    """Compare a converted network with the file in onnxruntime, where the file says how large its images are."""
    session = onnx_session(file)
    given = session.get_inputs()[0]
    shape = [size if isinstance(size, int) else 2 if axis == 0 else None for axis, size in enumerate(given.shape)]
    if None in shape or given.type != "tensor(float)":
        return
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    expected = torch.from_numpy(session.run(None, {given.name: images.numpy()})[0])
    with torch.no_grad():
        answers = network(images)
    answers = answers[0] if isinstance(answers, list | tuple) else answers  # onnxruntime's first is the first
    if answers.shape != expected.shape or not torch.allclose(answers, expected, 1e-3, 1e-4):
        raise UserError(f"{file} answers differently in onnxruntime and when onnx2torch has converted it.")


# Operators whose axes have moved from an attribute to an input since the newest version that onnx2torch knows.
_REDUCTIONS = {"ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSumExp"}
_REDUCTIONS |= {"ReduceSumSquare", "ReduceLogSum"}
_NEWEST = 17


def _simplify(model: Any) -> bool:
    """Write what onnx2torch does not know, of newer versions of ONNX, in words that it knows.

    Returns:
        Whether the batch is a 0 in the sizes of every Reshape that keeps it.
    """
    import onnx

    _with_weights_of_their_own(model)
    _without_newer_activations(model)
    known = _with_known_sizes(model)
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            values[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    newer = any(each.domain in ("", "ai.onnx") and each.version > _NEWEST for each in model.opset_import)
    for node in model.graph.node:
        left_out = set()
        if node.op_type == "Reshape":  # a size of 0 would make an empty tensor: classifiers have none
            left_out.add("allowzero")
        elif node.op_type == "Split" and newer:
            left_out.add("num_outputs")
        elif node.op_type == "AveragePool":
            left_out.update(each.name for each in node.attribute if each.name == "dilations" and set(each.ints) <= {1})
        elif node.op_type in _REDUCTIONS and newer and len(node.input) > 1 and node.input[1] in values:
            axes = values[node.input[1]].tolist()
            del node.input[1:]
            left_out.add("noop_with_empty_axes")
            node.attribute.append(onnx.helper.make_attribute("axes", axes))
        kept = [attribute for attribute in node.attribute if attribute.name not in left_out]
        if len(kept) < len(node.attribute):
            del node.attribute[:]
            node.attribute.extend(kept)
    for each in model.opset_import:
        if each.domain in ("", "ai.onnx") and newer:
            each.version = _NEWEST
    return known


def _with_weights_of_their_own(model: Any) -> None:
    """Weights that are equal are stored once by some exporters, and those of other layers name them by an Identity.

    Weights may also stand in Constant nodes; onnx2torch looks for them among the initializers.
    """
    stored, same, kept = {tensor.name for tensor in model.graph.initializer}, dict[str, str](), []
    of_layers = {
        name
        for node in model.graph.node
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "BatchNormalization", "LayerNormalization", "PRelu")
        for name in node.input[1:]
    }
    outputs = {each.name for each in model.graph.output}
    for node in model.graph.node:
        if node.op_type == "Identity" and same.get(node.input[0], node.input[0]) in stored - outputs:
            same[node.output[0]] = same.get(node.input[0], node.input[0])
        elif node.op_type == "Constant" and node.output[0] in of_layers and node.attribute[0].name == "value":
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            stored.add(tensor.name)
        else:
            kept.append(node)
    if len(kept) < len(model.graph.node):
        for node in kept:
            node.input[:] = [same.get(name, name) for name in node.input]
        kept = [type(node).FromString(node.SerializeToString()) for node in kept]
        del model.graph.node[:]
        model.graph.node.extend(kept)


def _with_known_sizes(model: Any) -> bool:
    """Sizes that a Reshape computes are written down, all but that of the batch; False where they cannot be known.

    They are asked of onnxruntime, for two and for three images. A file of one image alone has its sizes written down
    for that one; where the batch stands first, it may be any number afterwards.
    """
    import onnx

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    given = next(each for each in model.graph.input if each.name not in weights)
    shape: list[Any] = [dim.dim_value or None for dim in given.type.tensor_type.shape.dim]
    reshapes = [node for node in model.graph.node if node.op_type == "Reshape"]
    counts = (2, 3) if shape and shape[0] is None else (shape[0],) if shape else ()
    if not reshapes or not counts or None in shape[1:]:
        return False
    asked = copy.deepcopy(model)
    known = {each.name for each in asked.graph.output}
    for name in dict.fromkeys(name for node in reshapes for name in (node.input[0], node.output[0])):
        if name not in known and name not in weights and name != given.name:
            asked.graph.output.append(onnx.ValueInfoProto(name=name))
    try:
        session = onnx_session(asked.SerializeToString())
        seen = []
        for count in counts:
            images = torch.rand(count, *shape[1:]).numpy()
            names = [each.name for each in session.get_outputs()]
            seen.append({given.name: images, **dict(zip(names, session.run(names, {given.name: images}), strict=True))})
    except Exception:  # the comparison of the whole network tells
        return False
    for node in reshapes:
        values = [list(each[node.output[0]].shape) for each in seen]
        batch = [next(iter(each[node.input[0]].shape), None) if node.input[0] in each else None for each in seen]
        sizes = _sizes_of_any_batch(values, batch)
        if sizes is not None and node.input[0] not in weights:
            node.input[1] = f"{node.output[0]}_sizes"
            sizes_tensor = onnx.numpy_helper.from_array(torch.tensor(sizes, dtype=torch.int64).numpy(), node.input[1])
            model.graph.initializer.append(sizes_tensor)
    if counts != (2, 3):
        given.type.tensor_type.shape.dim[0].ClearField("dim_value")
    return True


def _sizes_of_any_batch(values: list[list[int]], batch: list[int | None]) -> list[int] | None:
    """One list of sizes for any number of images, 0 for that of the tensor itself; None where there is none.

    Example:
        >>> _sizes_of_any_batch([[2, 4, 8], [3, 4, 8]], [2, 3]), _sizes_of_any_batch([[8, 16], [12, 16]], [2, 3])
        ([0, 4, 8], [-1, 16])
    """
    sizes: list[int] = []
    for place, found in enumerate(zip(*values, strict=True)):
        if place == 0 and list(found) == batch:
            sizes.append(0)
        else:
            sizes.append(found[0] if len(set(found)) == 1 else -1)
    return sizes if sizes.count(-1) < 2 else None


def _without_newer_activations(model: Any) -> None:
    """Gelu, Mish and Swish, which later versions of ONNX have as operators, in operators of earlier ones."""
    import numpy as np
    import onnx

    number = 0
    nodes = []
    for node in model.graph.node:
        if node.op_type not in ("Gelu", "Mish", "Swish") or node.domain not in ("", "ai.onnx"):
            nodes.append(node)
            continue
        given = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        place, x = f"{node.name or node.op_type}_{number}", node.input[0]
        number += 1

        def value(wanted: float, place: str = place) -> str:
            name = f"{place}_value_{wanted}"
            if name not in {tensor.name for tensor in model.graph.initializer}:
                model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(wanted).reshape(()), name))
            return name

        steps: list[tuple[str, list[str | int]]]  # a number: the result of that step
        if node.op_type == "Mish":
            steps = [("Softplus", [x]), ("Tanh", [0])]
        elif node.op_type == "Swish":
            steps = [("Mul", [x, value(given.get("alpha", 1.0))]), ("Sigmoid", [0])]
        elif given.get("approximate") == b"tanh":
            steps = [
                ("Mul", [x, x]), ("Mul", [0, value(0.044715)]), ("Add", [1, value(1.0)]), ("Mul", [2, x]),
                ("Mul", [3, value(math.sqrt(2 / math.pi))]), ("Tanh", [4]), ("Add", [5, value(1.0)]),
                ("Mul", [6, value(0.5)]),
            ]  # fmt: skip
        else:
            steps = [
                ("Mul", [x, value(math.sqrt(0.5))]), ("Erf", [0]), ("Add", [1, value(1.0)]),
                ("Mul", [2, value(0.5)]),
            ]  # fmt: skip
        for at, (operator, read) in enumerate([*steps, ("Mul", [x, len(steps) - 1])]):
            inputs = [f"{place}_step_{each}" if isinstance(each, int) else each for each in read]
            output = node.output[0] if at == len(steps) else f"{place}_step_{at}"
            nodes.append(onnx.helper.make_node(operator, inputs, [output], f"{place}_{operator}_{at}"))
    if number:
        nodes = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del model.graph.node[:]
        model.graph.node.extend(nodes)


def _with_plain_layers(network: nn.Module, known: bool) -> None:
    """Layers of ``torch.nn`` in the place of those of onnx2torch that do the same for a classifier.

    Args:
        network: of onnx2torch.
        known: whether the batch is a 0 in the sizes of every Reshape that keeps it.
    """
    for node in list(network.graph.nodes):  # type: ignore[union-attr, arg-type]
        if node.op != "call_module":
            continue
        module = network.get_submodule(str(node.target))
        kind = type(module).__name__
        plain: nn.Module | None = None
        if (kind == "OnnxReshape" and len(node.args) == 2 and _flattens(network, node.args[1], known)) or (
            kind == "OnnxFlatten" and getattr(module, "axis", None) == 1
        ):
            plain = nn.Flatten()
        if plain is not None:
            parent, _, name = str(node.target).rpartition(".")
            network.get_submodule(parent).register_module(name, plain)
            node.args = node.args[:1]
    network.graph.eliminate_dead_code()  # type: ignore[union-attr, operator]
    network.recompile()  # type: ignore[operator]


def _flattens(network: nn.Module, shape: Any, known: bool) -> bool:
    """Whether a shape of an ONNX Reshape keeps the batch and makes the rest one dimension."""
    if getattr(shape, "op", "") != "get_attr":
        return False
    value: Any = network
    for part in str(shape.target).split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor) or value.numel() != 2:
        return False
    return bool(value[0] == 0) or (not known and bool(torch.any(value == -1)))
