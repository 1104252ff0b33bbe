"""Reading and writing so that nothing is half-written and nothing that is read can run code."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from zskd_nni.errors import UserError

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write ``data`` so that ``path`` holds either its old content or all of the new.

    Raises:
        UserError: the disk is full, the folder is read-only or gone. What was there before is still there.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove_quietly(temporary)
    try:
        with open(temporary, "xb") as file:  # never through a link that somebody put there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        _remove_quietly(temporary)
        raise UserError(_write_failure(path, error)) from error
    except BaseException:
        _remove_quietly(temporary)
        raise


def _remove_quietly(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _write_failure(path: Path, error: OSError) -> str:
    kept = "What was finished before is kept; run the same command again once this is mended."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: {path} could not be written. Free some space. {kept}"
    if error.errno == errno.EFBIG:
        return f"{path} could not be written: it would be larger than the limit on file sizes. {kept}"
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"{path} could not be written: the folder {path.parent} cannot be written to. {kept}"
    if error.errno == errno.ENOENT:
        return f"{path} could not be written: the folder {path.parent} is not there. {kept}"
    return f"{path} could not be written ({error.strerror}). {kept}"


def make_folder(path: str | Path) -> Path:
    """Create ``path`` and its parents if need be.

    Raises:
        UserError: a file stands in the way, or the place cannot be written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{path} cannot be used as a folder: a file of that name stands in the way.") from error
    except OSError as error:
        raise UserError(f"The folder {path} could not be made ({error.strerror}).") from error
    return path


class FolderInUseError(UserError):
    """Another run is at work in the folder."""


@contextlib.contextmanager
def only_writer(folder: Path, name: str = "") -> Iterator[None]:
    """Within the block no other run writes into ``folder``; what a killed one left half-written is removed.

    The lock is the operating system's and goes with its process, however that ends.

    Args:
        folder: must be there.
        name: of what is written, where several runs share the folder: only the files whose names begin so are owned.

    Raises:
        FolderInUseError: another run is at work there.
        UserError: the folder cannot be written to.
    """
    lock = filelock.FileLock(_lock_path(folder, name))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise _in_use(folder) from error
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written to ({error.strerror}).") from error
    try:
        remove_leftovers(folder, name)
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def one_of_the_writers(folder: Path, first: bool) -> Iterator[None]:
    """As :func:`only_writer`, for processes that share the work: each of them holds the same lock as long as it lives.

    Args:
        folder: must be there.
        first: whether this is the one that comes before the others: it must find the folder free, and cleans it.

    Raises:
        FolderInUseError: another run is at work there.
        UserError: the folder cannot be written to.
    """
    import fcntl  # not on every system, as torchrun

    try:
        lock = os.open(_lock_path(folder), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written to ({error.strerror}).") from error
    try:
        try:
            if first:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_leftovers(folder)
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _in_use(folder) from error
        except OSError as error:
            raise UserError(
                f"The folder {folder} cannot be locked ({error.strerror}), and several processes cannot share it then; "
                "choose a file system with flock."
            ) from error
        yield
    finally:
        os.close(lock)


def _lock_path(folder: Path, name: str = "") -> Path:
    path = folder / (f".{name}.lock" if name else ".lock")
    if path.is_symlink():  # taking the lock empties the file
        raise UserError(f"{path} is a link; the folder {folder} is not locked through it. Remove the link.")
    return path


def _in_use(folder: Path) -> FolderInUseError:
    return FolderInUseError(f"Another run is at work in {folder}; wait for it, or use another folder.")


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove what killed runs left half-written in ``folder``; only its one writer may call this."""
    for entry in folder.glob(f".{glob.escape(name)}.*.tmp" if name else ".*.tmp"):
        if _TEMPORARY.fullmatch(entry.name) and (entry.is_symlink() or entry.is_file()):
            _remove_quietly(entry)


def is_file(path: Path) -> bool:
    """Whether ``path`` is a file that can be looked at; a name that no file can have is not one."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.") from error
    except RecursionError as error:
        raise UserError(f"{path} cannot be read as JSON: it is nested too deeply.") from error
    except (OSError, ValueError) as error:  # also no UTF-8, and numbers too long for a number
        raise UserError(f"{path} cannot be read as JSON ({error}).") from error


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as indented JSON, atomically."""
    write_atomic(path, json.dumps(content, indent=2, sort_keys=False) + "\n")


def sha256_of_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_bytes(data: bytes) -> str:
    """SHA-256 of ``data``, as hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def plain(value: Any) -> Any:
    """``value`` as JSON has it: tuples become lists."""
    return json.loads(json.dumps(value))


def fingerprint_of(content: Any) -> str:
    """SHA-256 of a JSON-able value, independent of the order of its keys."""
    return sha256_of_bytes(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write named tensors as safetensors, atomically; returns the SHA-256 of the file."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors_bytes(_without_sharing(ready), metadata)
    write_atomic(path, data)
    return sha256_of_bytes(data)


def _without_sharing(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory; tied weights are written once for each of their names.
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return result


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Named tensors and metadata of a safetensors file.

    Raises:
        UserError: the file is missing, or is not a sound safetensors file.
    """
    path = Path(path)
    if not is_file(path):
        raise UserError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, metadata
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not a sound safetensors file ({error}).") from error


_SEAL = "sha256"


def save_sealed(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """As :func:`save_tensors`, with a checksum of the content inside, for :func:`load_sealed`."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(path, plain, {**metadata, _SEAL: _seal(plain, metadata)})


def load_sealed(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata that :func:`save_sealed` wrote.

    Raises:
        UserError: the file is missing, not sound, or not as it was written.
    """
    tensors, metadata = load_tensors(path)
    seal = metadata.pop(_SEAL, None)
    # Copies: what was read is a window on the file, which somebody may damage meanwhile.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if seal != _seal(tensors, metadata):
        raise UserError(f"{path} is not as it was written: its checksum differs. Remove the file to start over.")
    return tensors, metadata


def _seal(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights(path: str | Path, allow_pt: bool = False) -> dict[str, Tensor]:
    """A state dict from ``.safetensors``, or from a PyTorch file where ``allow_pt`` says so.

    PyTorch files are read with ``weights_only=True``; nothing in them is run.

    Raises:
        UserError: no such file, a PyTorch file without the flag, or a file that holds more than weights.
    """
    path = Path(path)
    if not is_file(path):
        raise UserError(f"There is no weights file {path}; a recipe's paths are meant from its own folder.")
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    if not allow_pt:
        raise UserError(
            f"{path} is not a .safetensors file. PyTorch's own format is read only where you allow it "
            "(teacher.allow_pt: true in the recipe, or --set teacher.allow_pt=true; student.allow_pt for a student's)."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pickle protocols; what does not fit is refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle raises anything
        raise UserError(
            f"{path} was refused: it is damaged, or holds more than weights and wants to run code. "
            "Save the state dict alone, best as .safetensors."
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    entries = content.items() if isinstance(content, dict) else [(None, content)]
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in entries):
        raise UserError(f"{path} holds no state dict (names and tensors); save model.state_dict().")
    return content
