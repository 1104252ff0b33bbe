"""Images of several safetensors files, read when they are indexed: memory does not grow with their number."""

from __future__ import annotations

import errno
import json
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zskd_nni.runtime.errors import UserError

_TOO_MANY = (errno.EMFILE, errno.ENFILE)
_OPEN_FILES = 256  # of the 1,024 that a process usually may have


@dataclass(frozen=True)
class ImageFile:
    """The images of one file.

    Attributes:
        path: a safetensors file with a float16 tensor ``images``.
        count: how many images.
        offset: of the first image's first byte in the file.
        written: size and time of the file when it was checked.
    """

    path: Path
    count: int
    offset: int
    written: tuple[int, int]

    @classmethod
    def of(cls, path: Path, count: int) -> ImageFile:
        """Describe a file whose content has been checked."""
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")  # safetensors: a JSON header after its length
            header = json.loads(file.read(length))
        return cls(path, count, 8 + length + header["images"]["data_offsets"][0], _size_and_time(path))


class LazyImages:
    """``(N, C, H, W)`` float16 on disk, indexed by rows as a tensor is.

    Args:
        files: in order.
        shape: ``(C, H, W)``.
    """

    device = torch.device("cpu")  # of what is read

    def __init__(self, files: Sequence[ImageFile], shape: Sequence[int]) -> None:
        self.files = list(files)
        ends = list(accumulate(file.count for file in self.files))
        self.shape = torch.Size((ends[-1] if ends else 0, *shape))
        self._firsts = np.array([0, *ends])
        self._bytes = 2 * int(np.prod(shape))
        self._handles: dict[int, int] = {}  # by number of the file, the one opened first in front
        weakref.finalize(self, _close, self._handles)

    def __reduce__(self) -> tuple[type[LazyImages], tuple[Sequence[ImageFile], Sequence[int]]]:
        return LazyImages, (self.files, tuple(self.shape[1:]))  # a copy opens files of its own

    def __len__(self) -> int:
        return self.shape[0]

    @classmethod
    def concatenate(cls, parts: Sequence[LazyImages]) -> LazyImages:
        """The images of several sets, one after the other; all of one shape."""
        return cls([file for part in parts for file in part.files], parts[0].shape[1:])

    def first(self, count: int) -> LazyImages:
        """The first ``count`` images."""
        kept = [
            replace(file, count=min(file.count, count - first))
            for file, first in zip(self.files, self._firsts.tolist(), strict=False)
            if first < count
        ]
        return LazyImages(kept, self.shape[1:])

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """The images ``(n, C, H, W)`` float16 at ``rows`` (integers from 0), or of a slice.

        Raises:
            UserError: a file was changed or removed since it was checked.
        """
        index = np.arange(len(self))[rows] if isinstance(rows, slice) else rows.numpy()
        images = torch.empty((len(index), *self.shape[1:]), dtype=torch.float16)
        if not len(index):
            return images
        content = images.numpy().data.cast("B")
        numbers = np.searchsorted(self._firsts, index, side="right") - 1
        positions = index - self._firsts[numbers]
        for row, (number, position) in enumerate(zip(numbers.tolist(), positions.tolist(), strict=True)):
            file, target = self.files[number], content[row * self._bytes : (row + 1) * self._bytes]
            if _read(self._handle(number), target, file.offset + position * self._bytes) != self._bytes:
                raise _changed(file.path)
        return images

    def _handle(self, number: int) -> int:
        if number in self._handles:
            return self._handles[number]
        file = self.files[number]
        try:
            if _size_and_time(file.path) != file.written:
                raise _changed(file.path)
            if len(self._handles) >= _OPEN_FILES:
                self._close_oldest()
            self._handles[number] = self._open(file.path)
        except OSError as error:
            if error.errno not in _TOO_MANY:
                raise _changed(file.path) from error
            raise UserError(
                f"{file.path} cannot be opened: this process has too many open files. Raise the limit (ulimit -n)."
            ) from error
        return self._handles[number]

    def _open(self, path: Path) -> int:
        while True:
            try:
                return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            except OSError as error:
                if error.errno not in _TOO_MANY or not self._handles:
                    raise
                self._close_oldest()

    def _close_oldest(self) -> None:
        os.close(self._handles.pop(next(iter(self._handles))))


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _changed(path: Path) -> UserError:
    return UserError(
        f"{path} was changed or removed while its images were in use. Run the same command again: it makes that file "
        "again and continues."
    )


def _read(handle: int, target: memoryview, position: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(handle, (target,), position)  # one system call and no copy
    os.lseek(handle, position, os.SEEK_SET)
    content = os.read(handle, len(target))
    target[: len(content)] = content
    return len(content)


def _close(handles: dict[int, int]) -> None:
    for handle in handles.values():
        os.close(handle)
