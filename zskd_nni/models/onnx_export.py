"""ONNX export, with a check that onnxruntime computes the network's logits."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from zskd_nni.models.input_spec import InputSpec, inference_batch
from zskd_nni.models.onnx_session import onnx_session
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import write_atomic
from zskd_nni.runtime.precision import without_autocast

OPSET = 18


_ANY_NUMBER_OF_IMAGES = ({0: torch.export.Dim("N")},)


class _WithNormalisation(nn.Module):
    """A network together with its input's normalisation, so that it takes plain pixel values when deployed."""

    def __init__(self, network: nn.Module, spec: InputSpec) -> None:
        super().__init__()
        self.network = network
        self.is_normalised = spec.is_normalised
        self.mean: Tensor
        self.std: Tensor
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        from zskd_nni.models.teacher import first_tensor

        if self.is_normalised:
            images = (images - self.mean) / self.std
        return first_tensor(self.network(images))


def onnx_bytes(network: nn.Module, spec: InputSpec) -> bytes:
    """The network as ONNX: input ``images (N, C, H, W)`` in the value range, output ``logits (N, K)``, any N.

    Raises:
        UserError: the network cannot be exported.
    """
    try:
        with _quiet(), _operators_listed_once():
            program = torch.onnx.export(
                _exported_network(network, spec),
                (spec.midpoint(2),),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=_ANY_NUMBER_OF_IMAGES,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            return _stripped(program.model_proto)
    except Exception as error:  # the exporter raises anything
        raise _refusal(error) from error


def check_exportable(network: nn.Module, spec: InputSpec) -> None:
    """Refuse before a long training a network that cannot be exported after it.

    Only the exporter's first step is run, a fraction of its time. Operators that ONNX lacks are found at the end.

    Raises:
        UserError: the network cannot be exported.
    """
    whole = _exported_network(network, spec)
    for strict in (False, True):  # what the exporter tries
        try:
            with _quiet():
                torch.export.export(whole, (spec.midpoint(2),), dynamic_shapes=_ANY_NUMBER_OF_IMAGES, strict=strict)
            return
        except Exception as error:  # it raises anything
            refusal = _refusal(error)
            refusal.__cause__ = error
    raise refusal


def _exported_network(network: nn.Module, spec: InputSpec) -> nn.Module:
    """A copy on the CPU, in float32 and ``eval()`` mode, with the normalisation in front."""
    plain = copy.deepcopy(network).cpu().float().eval().to(memory_format=torch.contiguous_format)
    return _WithNormalisation(plain, spec).eval()


def _refusal(error: BaseException) -> UserError:
    """The first line of the error that stopped the exporter, without terminal colours."""
    while error.__cause__ is not None:  # the exporter's own error lists its steps
        error = error.__cause__
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() or [type(error).__name__]
    return UserError(f"The network cannot be exported to ONNX: {lines[0]}")


def _stripped(model: Any) -> bytes:
    """The ONNX model without the exporter's notes on the origin of each node.

    They are larger than a small network's weights, and contain paths of the exporting machine.
    """
    import onnx

    model.ClearField("metadata_props")
    graph = model.graph
    del graph.value_info[:]
    for entry in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        entry.ClearField("metadata_props")
        entry.ClearField("doc_string")
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


@functools.cache
def _operators() -> tuple[Any, list[Any]] | None:
    """The module that the exporter asks for its operators, and these; None with a PyTorch that goes another way."""
    try:
        module = importlib.import_module("torch.onnx._internal._lazy_import").onnxscript_apis
        return module, list(module.get_torchlib_ops())
    except (ImportError, AttributeError):
        return None


@contextlib.contextmanager
def _operators_listed_once() -> Iterator[None]:
    """Within the block the exporter takes its operators from memory.

    Left alone it parses the source of some 500 of them at every export, a quarter of the time of a small network.
    """
    known = _operators()
    if known is None:
        yield
        return
    module, operators = known
    own = vars(module).get("get_torchlib_ops")  # of a module that is imported lazily: none
    module.get_torchlib_ops = lambda: list(operators)
    try:
        yield
    finally:
        if own is None:
            del module.get_torchlib_ops
        else:
            module.get_torchlib_ops = own


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), without_autocast():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def checking_batch(images: Tensor) -> int:
    """How many images to run at once when an export is checked: 500, fewer of large ones."""
    return min(500, inference_batch(images[0].numel()))


# On processors with AVX2 or AVX-512 but without VNNI, onnxruntime by itself adds products of eight-bit integers in 16
# bits, where large sums are cut off. The first setting makes them exact. It fails where layers share a zero point
# (onnxruntime 1.31), and older ones cannot convolve with a zero point for each channel (1.23). With the second, layers
# compute in floating point between the operators that round.
_EXACT = ("session.x64quantprecision", "session.disable_quant_qdq")


def exact_settings(version: str) -> tuple[str, ...]:
    """Settings of a session that computes quantized layers as the file says, the first that runs is right.

    Before onnxruntime 1.25 only the second is: on processors with AVX-512 its layers with signed eight-bit outputs are
    wrong by a quarter of the largest logit for some images.

    Args:
        version: of onnxruntime.

    Example:
        >>> exact_settings("1.23.2")
        ('session.disable_quant_qdq',)
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    return _EXACT if (major, minor) >= (1, 25) else _EXACT[1:]


def run_onnx(model: bytes | str | Path, images: Tensor) -> Tensor:
    """Logits ``(N, K)`` of an ONNX model in onnxruntime on the CPU, quantized layers exact on every processor.

    Args:
        model: the file, or its bytes.
        images: ``(N, C, H, W)`` in the value range.

    Raises:
        UserError: onnxruntime refuses the model.

    Example:
        >>> from zskd_nni import load_teacher
        >>> teacher = load_teacher("lenet5-digits")
        >>> run_onnx(onnx_bytes(teacher.model, teacher.spec), torch.zeros(3, 1, 32, 32)).shape
        torch.Size([3, 10])
    """
    import onnxruntime

    for setting in exact_settings(onnxruntime.__version__):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(setting, "1")
        try:
            session = onnx_session(model, options)
            parts = [
                session.run(["logits"], {"images": part.numpy().astype(np.float32)})[0]
                for part in images.split(checking_batch(images))
            ]
            return torch.from_numpy(np.concatenate(parts))
        except Exception as error:  # onnxruntime has exceptions of its own
            refusal = error
    raise refusal


class ImageSource(Protocol):
    """What gives batches of images, such as a transfer source."""

    def batch(self, step: int, random: torch.Generator) -> Tensor:
        """Images ``(N, C, H, W)``."""


def export_onnx(
    network: nn.Module,
    spec: InputSpec,
    path: str | Path,
    images: Tensor | ImageSource | None = None,
    tolerance: float = 1e-3,
) -> float:
    """Write a network as ONNX, after checking that onnxruntime computes the network's logits.

    Args:
        network: left as it is; exported in ``eval()`` mode and float32.
        spec: its input. The normalisation becomes part of the file.
        path: the ``.onnx`` file to write.
        images: ``(N, C, H, W)`` in the value range to compare the logits on, or a transfer source, whose first batch
            is taken; 16 of uniform noise by default.
        tolerance: largest allowed difference of a logit, relative to the largest logit (at least 1).

    Returns:
        The largest difference found, on that scale.

    Raises:
        UserError: the network cannot be exported, or onnxruntime's logits differ.

    Example:
        >>> import tempfile
        >>> from zskd_nni import load_teacher
        >>> teacher = load_teacher("lenet5-digits")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_onnx(teacher.model, teacher.spec, f"{folder}/teacher.onnx") < 1e-4
        True
    """
    if images is None:
        images = spec.uniform_noise(16)
    elif not isinstance(images, Tensor):
        images = images.batch(0, torch.Generator().manual_seed(0))
    images = images.cpu()
    data = onnx_bytes(network, spec)
    exported = _exported_network(network, spec)
    with torch.no_grad(), without_autocast():
        # Copies: the network may change its input in place, and onnxruntime gets the same images.
        expected = torch.cat([exported(part.clone()) for part in images.split(checking_batch(images))])
    difference = float((run_onnx(data, images) - expected).abs().max() / expected.abs().max().clamp_min(1))
    if not difference <= tolerance:
        raise UserError(
            f"onnxruntime's logits differ from the network's by {difference:.2g} of the largest logit; at most "
            f"{tolerance:g} is allowed."
        )
    write_atomic(path, data)
    return difference
