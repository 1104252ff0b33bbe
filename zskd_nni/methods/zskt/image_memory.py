"""A memory of images of earlier rounds, from which the student's batches are drawn.

A generator that is trained against a student does not make its earlier images again, and the student forgets what it no
longer sees. CMI (Fang et al., IJCAI 2021, 2105.08584) keeps all images; this memory keeps the latest.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from zskd_nni.runtime.device import to_device
from zskd_nni.runtime.errors import UserError

MOST_BYTES = 2**30


def images_that_fit(count: int, shape: tuple[int, int, int]) -> int:
    """How many of ``count`` images ``(C, H, W)`` fit into a GiB in half precision; every checkpoint holds them too."""
    return min(count, MOST_BYTES // (2 * math.prod(shape)))


class ImageMemory:
    """A ring buffer of images in half precision, and some that stay throughout.

    Args:
        room: size of the ring buffer; a new image replaces the oldest where it is full.
        lasting: ``(L, C, H, W)`` images that stay; L may be 0. Their shape and device are the memory's.

    Attributes:
        kept: number of images in the ring buffer.
        next_place: index in it of the next image.
    """

    def __init__(self, room: int, lasting: Tensor) -> None:
        self.room, self.lasting = room, len(lasting)
        self.kept, self.next_place = 0, 0
        self.images = torch.zeros((room + len(lasting), *lasting.shape[1:]), dtype=torch.float16, device=lasting.device)
        self.images[room:] = lasting.half()

    def put(self, images: Tensor) -> None:
        """Add ``(N, C, H, W)`` images, of more than ``room`` the last ones."""
        places = (self.next_place + torch.arange(len(images), device=images.device)) % self.room
        self.images[places[-self.room :]] = images[-self.room :].half()
        self.kept = min(self.room, self.kept + len(images))
        self.next_place = (self.next_place + len(images)) % self.room

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        """``(count, C, H, W)`` float32, drawn uniformly with replacement."""
        places = torch.randint(self.kept + self.lasting, (count,), generator=random)
        places = torch.where(places < self.kept, places, places - self.kept + self.room)
        return self.images[to_device(places, self.images.device)].float()

    def state_dict(self) -> dict[str, Any]:
        """The ring buffer; the lasting images are made again from the seed."""
        return {"images": self.images[: self.kept].clone(), "next_place": self.next_place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave of a memory of this size.

        Raises:
            UserError: the state is of a larger memory, or of images of another shape.
        """
        images = state["images"].to(self.images.device)
        if len(images) > self.room or images.shape[1:] != self.images.shape[1:]:
            raise UserError(
                "The checkpoint holds another memory of images than this transfer source's: it is another's."
            )
        self.images[: len(images)] = images
        self.kept, self.next_place = len(images), int(state["next_place"])
