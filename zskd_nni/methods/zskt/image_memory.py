"""Images of earlier rounds that a student goes on learning from, beside some that stay throughout.

A generator that is trained against a student forgets what it made before, and a student forgets what it no longer sees
(CMI: Fang et al., IJCAI 2021, 2105.08584, keeps all images; this keeps the latest).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zskd_nni.runtime.device import to_device
from zskd_nni.runtime.errors import UserError

MOST_BYTES = 2**30


def that_fit(count: int, shape: tuple[int, int, int]) -> int:
    """So many of ``count`` images ``(C, H, W)`` as a GiB holds in half precision; they are in every checkpoint, too."""
    return min(count, MOST_BYTES // (2 * math.prod(shape)))


class ImageMemory:
    """A ring of images in half precision, finer than eight bits.

    Args:
        room: images that can be put in; then the oldest leave.
        lasting: ``(L, C, H, W)`` images that never leave; L may be 0, shape and device are the memory's own.

    Attributes:
        kept: how many of those put in are there.
        next_place: of the ring, where the next one goes.
    """

    def __init__(self, room: int, lasting: Tensor) -> None:
        self.room, self.lasting = room, len(lasting)
        self.kept, self.next_place = 0, 0
        self.images = torch.zeros((room + len(lasting), *lasting.shape[1:]), dtype=torch.float16, device=lasting.device)
        self.images[room:] = lasting.half()

    def put(self, images: Tensor) -> None:
        """``(N, C, H, W)`` in the places of the oldest where there is no other room; the last ``room`` of more."""
        places = (self.next_place + torch.arange(len(images), device=images.device)) % self.room
        self.images[places[-self.room :]] = images[-self.room :].half()
        self.kept = min(self.room, self.kept + len(images))
        self.next_place = (self.next_place + len(images)) % self.room

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        """``(count, C, H, W)`` float32, every image as likely as any other, with repetition."""
        places = torch.randint(self.kept + self.lasting, (count,), generator=random)
        places = torch.where(places < self.kept, places, places - self.kept + self.room)
        return self.images[to_device(places, self.images.device)].float()

    def state_dict(self) -> dict[str, Any]:
        """Those put in, and the next place; the lasting ones are their maker's."""
        return {"images": self.images[: self.kept].clone(), "next_place": self.next_place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave of a memory of this size.

        Raises:
            UserError: it is a larger memory's, or one of other images.
        """
        images = state["images"].to(self.images.device)
        if len(images) > self.room or images.shape[1:] != self.images.shape[1:]:
            raise UserError(
                "The checkpoint holds another memory of images than this transfer source's: it is another's."
            )
        self.images[: len(images)] = images
        self.kept, self.next_place = len(images), int(state["next_place"])
