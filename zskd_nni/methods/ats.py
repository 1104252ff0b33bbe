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

Sources: ``noise-uniform``, ``noise-gaussian``, ``structured`` (smooth noise of random coarseness), ``shapes`` and
``mixed`` (procedural figures, :mod:`zskd_nni.synthesis.starts`), or real images by name or path as
:func:`zskd_nni.data.load_images` takes them. Only the last read an image. Several sources take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zskd_nni import interrupt
from zskd_nni.augment import Augmentation, augment
from zskd_nni.data import NAMED_SETS, LabelledImages, load_images
from zskd_nni.errors import UserError
from zskd_nni.files import (
    fingerprint_of,
    load_sealed,
    load_tensors,
    make_folder,
    only_writer,
    plain,
    read_json,
    save_sealed,
    save_tensors,
    sha256_of_bytes,
    sha256_of_file,
    write_json,
)
from zskd_nni.identity import describe_difference
from zskd_nni.inputs import InputSpec
from zskd_nni.methods.registry import TransferRequest, preset_options
from zskd_nni.progress import Progress
from zskd_nni.seeds import generator
from zskd_nni.synthesis.starts import start_images
from zskd_nni.teacher import Teacher
from zskd_nni.transfer import StoredSource
from zskd_nni.workers import team

PROCEDURAL = ("noise-uniform", "noise-gaussian", "structured", "shapes", "mixed")
DESCRIPTION, IMAGES, PROGRESS = "set.json", "set.safetensors", "progress.safetensors"
FORMAT = "zskd_nni transfer set 1"
OWN, REPEAT, NEAREST = 0, 1, 2
ORIGINS = ("own", "repeats", "nearest")
_BLOCK = 1000


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
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
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


@dataclass(frozen=True)
class Whereabouts:
    """Where real images are, and which of them are meant.

    Attributes:
        root: folder of named data sets; the variable ``ZSKD_NNI_DATA`` where absent.
        download: let torchvision fetch them there.
        base: the folder that a relative path is meant from.
        part: ``all`` images, the ``held-out`` tenth (the same for every seed), or the ``other`` nine.
    """

    root: Path | None = None
    download: bool = False
    base: Path | None = None
    part: str = "all"


# Candidates.


def procedural_images(kind: str, count: int, spec: InputSpec, random: torch.Generator, deviation: float) -> Tensor:
    """``(count, C, H, W)`` images of a procedural source, in the value range."""
    if kind == "noise-gaussian":
        middle, width = (spec.low + spec.high) / 2, deviation * (spec.high - spec.low)
        noise = torch.randn((count, *spec.shape), generator=random)
        return noise.mul_(width).add_(middle).clamp_(spec.low, spec.high)
    name = {"noise-uniform": "uniform", "structured": "smooth"}.get(kind, kind)
    return start_images(name, count, spec, random)[0]


class Candidates:
    """The candidates of all sources, in blocks that depend on the seed and their number alone.

    Args:
        settings: sources.
        spec: shape and value range.
        limit: procedural candidates of each source, at most.
        seed: names the random streams; real images come in an order drawn from it.
        where: real images are.

    Attributes:
        data: fingerprints of the real images, by source.

    Raises:
        UserError: a data set cannot be read.
    """

    def __init__(
        self, settings: AtsSettings, spec: InputSpec, limit: int, seed: int, where: Whereabouts | None = None
    ) -> None:
        self.settings, self.spec, self.seed = settings, spec, seed
        self._real: dict[str, LabelledImages] = {}
        self.data: dict[str, str] = {}
        blocks: list[list[tuple[str, int, int]]] = []
        for name in dict.fromkeys(settings.sources):
            count = limit
            if name not in PROCEDURAL:
                images = self._part_of(self._read(name, where or Whereabouts()), name, where or Whereabouts())
                order = torch.randperm(len(images), generator=generator(seed, "order of candidates", name))
                self.data[name] = sha256_of_bytes(images.images.contiguous().numpy().tobytes())
                self._real[name] = images.subset(order)
                count = len(images)
            blocks.append([(name, first, min(_BLOCK, count - first)) for first in range(0, count, _BLOCK)])
        longest = max(map(len, blocks))
        self.plan = [entries[turn] for turn in range(longest) for entries in blocks if turn < len(entries)]

    def _read(self, name: str, where: Whereabouts) -> LabelledImages:
        path = name if name in NAMED_SETS or where.base is None else str(where.base / name)
        if name not in NAMED_SETS and not Path(path).exists():
            raise UserError(
                f"ATS has no source {name!r}: name one of {', '.join((*PROCEDURAL, *NAMED_SETS))}, an .npz "
                "file or a folder of images."
            )
        return load_images(path, self.settings.split, where.root, where.download)

    @staticmethod
    def _part_of(images: LabelledImages, name: str, where: Whereabouts) -> LabelledImages:
        if where.part == "all":
            return images
        order = torch.randperm(len(images), generator=generator(0, "held-out candidates", len(images)))
        held_out = -(-len(images) // 10)
        if held_out == len(images):
            raise UserError(f"The source {name} has too few images ({held_out}) to hold some out.")
        return images.subset(order[:held_out] if where.part == "held-out" else order[held_out:])

    def __len__(self) -> int:
        """How many blocks there are."""
        return len(self.plan)

    @property
    def total(self) -> int:
        """How many images there are in all blocks."""
        return sum(count for _, _, count in self.plan)

    def block(self, number: int) -> Tensor:
        """Images ``(n, C, H, W)`` of a block, in the value range."""
        name, first, count = self.plan[number]
        if name in self._real:
            return self._real[name].pixels(slice(first, first + count), self.spec)
        random = generator(self.seed, "candidates", name, first)
        return procedural_images(name, count, self.spec, random, self.settings.deviation)


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
        interrupt.check()
        index = (first + torch.arange(wanted)) % len(own)  # in turn
        first += wanted
        random = generator(seed, "repeats", k, attempt)
        moved = augment(own[index].float(), settings.repeats, random, spec.low, spec.high).half()
        found.append(moved[teacher.predict(moved.float()).argmax(1) == k])
    return torch.cat(found)


def _listed(counts: Tensor) -> str:
    shown = [f"{k}: {int(count):,}" for k, count in enumerate(counts)]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


# The store.


class TransferSet:
    """A finished set in its folder: ``set.json`` and ``set.safetensors``.

    Attributes:
        folder: where it is.
        description: the content of ``set.json``: identity, counts by class, checksum.
    """

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.folder, self.description = folder, description

    @classmethod
    def open(cls, folder: str | Path) -> TransferSet:
        """Read a set's description.

        Raises:
            UserError: there is none, or it is not sound.
        """
        path = Path(folder) / DESCRIPTION
        if not path.is_file():
            raise UserError(f"{folder} is not a transfer set: it has no {DESCRIPTION}.")
        description = read_json(path)
        sound = isinstance(description, dict) and description.get("format") == FORMAT
        if (
            not sound
            or not isinstance(description.get("identity"), dict)
            or not isinstance(description.get("sha256"), str)
            or not isinstance(description.get("counts"), dict)
            or description.get("fingerprint") != fingerprint_of(description["identity"])
        ):
            raise UserError(f"{path} is not sound. Remove the folder to make the set anew.")
        return cls(Path(folder), description)

    @property
    def fingerprint(self) -> str:
        """Of what this set is."""
        return self.description["fingerprint"]

    @property
    def counts(self) -> dict[str, list[int]]:
        """By class: ``candidates`` seen, and images ``own``, ``repeats`` and ``nearest`` in the set."""
        return self.description["counts"]

    def whole(self) -> bool:
        """Whether the images are there, as their checksum says."""
        path = self.folder / IMAGES
        return path.is_file() and sha256_of_file(path) == self.description["sha256"]

    def images(self) -> Tensor:
        """All images ``(N, C, H, W)``, float16.

        Raises:
            UserError: they are missing or damaged.
        """
        if not self.whole():
            raise UserError(f"{self.folder / IMAGES} is not as written; run the same command again to make it anew.")
        # A copy: what was read is a window on the file, which somebody may damage meanwhile.
        return load_tensors(self.folder / IMAGES)[0]["images"].clone()


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
    candidates = Candidates(settings, teacher.spec, settings.candidates * size, seed, where)
    identity = {
        "method": "ats",
        "teacher": teacher.fingerprint,
        "settings": plain(asdict(settings)),
        "data": candidates.data,
        "size": size,
        "seed": seed,
    }
    if (folder / DESCRIPTION).exists():
        finished = TransferSet.open(folder)
        difference = describe_difference(finished.description["identity"], identity)
        if difference:
            raise UserError(f"{folder} holds another transfer set ({difference}). Use another folder.")
        if finished.whole():
            return finished
    classes = _Classes(teacher.num_classes, size // teacher.num_classes, teacher.spec.shape, settings.balanced)
    progress_path, fingerprint = folder / PROGRESS, fingerprint_of(identity)
    if progress_path.exists():
        state, metadata = load_sealed(progress_path)
        if metadata.get("fingerprint") == fingerprint and set(state) == set(_Classes._NAMES):
            classes.restore(state)
    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        try:
            interrupt.check()
        except interrupt.Interrupted:
            save_sealed(progress_path, classes.state(), {"fingerprint": fingerprint})
            raise
        if time.monotonic() - saved >= save_every:
            save_sealed(progress_path, classes.state(), {"fingerprint": fingerprint})
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
        return StoredSource(made.images(), request.batch_size, request.seed, made.fingerprint)


METHOD = Ats()
