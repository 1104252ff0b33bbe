"""The probe set: images on which all trials of a search are compared, made from the teacher alone.

A student agrees with its teacher best on images of the kind it was trained on. Agreement on a trial's own held-out
impressions would depend more on the impressions than on the student. So one probe set is made before the first
trial, from nothing but the teacher and a seed. It takes no method's targets, settings or generator, and no trial trains
on it. Three kinds of images share it equally, so that no method's own kind dominates:

- ``figures``: procedural images and smooth noise, as many of each class (as the teacher sees it) as can be found;
- ``steered``: other such images after some gradient steps towards a random class, each to a random confidence;
- ``between``: pairs of both, mixed in random proportion, so that decisions are tried where they change.

Images are bytes, as real ones are.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from zskd_nni.data.datasets import LabelledImages
from zskd_nni.data.procedural import start_images
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime import signals
from zskd_nni.runtime.files import fingerprint_of
from zskd_nni.runtime.rng import generator
from zskd_nni.runtime.tensors import load_tensors, save_tensors
from zskd_nni.training.inference import logits_on

KINDS = ("figures", "steered", "between")
_CANDIDATES = 10  # candidates for each figure that is taken
_STEPS, _RATE = 40, 0.04  # of Adam, in units of the value range
_BATCH = 250


def make_probe(teacher: Teacher, count: int, seed: int) -> LabelledImages:
    """Draw the probe set.

    Args:
        teacher: on any device; its predictions select and steer the images.
        count: number of images, at least three.
        seed: names the random streams.

    Returns:
        ``(count, C, H, W)`` images in the order of :data:`KINDS`, with the teacher's classes as labels.
    """
    spec, share = teacher.spec, count // 3
    figures = _figures(teacher, count - 2 * share, seed)
    steered = _steered(teacher, share, seed)
    images = torch.cat([figures, steered, _between(torch.cat([figures, steered]), share, seed)])
    data = ((images - spec.low) / (spec.high - spec.low) * 255).round().clamp_(0, 255).to(torch.uint8)
    unlabelled = LabelledImages(data, torch.zeros(count, dtype=torch.int64), "the probe set")
    labels = logits_on(teacher, unlabelled, spec, str(teacher.device), _BATCH).argmax(1)
    return LabelledImages(data, labels, unlabelled.name)


def _figures(teacher: Teacher, count: int, seed: int) -> Tensor:
    """Procedural images and smooth noise; those of rare classes are taken first."""
    taken: list[Tensor] = []
    spare: list[Tensor] = []
    room = torch.full((teacher.num_classes,), -(-count // teacher.num_classes))
    looked_at = 0
    while looked_at < _CANDIDATES * count and sum(map(len, taken)) < count:
        signals.check()
        images = start_images("mixed", _BATCH, teacher.spec, generator(seed, "probe", "figures", looked_at))[0]
        looked_at += _BATCH
        with torch.no_grad():
            classes = teacher(images.to(teacher.device)).argmax(1)
        fits = torch.zeros(_BATCH, dtype=torch.bool)
        for index, label in enumerate(classes.tolist()):
            if room[label] > 0:
                room[label] -= 1
                fits[index] = True
        taken.append(images[fits])
        if sum(map(len, spare)) < count:
            spare.append(images[~fits])
    return torch.cat([*taken, *spare])[:count]


def _steered(teacher: Teacher, count: int, seed: int) -> Tensor:
    """Images on their way to a class, with a target confidence between one half and one."""
    spec, classes, parts = teacher.spec, teacher.num_classes, []
    for first in range(0, count, _BATCH):
        size = min(_BATCH, count - first)
        random = generator(seed, "probe", "steered", first)
        images = start_images("mixed", size, spec, random)[0].to(teacher.device)
        goal = torch.randint(classes, (size,), generator=random)
        confidence = 0.5 + 0.5 * torch.rand((size, 1), generator=random)
        others = (1 - confidence) / max(classes - 1, 1)
        target = others.expand(size, classes).clone().scatter_(1, goal[:, None], confidence).to(teacher.device)
        images.requires_grad_(True)
        optimizer = torch.optim.Adam([images], _RATE * (spec.high - spec.low))
        for _ in range(_STEPS):
            signals.check()
            loss = functional.cross_entropy(teacher(images), target, reduction="sum")
            (images.grad,) = torch.autograd.grad(loss, images)
            optimizer.step()
            with torch.no_grad():
                images.clamp_(spec.low, spec.high)
        parts.append(images.detach().cpu())
    return torch.cat(parts) if parts else torch.empty(0, *spec.shape)


def _between(images: Tensor, count: int, seed: int) -> Tensor:
    random = generator(seed, "probe", "between")
    first = torch.randint(len(images), (count,), generator=random)
    second = torch.randint(len(images), (count,), generator=random)
    share = torch.rand((count, 1, 1, 1), generator=random)
    return share * images[first] + (1 - share) * images[second]


def save_probe(path: Path, teacher: Teacher, count: int, seed: int) -> None:
    """Make the probe set and write it, unless ``path`` has it already."""
    made_by = fingerprint_of(["probe", 1, teacher.fingerprint, count, seed])
    if path.exists() and load_tensors(path)[1].get("made_by") == made_by:
        return
    probe = make_probe(teacher, count, seed)
    metadata = {"made_by": made_by, "kinds": ", ".join(KINDS)}
    save_tensors(path, {"images": probe.images, "classes": probe.labels}, metadata)


def load_probe(path: Path) -> LabelledImages:
    """The probe set of :func:`save_probe`."""
    tensors, _ = load_tensors(path)
    return LabelledImages(tensors["images"], tensors["classes"], "the probe set")
