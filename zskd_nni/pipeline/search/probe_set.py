"""The probe set: images on which all trials of a search are compared, made from the teacher alone.

A student agrees with its teacher best on images of the kind it learnt on, so that agreement on a trial's own held-out
impressions says more about the impressions than about the student. The probe set is made once, before any trial, from
nothing but the teacher and a seed; no method's own targets, settings or generator have a part in it, and no trial is
taught on it. Three kinds of images share it equally, so that none of the ways in which methods make theirs is at home:

- ``figures``: procedural pictures and smooth noise, of every class (as the teacher sees it) as many as can be had;
- ``steered``: other such pictures, taken some gradient steps towards a class drawn by chance, each with a confidence
  drawn by chance;
- ``between``: pairs of both, mixed by a share drawn by chance, so that decisions are tried where they change.

Images are bytes, as real ones are.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from zskd_nni.data.procedural import start_images
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime import signals
from zskd_nni.runtime.files import fingerprint_of
from zskd_nni.runtime.rng import generator
from zskd_nni.runtime.tensors import load_tensors, save_tensors

KINDS = ("figures", "steered", "between")
_CANDIDATES = 10  # figures that are looked at for each one taken
_STEPS, _RATE = 40, 0.04  # of Adam, in units of the value range
_BATCH = 250


def make_probe(teacher: Teacher, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the probe set.

    Args:
        teacher: on any device; its answers choose and steer the images.
        count: how many, at least three.
        seed: names the random streams.

    Returns:
        ``(count, C, H, W)`` uint8 images of the value range, in the order of :data:`KINDS`, and the teacher's classes
        ``(count,)`` int64, both on the CPU.
    """
    share = count // 3
    figures = _figures(teacher, count - 2 * share, seed)
    steered = _steered(teacher, share, seed)
    between = _between(torch.cat([figures, steered]), share, seed)
    images = _as_bytes(torch.cat([figures, steered, between]), teacher.spec)
    return images, _answers(teacher, from_bytes(images, teacher.spec)).argmax(1)


def _answers(teacher: Teacher, images: Tensor) -> Tensor:
    parts = []
    with torch.no_grad():
        for part in images.split(_BATCH):
            signals.check()
            parts.append(teacher(part.to(teacher.device)).float().cpu())
    return torch.cat(parts)


def _figures(teacher: Teacher, count: int, seed: int) -> Tensor:
    """Figures and smooth noise; those of rare classes are taken first."""
    kept: list[Tensor] = []
    quota = -(-count // teacher.num_classes)
    room = torch.full((teacher.num_classes,), quota)
    spare: list[Tensor] = []
    looked = 0
    while looked < _CANDIDATES * count and sum(map(len, kept)) < count:
        images = start_images("mixed", _BATCH, teacher.spec, generator(seed, "probe", "figures", looked))[0]
        looked += _BATCH
        chosen = _answers(teacher, images).argmax(1)
        taken = torch.zeros(_BATCH, dtype=torch.bool)
        for index, kind in enumerate(chosen.tolist()):
            if room[kind] > 0:
                room[kind] -= 1
                taken[index] = True
        kept.append(images[taken])
        if sum(map(len, spare)) < count:
            spare.append(images[~taken])
    return torch.cat([*kept, *spare])[:count]


def _steered(teacher: Teacher, count: int, seed: int) -> Tensor:
    """Pictures on their way to a class, to a confidence between one half and one."""
    spec, width, parts = teacher.spec, teacher.spec.high - teacher.spec.low, []
    for first in range(0, count, _BATCH):
        size = min(_BATCH, count - first)
        random = generator(seed, "probe", "steered", first)
        images = start_images("mixed", size, spec, random)[0].to(teacher.device)
        goal = torch.randint(teacher.num_classes, (size,), generator=random)
        confidence = 0.5 + 0.5 * torch.rand((size, 1), generator=random)
        others = (1 - confidence) / max(teacher.num_classes - 1, 1)
        target = others.expand(size, teacher.num_classes).clone().scatter_(1, goal[:, None], confidence)
        target = target.to(teacher.device)
        images.requires_grad_(True)
        optimizer = torch.optim.Adam([images], _RATE * width)
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


def _as_bytes(images: Tensor, spec: InputSpec) -> Tensor:
    return ((images - spec.low) / (spec.high - spec.low) * 255).round().clamp_(0, 255).to(torch.uint8)


def from_bytes(images: Tensor, spec: InputSpec) -> Tensor:
    """``(N, C, H, W)`` bytes as floats in the value range."""
    return images.float().div_(255).mul_(spec.high - spec.low).add_(spec.low)


def save_probe(path: Path, teacher: Teacher, count: int, seed: int) -> None:
    """Make the probe set and write it, unless it is there already."""
    made_by = fingerprint_of(["probe", 1, teacher.fingerprint, count, seed])
    if path.exists() and load_tensors(path)[1].get("made_by") == made_by:
        return
    images, classes = make_probe(teacher, count, seed)
    save_tensors(path, {"images": images, "classes": classes}, {"made_by": made_by, "kinds": ", ".join(KINDS)})


def load_probe(path: Path, spec: InputSpec) -> tuple[Tensor, Tensor]:
    """Images ``(N, C, H, W)`` in the value range and the teacher's classes ``(N,)``."""
    tensors, _ = load_tensors(path)
    return from_bytes(tensors["images"], spec), tensors["classes"]
