"""ATS: Effectiveness of Arbitrary Transfer Sets for Data-free KD (Nayak, Mopuri, Chakraborty, WACV 2021, 2011.09113).

Any images will do to teach a student, if only the teacher sees all its classes in them equally often.

The paper's full text was not obtained and no code of the authors was found. What its abstract says: transfer sets of
random noise, of synthetic images and of natural data sets were compared on MNIST, Fashion-MNIST, CIFAR-10 and
CIFAR-100, and those that are *target-class balanced* teach well. Everything below is our reading of how:

1. Label: ``k(u) = argmax T(u)`` for every candidate ``u``; labels it came with are ignored.
2. Quota: ``q = floor(N / K)`` for each class; the set has ``K * q`` images.
3. Candidates are taken in order, each into its class, as long as the class has room.
4. Scarce classes (``fill``): with ``augment``, images of the class are moved and changed by chance, in turn and again
   and again, and what the teacher still puts into the class is taken; what is missing then, and with ``confidence``
   from the start, are the candidates to whose class the teacher gives the highest probability among those not taken
   (one may be the nearest of several classes); with ``none`` the class stays short.
5. Without balancing: the first ``K * q`` candidates as they come.
6. The student is distilled on the set by the teacher's soft answers, as on any other.

Two classes can be short of the quota in very different ways, so the store says of every class how many images are its
own, how many repeats, and how many only the nearest. A teacher that puts everything into one class cannot balance a
source at all: that is an error which gives the counts.

Sources are those of :mod:`zskd_nni.data.candidates`: procedural ones, or real images by name or path. Only the last
read an image. Several sources take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zskd_nni.data.augmentation import Augmentation, augment
from zskd_nni.data.candidates import PROCEDURAL, Candidates, Whereabouts
from zskd_nni.data.sources import StoredSource
from zskd_nni.methods.ats.transfer_set import DESCRIPTION, FORMAT, IMAGES, TransferSet
from zskd_nni.methods.registry import TransferRequest, preset_options
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime import signals
from zskd_nni.runtime.distributed import team
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import fingerprint_of, make_folder, plain, write_json
from zskd_nni.runtime.locks import only_writer
from zskd_nni.runtime.progress import Progress
from zskd_nni.runtime.rng import generator
from zskd_nni.runtime.run_identity import describe_difference
from zskd_nni.runtime.tensors import load_sealed, save_sealed, save_tensors

PROGRESS = "progress.safetensors"
OWN, REPEAT, NEAREST = 0, 1, 2
ORIGINS = ("own", "repeats", "nearest")

_MOST_TRIES = 10_000


class CannotBalanceError(UserError):
    """The teacher puts all candidates into one class.

    Attributes:
        counts: of the candidates, by class.
    """

    def __init__(self, message: str, counts: list[int]) -> None:
        super().__init__(message)
        self.counts = counts


@dataclass(frozen=True)
class AtsSettings:
    """Which images are looked at, and which are taken.

    Attributes:
        sources: names of procedural sources, data sets or paths; they take turns.
        split: of named data sets.
        balanced: as many images of each class; else as they come.
        candidates: how many candidates of each procedural source are looked at for each image of the set, at most;
            real ones are looked at once.
        fill: ``augment``, ``confidence`` or ``none``: how scarce classes are filled.
        repeats: how each repeat is moved and changed.
        tries: rounds of repeats; in each as many are made as are missing.
        deviation: of the Gaussian noise about the middle of the value range, as a fraction of the range.

    Raises:
        ValueError: a value outside its range.
    """

    __pydantic_config__ = {"extra": "forbid"}

    sources: tuple[str, ...] = ("shapes",)
    split: str = "train"
    balanced: bool = True
    candidates: int = 20
    fill: str = "augment"
    repeats: Augmentation = field(
        default_factory=lambda: Augmentation(rotation=10, translation=0.08, scale=(0.9, 1.1), shear=5, contrast=0.1)
    )
    tries: int = 20
    deviation: float = 0.25

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources names at least one source of images")
        if self.split not in ("train", "test"):
            raise ValueError(f"split is train or test, not {self.split!r}")
        if self.fill not in ("augment", "confidence", "none"):
            raise ValueError(f"fill is augment, confidence or none, not {self.fill!r}")
        for name in ("candidates", "tries"):
            if not 1 <= getattr(self, name) <= _MOST_TRIES:
                raise ValueError(f"{name} must be at least 1 and at most {_MOST_TRIES:,}, not {getattr(self, name)}")
        if not 0 < self.deviation < float("inf"):
            raise ValueError(f"deviation must be positive, not {self.deviation}")

    @property
    def data_free(self) -> bool:
        """Whether no source is one of real images."""
        return not self.data

    @property
    def data(self) -> str:
        """The sources of real images, for reports."""
        return ", ".join(name for name in self.sources if name not in PROCEDURAL)


# Balancing.


class _Classes:
    """The set in the making: images by class, what may fill them up, and the counts.

    Everything is in tensors, so that it can be saved between two blocks.
    """

    def __init__(self, classes: int, quota: int, shape: tuple[int, int, int], balanced: bool) -> None:
        self.classes, self.quota, self.balanced = classes, quota, balanced
        self.images = torch.empty((0, *shape), dtype=torch.float16)
        self.labels = torch.empty(0, dtype=torch.int64)
        self.spare = torch.empty((0, *shape), dtype=torch.float16)  # not taken, nearest to a class that has room
        self.spare_class = torch.empty(0, dtype=torch.int64)
        self.spare_probability = torch.empty(0)
        self.seen = torch.zeros(classes, dtype=torch.int64)  # candidates by class
        self.block = torch.zeros((), dtype=torch.int64)  # the next one

    _NAMES = ("images", "labels", "spare", "spare_class", "spare_probability", "seen", "block")

    def state(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._NAMES}

    def restore(self, state: dict[str, Tensor]) -> None:
        for name in self._NAMES:
            setattr(self, name, state[name])

    @property
    def counts(self) -> Tensor:
        return torch.bincount(self.labels, minlength=self.classes)

    @property
    def full(self) -> bool:
        if self.balanced:
            return bool((self.counts >= self.quota).all())
        return len(self.labels) >= self.quota * self.classes

    def add(self, images: Tensor, logits: Tensor) -> None:
        """Steps 1 to 3 for a block of candidates ``(n, C, H, W)`` with the teacher's answers ``(n, K)``."""
        labels = logits.argmax(1)
        self.seen += torch.bincount(labels, minlength=self.classes)
        self.block += 1
        if self.balanced:
            before, one_hot = self.counts, torch.nn.functional.one_hot(labels, self.classes)
            rank = (one_hot.cumsum(0) * one_hot).sum(1) - 1 + before[labels]  # place of each in its class
            taken = rank < self.quota
        else:
            taken = torch.arange(len(labels)) < self.quota * self.classes - len(self.labels)
        stored = images.half()
        self.images = torch.cat([self.images, stored[taken]])
        self.labels = torch.cat([self.labels, labels[taken]])
        if self.balanced:
            self._remember_nearest(stored[~taken], logits[~taken].softmax(1))

    def _remember_nearest(self, images: Tensor, probabilities: Tensor) -> None:
        counts = self.counts
        parts = []
        for k in range(self.classes):
            missing = self.quota - int(counts[k])
            if missing <= 0:
                continue
            old = (self.spare_class == k).nonzero().flatten()
            scores = torch.cat([self.spare_probability[old], probabilities[:, k]])
            best = scores.argsort(descending=True, stable=True)[:missing]
            pool = torch.cat([self.spare[old], images])
            parts.append((pool[best], torch.full((len(best),), k), scores[best]))
        if parts:
            pools, names, scored = zip(*parts, strict=True)
            self.spare, self.spare_class, self.spare_probability = torch.cat(pools), torch.cat(names), torch.cat(scored)
        else:
            self.spare, self.spare_class = self.spare[:0], self.spare_class[:0]
            self.spare_probability = self.spare_probability[:0]


def balance(
    teacher: Teacher,
    settings: AtsSettings,
    candidates: Candidates,
    classes: _Classes,
    seed: int,
    progress: Progress,
    save: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps 1 to 5: images ``(n, C, H, W)`` float16, the class each was taken for, and its origin, both ``(n,)``.

    Raises:
        CannotBalanceError: the teacher puts all candidates into one class, although balance is asked for.
    """
    while int(classes.block) < len(candidates) and not classes.full:
        block = candidates.block(int(classes.block))
        # The teacher labels what is kept: half precision.
        classes.add(block, teacher.predict(block.half().float()))
        progress.advance(len(block), f"{int((classes.counts >= classes.quota).sum())} classes full")
        if save is not None:
            save()
    if settings.balanced and int((classes.seen > 0).sum()) <= 1:
        only = int(classes.seen.argmax())
        raise CannotBalanceError(
            f"ATS cannot balance {', '.join(settings.sources)}: the teacher puts all {int(classes.seen.sum()):,} "
            f"candidates into class {only} (counts by class: {_listed(classes.seen)}). Use another source, or "
            "balanced: false.",
            classes.seen.tolist(),
        )
    images, labels = [classes.images], [classes.labels]
    origins = [torch.full_like(classes.labels, OWN)]
    if settings.balanced and settings.fill != "none":
        for k in range(classes.classes):
            own = classes.images[classes.labels == k]
            missing = classes.quota - len(own)
            if missing and len(own) and settings.fill == "augment":
                repeats = _repeats(teacher, own, k, missing, settings, seed)
                images.append(repeats)
                origins.append(torch.full((len(repeats),), REPEAT))
                labels.append(torch.full((len(repeats),), k))
                missing -= len(repeats)
            if missing:
                nearest = classes.spare[classes.spare_class == k][:missing]
                images.append(nearest)
                origins.append(torch.full((len(nearest),), NEAREST))
                labels.append(torch.full((len(nearest),), k))
    return torch.cat(images), torch.cat(labels), torch.cat(origins)


def _repeats(teacher: Teacher, own: Tensor, k: int, missing: int, settings: AtsSettings, seed: int) -> Tensor:
    """Up to ``missing`` images that are moved and changed images of class ``k``, and that the teacher puts there."""
    spec, found, first = teacher.spec, [own[:0]], 0
    for attempt in range(settings.tries):
        wanted = missing - sum(map(len, found))
        if not wanted:
            break
        signals.check()
        index = (first + torch.arange(wanted)) % len(own)  # in turn
        first += wanted
        random = generator(seed, "repeats", k, attempt)
        moved = augment(own[index].float(), settings.repeats, random, spec.low, spec.high).half()
        found.append(moved[teacher.predict(moved.float()).argmax(1) == k])
    return torch.cat(found)


def _listed(counts: Tensor) -> str:
    shown = [f"{k}: {int(count):,}" for k, count in enumerate(counts)]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def make_transfer_set(
    teacher: Teacher,
    settings: AtsSettings,
    *,
    size: int,
    seed: int,
    folder: str | Path,
    label: str = "transfer set",
    where: Whereabouts | None = None,
    save_every: float = 30.0,
    quiet: bool = False,
) -> TransferSet:
    """Make a set of ``K * floor(size / K)`` images in ``folder``, or take it up again.

    Args:
        teacher: labels the candidates.
        settings: sources and balancing.
        size: N.
        seed: names the random streams.
        folder: made if need be.
        label: shown beside the progress.
        where: real images are, and which of them are meant.
        save_every: seconds between two notes of the progress.
        quiet: no progress.

    Raises:
        UserError: the folder holds another set, another run is at work there, images cannot be read, the size is
            below the number of classes, or the teacher puts everything into one class.
    """
    if size < teacher.num_classes:
        raise UserError(
            f"A transfer set of {size} images has less than one for each of the teacher's {teacher.num_classes} "
            f"classes; ask for at least {teacher.num_classes}."
        )
    torch.set_flush_denormal(True)
    folder = make_folder(folder)

    def description() -> dict[str, Any]:
        with only_writer(folder):
            made = _make(teacher, settings, size, seed, folder, label, where or Whereabouts(), save_every, quiet)
        return made.description

    return TransferSet(folder, team().first(description))  # of several processes one makes it, all read it


def _make(
    teacher: Teacher,
    settings: AtsSettings,
    size: int,
    seed: int,
    folder: Path,
    label: str,
    where: Whereabouts,
    save_every: float,
    quiet: bool,
) -> TransferSet:
    limit = settings.candidates * size
    candidates = Candidates(
        settings.sources, teacher.spec, limit, seed, where, split=settings.split, deviation=settings.deviation
    )
    identity = {
        "method": "ats",
        "teacher": teacher.fingerprint,
        "settings": plain(asdict(settings)),
        "data": candidates.data,
        "size": size,
        "seed": seed,
    }
    if (folder / "manifest.json").exists():
        raise UserError(f"{folder} holds data impressions. Use another folder.")
    if (folder / DESCRIPTION).exists():
        finished = TransferSet.open(folder)
        difference = describe_difference(finished.description["identity"], identity)
        if difference:
            raise UserError(f"{folder} holds another transfer set ({difference}). Use another folder.")
        if finished.whole():
            return finished
    classes = _Classes(teacher.num_classes, size // teacher.num_classes, teacher.spec.shape, settings.balanced)
    fingerprint = fingerprint_of(identity)
    # What was begun when files were ordered by their names is begun anew.
    progress_path, begun = folder / PROGRESS, f"{fingerprint}, by content"
    if progress_path.exists():
        try:
            state, metadata = load_sealed(progress_path)
        except UserError as error:
            raise UserError(f"{error} Remove {progress_path} to begin the set anew.") from error
        if metadata.get("fingerprint") == begun and set(state) == set(_Classes._NAMES):
            classes.restore(state)
    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        try:
            signals.check()
        except signals.Interrupted:
            save_sealed(progress_path, classes.state(), {"fingerprint": begun})
            raise
        if time.monotonic() - saved >= save_every:
            save_sealed(progress_path, classes.state(), {"fingerprint": begun})
            saved = time.monotonic()

    done = sum(count for _, _, count in candidates.plan[: int(classes.block)])
    with Progress(label, candidates.total, "candidates", done=done, quiet=quiet) as progress:
        images, labels, origins = balance(teacher, settings, candidates, classes, seed, progress, save)
    checksum = save_tensors(folder / IMAGES, {"images": images, "labels": labels, "origins": origins})
    counts = {"candidates": classes.seen.tolist()}
    for code, name in enumerate(ORIGINS):
        counts[name] = torch.bincount(labels[origins == code], minlength=teacher.num_classes).tolist()
    description = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "identity": identity,
        "quota": classes.quota,
        "images": len(images),
        "counts": counts,
        "sha256": checksum,
    }
    write_json(folder / DESCRIPTION, description)
    progress_path.unlink(missing_ok=True)
    return TransferSet(folder, description)


PRESETS: dict[str, dict[str, Any]] = {
    # Data-free, from the source that the paper's abstract names second; the paper's own fill is not known.
    "paper": {"sources": ("shapes",), "balanced": True, "fill": "augment"},
    "unbalanced": {"sources": ("shapes",), "balanced": False, "fill": "none"},
}


class Ats:
    """ATS as a method of recipes."""

    name = "ats"
    presets = tuple(PRESETS)

    def options(self, preset: str, given: Mapping[str, Any]) -> AtsSettings:
        """The preset with the recipe's own keys over it."""
        return preset_options(AtsSettings, self.name, PRESETS, preset, given)

    def source(self, teacher: Teacher, request: TransferRequest) -> StoredSource:
        """Make the set, or take it up again, and draw from it."""
        made = make_transfer_set(
            teacher,
            request.options,
            size=request.size,
            seed=request.seed,
            folder=request.folder,
            label=request.label,
            where=Whereabouts(
                request.root, request.download, request.base, "held-out" if request.held_out else "other"
            ),
            quiet=request.quiet,
        )
        return StoredSource(made.images(), request.batch_size, request.seed, made.fingerprint, teacher.device)


METHOD = Ats()
