"""Real training images as the transfer set: an upper bound for data-free methods.

This method reads real data. It serves as the upper limit: the same recipe with

    --set transfer.method=real --set transfer.data=mnist

whose report states that it is not data-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch

from zskd_nni.data.datasets import NAMED_SETS, Fit, load_images
from zskd_nni.data.sources import StoredSource
from zskd_nni.methods.registry import TransferRequest
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.distributed import team
from zskd_nni.runtime.errors import UserError, error_context
from zskd_nni.runtime.files import fingerprint_of, sha256_of_bytes
from zskd_nni.runtime.rng import generator
from zskd_nni.runtime.validation import Settings, build_settings


@dataclass(frozen=True)
class RealOptions(Settings):
    """The method's keys in a recipe's ``transfer`` section.

    Attributes:
        data: name or path of a data set, found as evaluation data is; of a named one the training split is read.
        targets: a key of the data-free method in the recipe; ignored.
        synthesis: likewise.
    """

    data: str = ""
    targets: dict[str, Any] = field(default_factory=dict)
    synthesis: dict[str, Any] = field(default_factory=dict)


class Real:
    """Real training images as a method of recipes; it is not data-free."""

    name = "real"
    presets = ("best",)
    data_free = False
    ignores_other_keys = True  # those of the data-free recipe's method

    def options(self, preset: str, given: Mapping[str, Any]) -> RealOptions:
        """The recipe's keys; the preset and other methods' keys are ignored."""
        known = {entry.name for entry in fields(RealOptions)}
        return build_settings(RealOptions, {key: value for key, value in given.items() if key in known})

    def source(self, teacher: Teacher, request: TransferRequest) -> StoredSource:
        """``request.size`` images of the training split; held-out ones come from the other end of the order."""
        name = request.options.data
        if not name:
            raise UserError("The method real needs transfer.data, the name of a data set such as mnist.")
        if name not in NAMED_SETS and request.base is not None:
            name = str(request.base / name)
        if request.download:  # by one process alone
            team().first(lambda: bool(load_images(name, "train", request.root, True)))
        data = load_images(name, "train", request.root)
        # One order for both requests, so that no image is in both.
        order = torch.randperm(len(data), generator=generator(0, "real", len(data)))
        size = min(request.size, len(data) - request.reserved)
        if size < 1 or (request.held_out and size == len(data)):
            raise UserError(f"transfer.held_out: {name} has {len(data)} training images; leave some to learn on.")
        index = order[-size:] if request.held_out else order[:size]
        with error_context("evaluation.fit"):
            images = replace(data, fit=cast("Fit | None", request.fit)).pixels(index, teacher.spec)
        digest = sha256_of_bytes(data.images[index].numpy().tobytes())
        fingerprint = fingerprint_of(["real", name, digest, *([request.fit] if request.fit else [])])
        return StoredSource(images, request.batch_size, request.seed, fingerprint, teacher.device)


METHOD = Real()
