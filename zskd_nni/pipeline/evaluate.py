"""The accuracy of a saved network and of ONNX files on labelled images."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from zskd_nni.data.datasets import Fit, LabelledImages, describe_fit, fitted
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.memory_format import use_channels_last
from zskd_nni.models.onnx_export import run_onnx
from zskd_nni.models.onnx_session import onnx_session
from zskd_nni.models.serialization import load_network
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json
from zskd_nni.runtime.validation import build_settings
from zskd_nni.training.inference import float_answers, logits_on
from zskd_nni.training.metrics import accuracy, agreement

_INT8 = "-int8"


def evaluate_network(network: Path, load: Callable[[], LabelledImages], fit: Fit | None = None) -> Iterator[str]:
    """Measure a saved network and the ONNX files beside it.

    Args:
        network: its ``.json`` file, or the folder with its ``student.json``.
        load: reads the images.
        fit: how images of another size are fitted; by default by a known rule, or they are refused.

    Yields:
        One line a file.

    Raises:
        UserError: a file is missing or damaged, or the images have no labels.
    """
    path = network / "student.json" if network.is_dir() else network
    spec = saved_input(read_json(path), path)
    model = use_channels_last(load_network(path), spec.example_input())
    images = fitted(load(), spec.shape, fit)
    logits = logits_on(float_answers(model, spec), images, spec)
    yield _accuracy_line(path, logits, images, spec)
    for exported in (path.with_suffix(".onnx"), path.with_name(f"{path.stem}{_INT8}.onnx")):
        if exported.exists():
            answers = logits_on(functools.partial(run_onnx, exported), images, spec)
            share = 100 * agreement(answers, logits)
            yield f"{exported}: accuracy {accuracy(answers, images.labels):.2f} %, agreement {share:.2f} %"


def evaluate_onnx(path: Path, load: Callable[[], LabelledImages], fit: Fit | None = None) -> Iterator[str]:
    """Measure an ONNX file in onnxruntime.

    The value range of its input is that of the ``.json`` file which a run leaves beside it, and [0, 1] without one.

    Args:
        path: a file with an input ``images`` and an output ``logits``, as runs export it.
        load: reads the images.
        fit: how images of another size are fitted; by default by a known rule, or they are refused.

    Yields:
        One line.

    Raises:
        UserError: it is no such file, or the images have no labels.
    """
    description = path.with_name(f"{path.stem.removesuffix(_INT8)}.json")
    shape = _input_shape(path)
    spec = saved_input(read_json(description), description) if description.exists() else InputSpec(shape)
    if spec.shape != shape:
        raise UserError(f"{path} takes images of shape {shape}, and {description} is of a network with {spec.shape}.")
    images = fitted(load(), spec.shape, fit)
    yield _accuracy_line(path, logits_on(functools.partial(run_onnx, path), images, spec), images, spec)


def saved_input(content: Any, path: Path) -> InputSpec:
    """The network's input as a JSON file describes it.

    Args:
        content: of the file; a mapping with the key ``input``.
        path: of the file, for messages.

    Raises:
        UserError: it does not describe one.
    """
    try:
        return build_settings(InputSpec, dict(content.get("input") or {}), "input")
    except (AttributeError, TypeError, ValueError) as error:  # the file may hold anything
        raise UserError(f"{path} does not describe the network's input: {error}.") from error


def _accuracy_line(path: Path, logits: Tensor, images: LabelledImages, spec: InputSpec) -> str:
    images.require_labels(logits.shape[1])
    if fit := describe_fit(images, spec.shape):
        print(f"images of {images.name}: {fit}", file=sys.stderr)
    return f"{path}: accuracy {accuracy(logits, images.labels):.2f} % on {len(images):,} images of {images.name}"


def _input_shape(path: Path) -> tuple[int, int, int]:
    """``(C, H, W)`` of an ONNX file's images."""
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    session = onnx_session(path)
    inputs = {each.name: each.shape for each in session.get_inputs()}
    shape = tuple(inputs.get("images") or ())[1:]
    outputs = [each.name for each in session.get_outputs()]
    if list(inputs) != ["images"] or len(shape) != 3 or not all(isinstance(n, int) for n in shape):
        raise UserError(f"{path} must have one input, images (N, C, H, W), as a run exports it; it has {inputs}.")
    if "logits" not in outputs:
        raise UserError(f"{path} must have an output logits (N, K), as a run exports it; it has {', '.join(outputs)}.")
    return shape[0], shape[1], shape[2]
