"""Images of several safetensors files, read when they are indexed: memory does not grow with their number."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zskd_nni.runtime.errors import UserError


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
            return cls(path, count, 8 + length + header["images"]["data_offsets"][0], _size_and_time(file.fileno()))


class LazyImages:
    """``(N, C, H, W)`` float16 on disk, indexed by rows as a tensor is. No file stays open.

    Args:
        files: in order.
        shape: ``(C, H, W)``.
    """

    device = torch.device("cpu")  # of what is read

    def __init__(self, files: Sequence[ImageFile], shape: Sequence[int]) -> None:
        self.files = list(files)
        self._firsts = np.array([0, *accumulate(file.count for file in self.files)])
        self.shape = torch.Size((int(self._firsts[-1]), *shape))

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
        numbers = np.searchsorted(self._firsts, index, side="right") - 1
        for number in np.unique(numbers):
            places = np.flatnonzero(numbers == number)
            _read_into(images, places, self.files[number], index[places] - self._firsts[number])
        return images


def _read_into(images: Tensor, places: np.ndarray, file: ImageFile, positions: np.ndarray) -> None:
    """Read the images at ``positions`` of a file into the rows ``places`` of a tensor."""
    content, size = images.numpy().data.cast("B"), images[0].nbytes
    try:
        with open(file.path, "rb", buffering=0) as opened:
            intact = _size_and_time(opened.fileno()) == file.written
            for place, position in zip(places.tolist(), positions.tolist(), strict=True):
                opened.seek(file.offset + position * size)
                intact = intact and opened.readinto(content[place * size : (place + 1) * size]) == size
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise UserError(
                f"{file.path} cannot be opened: this process has too many open files. Raise the limit (ulimit -n)."
            ) from error
        intact = False
    if not intact:
        raise UserError(
            f"{file.path} was changed or removed while its images were in use. Run the same command again: it makes "
            "that file again and continues."
        )


def _size_and_time(handle: int) -> tuple[int, int]:
    status = os.fstat(handle)
    return status.st_size, status.st_mtime_ns
