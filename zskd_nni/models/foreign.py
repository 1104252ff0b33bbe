"""Networks of other packages: timm, transformers, and ONNX files. Each package is imported where it is needed alone."""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zskd_nni.models.onnx_export import onnx_session
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
            f"{what} needs the package {name}, which is not installed: pip install zskd-nni[{extra}]."
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
    _simplify(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = onnx2torch.convert(model)
    except NotImplementedError as error:
        raise UserError(f"{file} has an operator that onnx2torch lacks: {error}.") from error
    except Exception as error:  # a converter may raise anything
        raise UserError(f"{file} cannot be converted by onnx2torch: {error}.") from error
    network = network.eval()
    _with_plain_layers(network)
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
    if answers.shape != expected.shape or not torch.allclose(answers, expected, 1e-3, 1e-4):
        raise UserError(f"{file} answers differently in onnxruntime and when onnx2torch has converted it.")


# Operators whose axes have moved from an attribute to an input since the newest version that onnx2torch knows.
_REDUCTIONS = {"ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSumExp"}
_REDUCTIONS |= {"ReduceSumSquare", "ReduceLogSum"}
_NEWEST = 17


def _simplify(model: Any) -> None:
    """Write what onnx2torch does not know, of newer versions of ONNX, in words that it knows."""
    import onnx

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


def _with_plain_layers(network: nn.Module) -> None:
    """Layers of ``torch.nn`` in the place of those of onnx2torch that do the same for a classifier."""
    for node in list(network.graph.nodes):  # type: ignore[union-attr, arg-type]
        if node.op != "call_module":
            continue
        module = network.get_submodule(str(node.target))
        kind = type(module).__name__
        plain: nn.Module | None = None
        if (kind == "OnnxReshape" and len(node.args) == 2 and _flattens(network, node.args[1])) or (
            kind == "OnnxFlatten" and getattr(module, "axis", None) == 1
        ):
            plain = nn.Flatten()
        if plain is not None:
            parent, _, name = str(node.target).rpartition(".")
            network.get_submodule(parent).register_module(name, plain)
            node.args = node.args[:1]
    network.graph.eliminate_dead_code()  # type: ignore[union-attr, operator]
    network.recompile()  # type: ignore[operator]


def _flattens(network: nn.Module, shape: Any) -> bool:
    """Whether a shape of an ONNX Reshape keeps the batch and makes the rest one dimension."""
    if getattr(shape, "op", "") != "get_attr":
        return False
    value: Any = network
    for part in str(shape.target).split("."):
        value = getattr(value, part)
    return isinstance(value, Tensor) and value.numel() == 2 and bool(torch.any(value == -1) or value[0] == 0)
