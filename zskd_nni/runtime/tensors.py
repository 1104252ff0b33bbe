"""Files of tensors that can be read without running code: safetensors, sealed states, and weights of PyTorch."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import is_file, sha256_of_bytes, write_atomic


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write named tensors as safetensors, atomically; returns the SHA-256 of the file."""
    ready: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory; tied weights are written once for each of their names.
        ready[name] = plain.clone() if address in addresses else plain
        addresses.add(address)
    data = safetensors_bytes(ready, metadata)
    write_atomic(path, data)
    return sha256_of_bytes(data)


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Named tensors and metadata of a safetensors file.

    Raises:
        UserError: the file is missing, or is not a valid safetensors file.
    """
    path = Path(path)
    if not is_file(path):
        raise UserError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a valid safetensors file ({error}).") from error


_HEADER = b"zskd_nni sealed state, format 2\n"


def save_sealed(path: str | Path, state: Any) -> None:
    """Write a nested state with its checksum, atomically.

    Args:
        path: of the file.
        state: tensors, numbers, strings and None in dicts, lists and tuples. Tensors keep their strides; those of
            another device are written as the CPU's, so that any machine can read the file.
    """
    buffer = io.BytesIO()
    torch.save(_on_cpu(state), buffer)
    content = buffer.getvalue()
    write_atomic(path, _HEADER + hashlib.sha256(content).digest() + content)


def _on_cpu(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_on_cpu(value) for value in state)
    return state


def load_sealed(path: str | Path) -> Any:
    """The state that :func:`save_sealed` wrote, its tensors on the CPU.

    The checksum is compared before anything is unpickled, and then with ``weights_only=True``: no code can run.

    Raises:
        UserError: the file is missing, damaged, of another format, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not is_file(path):
        raise UserError(f"There is no file {path}.")
    try:
        with open(path, "rb") as file:
            header, digest = file.read(len(_HEADER)), file.read(32)
            content = file.read() if header == _HEADER else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    if header != _HEADER:
        raise UserError(
            f"{path} is not in the format of this version (sealed state, format 2). It is damaged, or an older version "
            "wrote it; the same command makes it again. Remove the file to start over."
        )
    if digest != hashlib.sha256(content).digest():
        raise UserError(f"{path} is not as it was written: its checksum differs. Remove the file to start over.")
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises anything
        raise UserError(
            f"{path} holds more than tensors and plain values, and was not read. Remove the file."
        ) from error


def load_weights(path: str | Path, allow_pt: bool = False) -> dict[str, Tensor]:
    """The state dict of a file; the first of :func:`load_state_dicts` where there are several.

    Raises:
        UserError: as of :func:`load_state_dicts`.
    """
    return next(iter(load_state_dicts(path, allow_pt).values()))


def load_state_dicts(path: str | Path, allow_pt: bool = False) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a ``.safetensors`` file, or of a checkpoint of PyTorch if ``allow_pt`` is set.

    PyTorch files are read with ``weights_only=True``; nothing in them is run. Beside tensors and plain values they may
    hold what training scripts save: numbers and arrays of NumPy, paths, and the namespace of ``argparse``. None of
    these is made: an empty object stands in its place.

    Returns:
        Where it stands in the file (keys joined by dots; empty for the file itself) -> state dict. Averaged weights,
        under keys such as ``ema`` or ``state_dict_ema``, come first: they are what such a training is for.

    Raises:
        UserError: no such file, a PyTorch file without the flag, or a file that holds no state dict, or more than
            weights.
    """
    path = Path(path)
    if not is_file(path):
        raise UserError(f"There is no weights file {path}; paths in a recipe start from the recipe's folder.")
    if path.suffix == ".safetensors":
        return {"": load_tensors(path)[0]}
    if foreign := _foreign_format(path):
        raise UserError(f"{path} {foreign}")
    if not allow_pt:
        raise UserError(
            f"{path} is not a .safetensors file. PyTorch's own format is read only where you allow it "
            "(teacher.allow_pt: true in the recipe, or --set teacher.allow_pt=true; student.allow_pt for a student's)."
        )
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_STAND_INS):
            warnings.simplefilter("ignore")  # of foreign pickle protocols; what does not fit is refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises anything
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise UserError(
            f"{path} was refused: it is damaged, or holds more than weights"
            + (f" (an object of {named[1]})" if named else "")
            + " and wants to run code. Save the state dict alone, best as .safetensors."
        ) from error
    found = dict(sorted(_state_dicts(content), key=lambda item: not is_averaged(item[0])))
    if not found:
        raise UserError(f"{path} holds {_no_state_dict(content)}; save model.state_dict().")
    return found


def _no_state_dict(content: Any) -> str:
    """What stands in a file in the place of a state dict, for a message."""
    if isinstance(content, Mapping | list | tuple) and not content:
        return "nothing"
    if not isinstance(content, Mapping):
        return f"no state dict (names and tensors) but {type(content).__name__}"
    if any(type(value).__name__ == "ndarray" for value in content.values()):
        return "arrays of NumPy in the place of tensors, which are not read"
    return f"no state dict (names and tensors) but {', '.join(map(str, list(content)[:8]))}"


_FOREIGN_SUFFIXES = {
    ".onnx": "is an ONNX file, a network with its weights; name it as the model (model: FILE.onnx), without weights.",
    **dict.fromkeys((".h5", ".keras", ".tflite", ".pb"), "is a file of TensorFlow; convert the network to ONNX first."),
    **dict.fromkeys((".engine", ".trt", ".plan"), "is compiled for TensorRT; name the weights it was made from."),
}


def _foreign_format(path: Path) -> str | None:
    """What a file is that holds a compiled network or one of another framework, and what would be right."""
    if path.suffix.lower() in _FOREIGN_SUFFIXES:
        return _FOREIGN_SUFFIXES[path.suffix.lower()]
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    what = None
    if any(name.startswith("code/") for name in names) and "constants.pkl" in names:
        what = "TorchScript (torch.jit.save)"
    elif "archive_format" in names or any("exported_program" in name for name in names):
        what = "an exported program (torch.export.save)"
    return what and (
        f"is {what}, compiled and no state dict; save the network's own: torch.save(model.state_dict(), ...), best as "
        f".safetensors."
    )


def is_averaged(name: str) -> bool:
    """Whether a key, or the name of a module, speaks of weights that are averaged over a training."""
    return bool(re.search(r"(?:^|[._])(?:ema|swa|averaged?|avg|shadow)(?:$|[._])", name.lower()))


def _state_dicts(content: Any, place: str = "", depth: int = 5) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The state dicts of nested dicts and lists, without those of optimisers."""
    if isinstance(content, list | tuple):
        content = {str(position): value for position, value in enumerate(content) if isinstance(value, Mapping)}
    if not isinstance(content, Mapping) or not depth or re.search("optim|sched|scaler", place.lower()):
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors and (len(tensors) == len(content) or any("." in name for name in tensors)):
        metadata = getattr(content, "_metadata", None)
        state = OrderedDict(tensors)
        if isinstance(metadata, Mapping):
            state._metadata = metadata  # type: ignore[attr-defined]
        yield place, state
    for name, value in content.items():
        if isinstance(name, str):
            yield from _state_dicts(value, f"{place}.{name}" if place else name, depth - 1)


class _PassedOver:
    """In the place of a value beside the weights: takes what a file says about it, and keeps and runs nothing."""

    def __new__(cls, *_arguments: Any) -> _PassedOver:
        return super().__new__(cls)

    def __init__(self, *_arguments: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


# NumPy's own functions would trust the file: a type of its making can take any number for an address.
_PLAIN_VALUES = {
    **{
        f"numpy.{core}.multiarray.{function}": kind
        for core in ("core", "_core")
        for function, kind in (("scalar", "number"), ("_reconstruct", "ndarray"))
    },
    **{f"numpy.{kind}": kind for kind in ("ndarray", "dtype")},
    **{
        f"{module}.{kind}": kind
        for module in ("pathlib", "pathlib._local")
        for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
    "argparse.Namespace": "Namespace",
}
_STAND_INS: list[Any] = [(type(kind, (_PassedOver,), {}), name) for name, kind in _PLAIN_VALUES.items()]
