"""Atomic writes, JSON and checksums."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from zskd_nni.runtime.errors import UserError

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write ``data`` so that ``path`` holds either its old content or all of the new.

    Raises:
        UserError: the disk is full, or the folder is read-only or missing. The old content is still there.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove_quietly(temporary)
    try:
        with open(temporary, "xb") as file:  # never through a link that is in its place
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        _remove_quietly(temporary)
        if isinstance(error, OSError):
            raise UserError(_write_failure(path, error)) from error
        raise


def _remove_quietly(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _write_failure(path: Path, error: OSError) -> str:
    kept = "What was finished before is kept; run the same command again once this is fixed."
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


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove half-written files of killed runs in ``folder``; only its one writer may call this."""
    for entry in folder.glob(f".{glob.escape(name)}.*.tmp" if name else ".*.tmp"):
        if _TEMPORARY.fullmatch(entry.name) and (entry.is_symlink() or entry.is_file()):
            _remove_quietly(entry)


def is_file(path: Path) -> bool:
    """Whether ``path`` is a file; False for a name that is not a valid file name."""
    return os.path.isfile(path)


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
    except (OSError, ValueError) as error:  # also of text that is not UTF-8, and of too long numbers
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
    """``value`` as JSON returns it: tuples become lists."""
    return json.loads(json.dumps(value))


def fingerprint_of(content: Any) -> str:
    """SHA-256 of a JSON-able value, independent of the order of its keys."""
    return sha256_of_bytes(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
