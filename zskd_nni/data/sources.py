"""Transfer sources: the inputs on which the student imitates the teacher.

A stored set of impressions, a balanced arbitrary set and a live generator have the same interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from zskd_nni.data.lazy_images import LazyImages
from zskd_nni.data.procedural import start_images
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.runtime.device import to_device
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import fingerprint_of
from zskd_nni.runtime.rng import generator

_SHARE_OF_MEMORY = 0.25  # of what is free on a GPU, for the images of a set
_ROWS_AT_ONCE = 1000


@runtime_checkable
class TransferSource(Protocol):
    """Gives the batch of images of a step.

    Attributes:
        size: how many distinct images it holds, or None for a stream.
        batch_size: images in a batch.
        fingerprint: identifies the images; a checkpoint of a run on other images is refused.
    """

    size: int | None
    batch_size: int
    fingerprint: str

    def batch(self, step: int, random: torch.Generator, student: nn.Module | None = None) -> Tensor:
        """Images ``(batch_size, C, H, W)`` in the teacher's value range for ``step`` (from 0)."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: nested tensors and plain values; empty if batches depend only on the step."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""


class EpochOrder:
    """The rows of a set that each step takes: a fresh order every epoch, each row at most once an epoch.

    An epoch leaves out the rows that fill no whole batch: fewer than a batch, other ones each time.

    Args:
        count: rows of the set.
        batch_size: rows a step; a smaller set gives all its rows.
        seed: names the random streams of the orders.

    Example:
        >>> order = EpochOrder(count=10, batch_size=4, seed=0)
        >>> order.batches, len({*order.rows(0).tolist(), *order.rows(1).tolist()})
        (2, 8)
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, min(batch_size, count), seed
        self.batches = count // self.batch_size  # an epoch
        self._epoch, self._order = -1, torch.empty(0)

    def rows(self, step: int, device: torch.device | str = "cpu") -> Tensor:
        """Indices ``(batch_size,)`` int64 of a step (from 0), on ``device``."""
        epoch, position = divmod(step, self.batches)
        if self._epoch != epoch:
            order = torch.randperm(self.count, generator=generator(self.seed, "order", epoch))
            self._epoch, self._order = epoch, to_device(order, device)
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]


class _Stateless:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise UserError(
                "This transfer source keeps no state, but the checkpoint holds some: it is another source's."
            )


class StoredSource(_Stateless):
    """A fixed set of images, drawn in a fresh order every epoch.

    Args:
        images: ``(N, C, H, W)`` in the teacher's value range, of any float type, in memory or on disk.
        batch_size: images in a batch; a smaller set gives all its images.
        seed: names the random streams of the orders.
        fingerprint: of the images.
        device: of the batches. The first batch copies all images to a GPU that has room for them, so that no step
            waits for the host.

    Example:
        >>> source = StoredSource(torch.rand(10, 1, 8, 8), batch_size=4, seed=0, fingerprint="ten images")
        >>> source.size, source.batch(0, torch.Generator()).shape
        (10, torch.Size([4, 1, 8, 8]))
    """

    def __init__(
        self,
        images: Tensor | LazyImages,
        batch_size: int,
        seed: int,
        fingerprint: str,
        device: torch.device | str = "cpu",
    ) -> None:
        if len(images) == 0:
            raise UserError("The transfer set is empty; a student cannot be trained without images.")
        self.images = images
        self.size: int | None = len(images)
        self.seed, self.fingerprint = seed, fingerprint
        self.device, self._cached = torch.device(device), False
        self._order = EpochOrder(len(images), batch_size, seed)
        self.batch_size = self._order.batch_size

    def batch(self, step: int, random: torch.Generator, student: nn.Module | None = None) -> Tensor:
        """Images ``(batch_size, C, H, W)``, each at most once an epoch."""
        if not self._cached:
            self.images, self._cached = cache_on_device(self.images, self.device), True
        return self.images[self._order.rows(step, self.images.device)].float()


class DrawnSource(_Stateless):
    """A small set of images from which every batch is drawn with replacement.

    Args:
        images: ``(N, C, H, W)`` in the teacher's value range.
        batch_size: images in a batch; may be more than N.
        fingerprint: of the images.

    Example:
        >>> DrawnSource(torch.rand(2, 1, 8, 8), 4, "two images").batch(0, torch.Generator()).shape
        torch.Size([4, 1, 8, 8])
    """

    def __init__(self, images: Tensor, batch_size: int, fingerprint: str) -> None:
        self.images, self.batch_size, self.fingerprint = images, batch_size, fingerprint
        self.size: int | None = None

    def batch(self, step: int, random: torch.Generator, student: nn.Module | None = None) -> Tensor:
        """Images ``(batch_size, C, H, W)``."""
        return self.images[torch.randint(len(self.images), (self.batch_size,), generator=random)]


class MixedSource:
    """Batches of one source in which shares of the images come from other ones.

    Args:
        source: gives the rest of each batch.
        further: the other sources, and the share of each batch, in (0, 1), that each of them gives: the last images, in
            order. Every source gives at least one image.

    Raises:
        UserError: a batch has fewer images than there are sources.

    Example:
        >>> spec = InputSpec((3, 32, 32))
        >>> black = DrawnSource(torch.zeros(2, 3, 32, 32), 8, "two black images")
        >>> mixed = MixedSource(NoiseSource(spec, 8), [(black, 0.25)])
        >>> mixed.batch(0, torch.Generator()).flatten(1).any(1).tolist()
        [True, True, True, True, True, True, False, False]
    """

    def __init__(self, source: TransferSource, further: Sequence[tuple[TransferSource, float]]) -> None:
        if source.batch_size <= len(further):
            raise UserError(
                f"Batches of {source.batch_size} cannot have images of {len(further) + 1} sources (transfer.fresh, "
                "transfer.also); make distillation.batch larger."
            )
        self.source, self.further = source, list(further)
        self.size, self.batch_size = source.size, source.batch_size
        others = [value for other, share in further for value in (other.fingerprint, share)]
        self.fingerprint = fingerprint_of([source.fingerprint, *others])

    def batch(self, step: int, random: torch.Generator, student: nn.Module | None = None) -> Tensor:
        """Images ``(batch_size, C, H, W)``."""
        batch, parts = self.source.batch(step, random, student), []
        left = len(batch)
        for waiting, (other, share) in zip(range(len(self.further), 0, -1), self.further, strict=True):
            count = min(max(1, round(share * len(batch))), left - waiting)
            parts.append(to_device(other.batch(step, random, student)[:count], batch.device))
            left -= count
        return torch.cat([batch[:left], *parts])

    def state_dict(self) -> dict[str, Any]:
        """The first source's state; the others have none."""
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.source.load_state_dict(state)


def cache_on_device(images: Tensor | LazyImages, device: torch.device) -> Tensor | LazyImages:
    """The images in the GPU's memory if they fill at most a quarter of what is free; otherwise unchanged."""
    if device.type == "cpu" or images.device.type != "cpu":
        return images
    one = images[torch.zeros(1, dtype=torch.long)]
    free_memory = getattr(torch.get_device_module(device), "mem_get_info", None)  # not every kind of device has it
    size = len(images) * one.numel() * one.element_size()
    if free_memory is None or size > free_memory(device)[0] * _SHARE_OF_MEMORY:
        return images
    cached = torch.empty((len(images), *one.shape[1:]), dtype=one.dtype, device=device)
    for rows in torch.arange(len(images)).split(_ROWS_AT_ONCE):
        cached[int(rows[0]) : int(rows[-1]) + 1] = images[rows].to(device)
    return cached


class ProceduralSource(_Stateless):
    """A stream of procedural images, new ones at every step.

    Args:
        kind: one of :data:`zskd_nni.data.procedural.KINDS`.
        spec: shape and value range.
        batch_size: images in a batch.

    Example:
        >>> ProceduralSource("leaves", InputSpec((3, 32, 32)), 16).batch(0, torch.Generator()).shape
        torch.Size([16, 3, 32, 32])
    """

    def __init__(self, kind: str, spec: InputSpec, batch_size: int) -> None:
        self.kind, self.spec = kind, spec
        self.size: int | None = None
        self.batch_size = batch_size
        self.fingerprint = f"procedural {kind}"

    def batch(self, step: int, random: torch.Generator, student: nn.Module | None = None) -> Tensor:
        """Fresh images ``(batch_size, C, H, W)``."""
        return start_images(self.kind, self.batch_size, self.spec, random)[0]


class NoiseSource(ProceduralSource):
    """A stream of uniform noise: the control that every method must beat.

    Args:
        spec: shape and value range.
        batch_size: images in a batch.

    Example:
        >>> NoiseSource(InputSpec((1, 32, 32)), 16).batch(0, torch.Generator()).shape
        torch.Size([16, 1, 32, 32])
    """

    def __init__(self, spec: InputSpec, batch_size: int) -> None:
        super().__init__("uniform", spec, batch_size)
        self.fingerprint = "uniform noise"
