"""Sessions of onnxruntime, which tell what they refuse by an error alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zskd_nni.runtime.errors import UserError


def onnx_session(model: bytes | str | Path, options: Any = None) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        model: the file, or its bytes.
        options: an ``onnxruntime.SessionOptions``; it writes nothing but fatal errors to the console.

    Raises:
        UserError: onnxruntime refuses the model.
    """
    import onnxruntime

    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 4  # an error is raised, and told in a sentence
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has exceptions of its own
        named = "The exported network" if isinstance(model, bytes) else model
        raise UserError(f"{named} cannot be run by onnxruntime ({error}).") from error
