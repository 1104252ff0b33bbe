"""Locks that allow one writer per folder and end with their process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import remove_leftovers


class FolderInUseError(UserError):
    """Another run works in the folder."""


@contextlib.contextmanager
def only_writer(folder: Path, name: str = "") -> Iterator[None]:
    """Within the block no other run writes into ``folder``; half-written files of a killed run are removed.

    The operating system releases the lock when the process ends, in whatever way.

    Args:
        folder: must exist.
        name: where several runs share the folder: the lock is on files whose names begin with it.

    Raises:
        FolderInUseError: another run works there.
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
    """As :func:`only_writer`, for processes that share the work: all hold the same lock as long as they live.

    Args:
        folder: must exist.
        first: whether this process comes first. It must find the folder free, and removes half-written files.

    Raises:
        FolderInUseError: another run works there.
        UserError: the folder cannot be written to.
    """
    import fcntl  # exists where torchrun does

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
