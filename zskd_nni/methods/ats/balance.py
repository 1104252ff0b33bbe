"""The algorithm of ATS: candidates are sorted into classes by the teacher; steps are numbered as in ``method.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional

from zskd_nni.data.augmentation import Augmentation, augment
from zskd_nni.data.candidates import PROCEDURAL, Candidates
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.rng import generator
from zskd_nni.runtime.validation import Bounds, Positive, Settings

OWN, REPEAT, NEAREST = 0, 1, 2
ORIGINS = ("own", "repeats", "nearest")

SmallCount = Annotated[int, Bounds("must be at least 1 and at most 10,000", lambda value: 1 <= value <= 10_000)]
Fill = Annotated[str, Bounds("is augment, confidence or none", ("augment", "confidence", "none").__contains__)]


@dataclass(frozen=True)
class AtsSettings(Settings):
    """Which candidates are looked at, and which are taken.

    Attributes:
        sources: names of procedural sources, data sets or paths; they take turns.
        split: of named data sets.
        balanced: take equally many images of each class; otherwise take the first candidates.
        candidates: upper limit of candidates that each procedural source draws for each image of the set. Every image
            of a real source is a candidate once.
        fill: how classes with too few candidates are filled: with ``augment``ed repeats of their own images, with the
            candidates of highest ``confidence`` among the rest, or ``none``.
        repeats: the augmentation of those repeats.
        tries: upper limit of rounds of repeats for a class. Each round makes as many as are still missing, and keeps
            those that the teacher still puts into the class.
        deviation: standard deviation of the Gaussian noise about the middle of the range, as a fraction of the range.

    Raises:
        ValueError: a value outside its range.
    """

    sources: tuple[str, ...] = ("shapes",)
    split: Annotated[str, Bounds("is train or test", ("train", "test").__contains__)] = "train"
    balanced: bool = True
    candidates: SmallCount = 20
    fill: Fill = "augment"
    repeats: Augmentation = field(
        default_factory=lambda: Augmentation(rotation=10, translation=0.08, scale=(0.9, 1.1), shear=5, contrast=0.1)
    )
    tries: SmallCount = 20
    deviation: Positive = 0.25

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources names at least one source of images")
        super().__post_init__()

    @property
    def data_free(self) -> bool:
        """Whether all sources are procedural."""
        return not self.data

    @property
    def data(self) -> str:
        """The sources of real images, for reports."""
        return ", ".join(name for name in self.sources if name not in PROCEDURAL)


class CannotBalanceError(UserError):
    """The teacher puts all candidates into one class.

    Attributes:
        counts: of the candidates, by class.
    """

    def __init__(self, message: str, counts: list[int]) -> None:
        super().__init__(message)
        self.counts = counts


class CandidateSelection:
    """The candidates selected so far; for each class that still needs images, also its most likely rejected ones.

    Args:
        classes: number of classes K.
        quota: images of each class.
        shape: ``(C, H, W)``.
        balanced: whether the quota holds for each class, or only for the set as a whole.
    """

    def __init__(self, classes: int, quota: int, shape: tuple[int, int, int], balanced: bool) -> None:
        self.classes, self.quota, self.balanced = classes, quota, balanced
        self.images = torch.empty((0, *shape), dtype=torch.float16)
        self.labels = torch.empty(0, dtype=torch.int64)
        # By class: rejected images, and the teacher's probability of that class for each, highest first.
        self.nearest = [(self.images, torch.empty(0)) for _ in range(classes)]
        self.seen = torch.zeros(classes, dtype=torch.int64)  # candidates by class
        self.block = 0  # the next one to look at

    _STATE = ("images", "labels", "nearest", "seen", "block")

    def state_dict(self) -> dict[str, Any]:
        """What must be saved between two blocks."""
        return {name: getattr(self, name) for name in self._STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` gave."""
        for name in self._STATE:
            setattr(self, name, state[name])

    @property
    def counts(self) -> Tensor:
        """``(K,)`` images taken of each class."""
        return torch.bincount(self.labels, minlength=self.classes)

    @property
    def full(self) -> bool:
        """Whether no more candidates are needed."""
        if self.balanced:
            return bool((self.counts >= self.quota).all())
        return len(self.labels) >= self.quota * self.classes

    def add(self, images: Tensor, logits: Tensor) -> None:
        """Steps 1 to 3 for a block of candidates ``(n, C, H, W)`` with the teacher's logits ``(n, K)``."""
        labels = logits.argmax(1)  # step 1
        self.seen += torch.bincount(labels, minlength=self.classes)
        self.block += 1
        if self.balanced:  # steps 2 and 3
            one_hot = functional.one_hot(labels, self.classes)
            rank = (one_hot.cumsum(0) * one_hot).sum(1) - 1 + self.counts[labels]  # of each image in its class
            taken = rank < self.quota
        else:  # step 5
            taken = torch.arange(len(labels)) < self.quota * self.classes - len(self.labels)
        images = images.half()
        self.images = torch.cat([self.images, images[taken]])
        self.labels = torch.cat([self.labels, labels[taken]])
        if self.balanced:
            self._keep_nearest(images[~taken], logits[~taken].softmax(1))

    def _keep_nearest(self, images: Tensor, probabilities: Tensor) -> None:
        for k, missing in enumerate((self.quota - self.counts).clamp_min(0).tolist()):
            known, scores = self.nearest[k]
            if missing:
                known, scores = torch.cat([known, images]), torch.cat([scores, probabilities[:, k]])
            best = scores.argsort(descending=True, stable=True)[:missing]
            self.nearest[k] = known[best], scores[best]


def balance(
    teacher: Teacher,
    candidates: Candidates,
    settings: AtsSettings,
    selection: CandidateSelection,
    on_block: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps 1 to 5: select candidates until every class has its quota, then fill the scarce classes.

    Args:
        teacher: labels the candidates.
        candidates: in blocks.
        settings: how scarce classes are filled.
        selection: empty for a new set, restored for one that was interrupted.
        on_block: called with the number of images after each block.

    Returns:
        Images ``(n, C, H, W)`` float16, the class ``(n,)`` that each was taken for, and the origin ``(n,)`` of each:
        ``OWN``, ``REPEAT`` or ``NEAREST``.

    Raises:
        CannotBalanceError: the teacher puts all candidates into one class, although the set is to be balanced.

    Example:
        A teacher that separates dark images from bright ones:

        >>> from torch import nn
        >>> from zskd_nni import InputSpec
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> network[1].weight.data = torch.tensor([[-1.0], [1.0]]).expand(2, 64) / 64
        >>> network[1].bias.data = torch.tensor([0.8, 0.0])
        >>> teacher, settings = Teacher(network, InputSpec((1, 8, 8))), AtsSettings(sources=("structured",))
        >>> candidates = Candidates(settings.sources, teacher.spec, limit=200, seed=0)
        >>> selection = CandidateSelection(classes=2, quota=15, shape=(1, 8, 8), balanced=True)
        >>> images, labels, origins = balance(teacher, candidates, settings, selection)
        >>> images.shape, torch.bincount(labels)
        (torch.Size([30, 1, 8, 8]), tensor([15, 15]))
    """
    while selection.block < len(candidates) and not selection.full:
        block = candidates.block(selection.block)
        selection.add(block, teacher.predict(block.half().float()))  # the teacher labels what is stored: half precision
        if on_block is not None:
            on_block(len(block))
    if settings.balanced and int((selection.seen > 0).sum()) <= 1:
        raise CannotBalanceError(
            f"ATS cannot balance {', '.join(settings.sources)}: the teacher puts all {int(selection.seen.sum()):,} "
            f"candidates into class {int(selection.seen.argmax())} (counts by class: {_listed(selection.seen)}). "
            "Use another source, or balanced: false.",
            selection.seen.tolist(),
        )
    images, labels, origins = [selection.images], [selection.labels], [torch.full_like(selection.labels, OWN)]
    if settings.balanced and settings.fill != "none":  # step 4
        for k in range(selection.classes):
            for found, origin in _fill(teacher, settings, selection, k, candidates.seed):
                images.append(found)
                labels.append(torch.full((len(found),), k))
                origins.append(torch.full((len(found),), origin))
    return torch.cat(images), torch.cat(labels), torch.cat(origins)


def _fill(
    teacher: Teacher, settings: AtsSettings, selection: CandidateSelection, k: int, seed: int
) -> list[tuple[Tensor, int]]:
    """Repeats and nearest candidates that class ``k`` needs to reach its quota, and their origins."""
    own, found = selection.images[selection.labels == k], []
    missing = selection.quota - len(own)
    if missing and len(own) and settings.fill == "augment":
        repeats = _repeats(teacher, own, k, missing, settings, seed)
        found.append((repeats, REPEAT))
        missing -= len(repeats)
    if missing:
        found.append((selection.nearest[k][0][:missing], NEAREST))
    return found


def _repeats(teacher: Teacher, own: Tensor, k: int, missing: int, settings: AtsSettings, seed: int) -> Tensor:
    """Up to ``missing`` augmented images of class ``k`` that the teacher puts into that class."""
    spec, found, first = teacher.spec, [own[:0]], 0
    for attempt in range(settings.tries):
        wanted = missing - sum(map(len, found))
        if not wanted:
            break
        signals.check()
        index = (first + torch.arange(wanted)) % len(own)  # in turn
        first += wanted
        random = generator(seed, "repeats", k, attempt)
        changed = augment(own[index].float(), settings.repeats, random, spec.low, spec.high).half()
        found.append(changed[teacher.predict(changed.float()).argmax(1) == k])
    return torch.cat(found)


def _listed(counts: Tensor) -> str:
    shown = [f"{k}: {int(count):,}" for k, count in enumerate(counts)]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")
