"""Transfer sources: on which inputs shall the student imitate the teacher?

Every method answers that one question, so that a stored set of impressions, a balanced arbitrary set and a live
generator differ only behind this interface.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from zskd_nni.errors import UserError
from zskd_nni.inputs import InputSpec
from zskd_nni.seeds import generator


@runtime_checkable
class TransferSource(Protocol):
    """Yields batches of images for a student at a step.

    Attributes:
        size: how many distinct images it holds, or None for a stream.
        batch_size: images in a batch.
        fingerprint: says which images these are; a checkpoint of a run on other images is refused.
    """

    size: int | None
    batch_size: int
    fingerprint: str

    def batch(self, step: int, random: torch.Generator, student: nn.Module | None = None) -> Tensor:
        """Images ``(batch_size, C, H, W)`` in the teacher's value range for ``step`` (from 0)."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What must be saved so that the source can go on; empty for a source that depends on the step alone."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what :meth:`state_dict` gave."""
        ...


class Images(Protocol):
    """``(N, C, H, W)``, in memory (a tensor) or elsewhere."""

    @property
    def device(self) -> torch.device:
        """Where what is asked for arrives."""
        ...

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """Those at ``rows``."""
        ...


class _Stateless:
    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise UserError("This transfer source keeps no state, but the checkpoint holds some: it is another's.")


class StoredSource(_Stateless):
    """A fixed set of images, drawn in a fresh order every epoch.

    Args:
        images: ``(N, C, H, W)`` in the teacher's value range, of any float type; kept where they are, be that in
            memory or on disk.
        batch_size: images in a batch; a smaller set gives all its images.
        seed: names the orders.
        fingerprint: of the images.
    """

    def __init__(self, images: Images, batch_size: int, seed: int, fingerprint: str) -> None:
        if len(images) == 0:
            raise UserError("The transfer set is empty; a student cannot be taught on no images.")
        self.images = images
        self.size: int | None = len(images)
        self.batch_size = min(batch_size, len(images))
        self.seed = seed
        self.fingerprint = fingerprint
        self._per_epoch = len(images) // self.batch_size
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def batch(self, step: int, random: torch.Generator, student: nn.Module | None = None) -> Tensor:
        """Images ``(batch_size, C, H, W)``, none of the set twice an epoch.

        What is left of an epoch's order and fills no batch is not shown in it: less than a batch, others each time.
        """
        epoch, position = divmod(step, self._per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, torch.randperm(len(self.images), generator=generator(self.seed, "order", epoch)))
        index = self._order[1][position * self.batch_size : (position + 1) * self.batch_size]
        return self.images[index.to(self.images.device)].float()


class NoiseSource(_Stateless):
    """A stream of uniform noise: the control that any method must beat.

    Args:
        spec: shape and value range.
        batch_size: images in a batch.
    """

    def __init__(self, spec: InputSpec, batch_size: int) -> None:
        self.spec = spec
        self.size: int | None = None
        self.batch_size = batch_size
        self.fingerprint = "uniform noise"

    def batch(self, step: int, random: torch.Generator, student: nn.Module | None = None) -> Tensor:
        """Fresh noise ``(batch_size, C, H, W)``."""
        noise = torch.rand((self.batch_size, *self.spec.shape), generator=random)
        return noise.mul_(self.spec.high - self.spec.low).add_(self.spec.low)
