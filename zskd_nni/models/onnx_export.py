"""ONNX export, checked: onnxruntime must answer as the network does."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from zskd_nni.models.input_spec import InputSpec, inference_batch
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import write_atomic

OPSET = 18


_ANY_NUMBER_OF_IMAGES = ({0: torch.export.Dim("N")},)


class _WithNormalisation(nn.Module):
    """A network together with its input's normalisation, so that a deployment feeds plain pixel values."""

    def __init__(self, network: nn.Module, spec: InputSpec) -> None:
        super().__init__()
        self.network = network
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).view(1, -1, 1, 1))
        self.plain = spec.mean == (0.0,) and spec.std == (1.0,)

    def forward(self, images: Tensor) -> Tensor:
        from zskd_nni.models.teacher import first_tensor

        normalised = images if self.plain else (images - self.mean) / self.std
        return first_tensor(self.network(normalised))


def onnx_bytes(network: nn.Module, spec: InputSpec) -> bytes:
    """The network as ONNX: input ``images (N, C, H, W)`` in the value range, output ``logits (N, K)``, N free.

    Raises:
        UserError: the network cannot be exported.
    """
    whole = _exported_network(network, spec)
    example = spec.midpoint(2)
    try:
        with _quiet():
            program = torch.onnx.export(
                whole,
                (example,),
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
    """Find out before the long work what :func:`onnx_bytes` would say after it, in a fraction of its time.

    The exporter's first step alone, which reads the network; that ONNX has the operators is seen at the end.

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
    plain = copy.deepcopy(network).cpu().float().eval().to(memory_format=torch.contiguous_format)
    return _WithNormalisation(plain, spec).eval()


def _refusal(error: Exception) -> UserError:
    return UserError(f"The network cannot be exported to ONNX: {_reason(error)}")


def _reason(error: BaseException) -> str:
    """The first line of what the exporter met, without the colours of a terminal: its own error tells of its steps."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _stripped(model: Any) -> bytes:
    """The ONNX model without the exporter's notes on where each node comes from.

    They are longer than a small network's weights and tell the paths of the machine that exported it.
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


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)


def checking_batch(images: Tensor) -> int:
    """How many images are answered at once where an export is checked: 500, fewer of large ones."""
    return min(500, inference_batch(images[0].numel()))


def run_onnx(model: bytes | str | Path, images: Tensor) -> Tensor:
    """Logits ``(N, K)`` of an ONNX model in onnxruntime on the CPU."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    try:
        session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model), providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime has exceptions of its own
        named = "The exported network" if isinstance(model, bytes) else model
        raise UserError(f"{named} cannot be run by onnxruntime ({error}).") from error
    parts = [
        session.run(["logits"], {"images": part.numpy().astype(np.float32)})[0]
        for part in images.split(checking_batch(images))
    ]
    return torch.from_numpy(np.concatenate(parts))


class ImageSource(Protocol):
    """What gives batches of images, such as a transfer source."""

    def batch(self, step: int, random: torch.Generator) -> Tensor:
        """Images ``(N, C, H, W)``."""
        ...


def export_onnx(
    network: nn.Module,
    spec: InputSpec,
    path: str | Path,
    images: Tensor | ImageSource | None = None,
    tolerance: float = 1e-3,
) -> float:
    """Write a network as ONNX, after checking that onnxruntime answers as the network does.

    Args:
        network: left as it is; exported in ``eval()`` mode and float32.
        spec: its input. The normalisation becomes part of the file.
        path: the ``.onnx`` file to write.
        images: ``(N, C, H, W)`` in the value range to compare the answers on, or a transfer source, whose first batch
            is taken; 16 of uniform noise by default.
        tolerance: largest allowed difference of a logit, relative to the largest logit (at least 1).

    Returns:
        The largest difference found, on that scale.

    Raises:
        UserError: the network cannot be exported, or onnxruntime answers differently.

    Example:
        >>> import tempfile
        >>> from zskd_nni import load_teacher
        >>> teacher = load_teacher("lenet5-digits")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_onnx(teacher.model, teacher.spec, f"{folder}/teacher.onnx") < 1e-4
        True
    """
    random = torch.Generator().manual_seed(0)
    if images is None:
        images = spec.low + (spec.high - spec.low) * torch.rand((16, *spec.shape), generator=random)
    elif not isinstance(images, Tensor):
        images = images.batch(0, random)
    images = images.cpu()
    data = onnx_bytes(network, spec)
    exported = _exported_network(network, spec)
    with torch.no_grad():
        # Copies: the network may change its input in place, and onnxruntime gets the same images.
        expected = torch.cat([exported(part.clone()) for part in images.split(checking_batch(images))])
    difference = float((run_onnx(data, images) - expected).abs().max() / expected.abs().max().clamp_min(1))
    if not difference <= tolerance:
        raise UserError(
            f"onnxruntime answers otherwise than the network: logits differ by {difference:.2g}, relatively."
        )
    write_atomic(path, data)
    return difference
