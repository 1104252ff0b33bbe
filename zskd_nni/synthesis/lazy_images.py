"""The images of a store, read from its files when they are asked for: memory does not grow with their number."""

from __future__ import annotations

import errno
import json
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zskd_nni.runtime.errors import UserError

_TOO_MANY = (errno.EMFILE, errno.ENFILE)
_OPEN_FILES = 256  # of the 1,024 that a process usually may have


@dataclass(frozen=True)
class ShardImages:
    """Where the images of one shard lie.

    Attributes:
        path: a safetensors file.
        count: how many images.
        offset: of the first one's first byte in the file.
        written: size and time of the file when it was checked.
    """

    path: Path
    count: int
    offset: int
    written: tuple[int, int]

    @classmethod
    def of(cls, path: Path, count: int) -> ShardImages:
        """Of a shard that was found sound."""
        status = path.stat()
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")  # safetensors: a JSON header behind its length
            header = json.loads(file.read(length))
        offset = 8 + length + header["images"]["data_offsets"][0]
        return cls(path, count, offset, (status.st_size, status.st_mtime_ns))


class StoredImages:
    """``(N, C, H, W)`` float16 on disk, to be indexed by rows as a tensor is.

    Args:
        shards: in order.
        shape: ``(C, H, W)``.
    """

    device = torch.device("cpu")  # where what is read arrives

    def __init__(self, shards: Sequence[ShardImages], shape: Sequence[int]) -> None:
        self.shards = list(shards)
        self.shape = torch.Size((sum(shard.count for shard in self.shards), *shape))
        self._firsts = np.array([0, *accumulate(shard.count for shard in self.shards)])
        self._bytes = 2 * int(np.prod(shape))
        self._files: dict[int, int] = {}  # handles, those opened first in front
        weakref.finalize(self, _close, self._files)

    def __reduce__(self) -> tuple[type[StoredImages], tuple[Sequence[ShardImages], Sequence[int]]]:
        return StoredImages, (self.shards, tuple(self.shape[1:]))  # a copy opens files of its own

    def __len__(self) -> int:
        return self.shape[0]

    def first(self, count: int) -> StoredImages:
        """The first ``count`` of them."""
        kept, left = [], count
        for shard in self.shards:
            if left > 0:
                kept.append(ShardImages(shard.path, min(left, shard.count), shard.offset, shard.written))
            left -= shard.count
        return StoredImages(kept, self.shape[1:])

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
        for place, (number, position) in enumerate(zip(numbers.tolist(), positions.tolist(), strict=True)):
            shard, room = self.shards[number], content[place * self._bytes : (place + 1) * self._bytes]
            if _read(self._file(number), room, shard.offset + position * self._bytes) != self._bytes:
                raise _changed(shard.path)
        return images

    def _file(self, number: int) -> int:
        file = self._files.get(number)
        if file is None:
            shard = self.shards[number]
            try:
                status = shard.path.stat()
                if (status.st_size, status.st_mtime_ns) != shard.written:
                    raise _changed(shard.path)
                if len(self._files) >= _OPEN_FILES:
                    self._close_oldest()
                file = self._opened(shard.path)
            except OSError as error:
                if error.errno in _TOO_MANY:
                    raise UserError(
                        f"{shard.path} cannot be opened: this process has too many open files. Raise the limit "
                        "(ulimit -n)."
                    ) from error
                raise _changed(shard.path) from error
            self._files[number] = file
        return file

    def _opened(self, path: Path) -> int:
        while True:
            try:
                return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            except OSError as error:
                if error.errno not in _TOO_MANY or not self._files:
                    raise
                self._close_oldest()

    def _close_oldest(self) -> None:
        os.close(self._files.pop(next(iter(self._files))))


def _changed(path: Path) -> UserError:
    return UserError(
        f"{path} was changed or removed while its images were in use. Run the same command again: it makes that shard "
        "anew and goes on."
    )


def _read(file: int, room: memoryview, position: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file, (room,), position)  # one call of the system, and no copy
    os.lseek(file, position, os.SEEK_SET)
    content = os.read(file, len(room))
    room[: len(content)] = content
    return len(content)


def _close(files: dict[int, int]) -> None:
    for file in files.values():
        os.close(file)


def joined(parts: Sequence[StoredImages]) -> StoredImages:
    """The images of several stores, one after the other; all of one shape."""
    return StoredImages([shard for part in parts for shard in part.shards], parts[0].shape[1:])
