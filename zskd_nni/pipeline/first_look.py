"""The teacher, looked at before the long work: a wrong input is seen in seconds.

On test data its accuracy is measured: near chance, nothing can be learnt from it. Classes in another order, and colours
in the order blue, green, red, show there too. And its first BatchNorm tells how much the inputs of that layer were
spread in training. Dead leaves have about the contrast of photographs and of drawings: if they are spread otherwise
there, the teacher was trained on images in other units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zskd_nni.data.datasets import LabelledImages, describe_fit
from zskd_nni.data.procedural import start_images
from zskd_nni.models.hooks import hooked
from zskd_nni.models.teacher import Teacher
from zskd_nni.synthesis.batch_norm_statistics import batch_norms
from zskd_nni.training.inference import logits_on
from zskd_nni.training.metrics import accuracy

MOST_IMAGES = 2000
_COLOURED = 500  # images that are also looked at with their colours reversed, at most
_CLEARLY = 5.0  # points of accuracy that another order must gain to be told
_LEAVES = 128
# Least and largest ln(spread seen / spread trained) of the first BatchNorm that a right input has. Figures of right and
# wrong teachers: docs/howto/own-teacher.md.
RIGHT = (-0.34, 0.42)


@dataclass(frozen=True)
class FirstLook:
    """What is seen of a teacher before the work.

    Attributes:
        accuracy: on test data, in percent; None without.
        images: test images that were looked at.
        spread: ``ln(spread seen / spread trained)`` of the first BatchNorm on dead leaves; None without a BatchNorm.
        lines: for the console, warnings last.
        warnings: how many of the last lines are warnings.
    """

    accuracy: float | None
    images: int
    spread: float | None
    lines: list[str]
    warnings: int


def look_at(teacher: Teacher, test: LabelledImages | None) -> FirstLook:
    """Measure a teacher in seconds.

    Args:
        teacher: on any device.
        test: test data, fitted as the recipe says; at most :data:`MOST_IMAGES` of them are looked at.
    """
    lines, warnings, measured, count = [], [], None, 0
    if test is not None:
        chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:MOST_IMAGES]
        part = test.subset(chosen.sort().values) if len(test) > MOST_IMAGES else test
        logits = logits_on(teacher, part, teacher.spec, str(teacher.device))
        measured, count = accuracy(logits, part.labels), len(part)
        fit = describe_fit(test, teacher.spec.shape)
        lines.append(
            f"teacher: accuracy {measured:.2f} % on {count:,}{f' of {len(test):,}' if count < len(test) else ''} test "
            f"images of {test.name}" + (f" ({fit})" if fit else "")
        )
        warnings += [each for each in (_classes(logits, part.labels), _colours(teacher, part, logits)) if each]
    spread = first_spread(teacher)
    if spread is not None:
        ratio = float(torch.tensor(spread).exp())
        far = not RIGHT[0] <= spread <= RIGHT[1]
        lines.append(
            f"teacher: at its first BatchNorm, procedural images spread {ratio:,.2f} times as much as its training "
            "images did" + ("" if far else ", which is usual for a right input")
        )
        if far:
            warnings.append(
                "warning: that is far from 1. So teacher.input (low, high, mean, std) is probably another than in its "
                f"training: pixels are some {max(ratio, 1 / ratio):,.1f} times too {'large' if ratio > 1 else 'small'}"
            )
    if measured is not None and measured < 100 * least_accuracy(teacher.num_classes):
        warnings.append(f"warning: chance is {100 / teacher.num_classes:.2f} %, and the teacher is hardly better")
    return FirstLook(measured, count, spread, [*lines, *warnings], len(warnings))


def _classes(logits: Tensor, labels: Tensor) -> str | None:
    """What to say where the test data have some of the teacher's classes in another order; None where they have not."""
    count = logits.shape[1]
    pairs = torch.bincount(logits.argmax(1) * count + labels, minlength=count * count).view(count, count).float()
    own, most = pairs.diag(), pairs.max(1)
    clearly = most.values > own + 3 * (most.values + own).sqrt()
    moved = {int(each): int(most.indices[each]) for each in clearly.nonzero()}
    gained = 100 * float((most.values - own)[clearly].sum()) / len(labels)
    if set(moved) != set(moved.values()) or gained < _CLEARLY:
        return None  # a weak teacher takes some classes for others, but not one for each
    told = ", ".join(f"{theirs} is {ours}" for theirs, ours in list(moved.items())[:4])
    more = " and so on" if len(moved) > 4 else ""
    right = 100 * float(own.sum()) / len(labels) + gained
    return (
        f"warning: the order of the classes is probably another: the teacher's class {told} of the test data{more}. "
        f"In that order its accuracy is {right:.2f} %"
    )


def _colours(teacher: Teacher, test: LabelledImages, logits: Tensor) -> str | None:
    """What to say where the teacher is clearly better with blue, green, red; None where it is not."""
    if teacher.spec.shape[0] != 3:
        return None
    few = test.subset(slice(0, _COLOURED))
    turned = accuracy(
        logits_on(lambda images: teacher(images.flip(1)), few, teacher.spec, str(teacher.device)), few.labels
    )
    seen = accuracy(logits[: len(few)], few.labels)
    if turned < seen + _CLEARLY:
        return None
    return (
        f"warning: with the colours of {len(few):,} test images in the order blue, green, red the teacher's accuracy "
        f"is {turned:.2f} % in the place of {seen:.2f} %. It was probably trained on such images: let forward begin "
        f"with x = x.flip(1), and give mean and std as red, green, blue"
    )


def near_chance(look: FirstLook, classes: int) -> str | None:
    """What to say where the teacher is hardly better than chance; None where it is.

    That is an accuracy below twice that of chance (of two classes, below the middle of chance and 100 %).
    """
    if look.accuracy is None or look.accuracy >= 100 * least_accuracy(classes):
        return None
    return (
        f"The teacher is right on {look.accuracy:.2f} % of the test images, and chance is {100 / classes:.2f} %: "
        f"teacher.input (shape, low, high, mean, std), the order of the classes, evaluation.fit or the weights are "
        f"not what it was trained with. To go on all the same: --set evaluation.any_teacher=true"
    )


def least_accuracy(classes: int) -> float:
    """Twice chance, as a share; halfway from chance to 1 where that is less."""
    chance = 1 / classes
    return min(2 * chance, (1 + chance) / 2)


@torch.no_grad()
def first_spread(teacher: Teacher) -> float | None:
    """``ln`` of how many times the spread of dead leaves is that of the training images, at the first BatchNorm.

    The mean over its channels of half the ``ln`` of the ratio of variances; None without a BatchNorm that is called,
    or if it has seen too few batches for its variance to mean anything.
    """
    norms, layers = set(batch_norms(teacher.model)), dict(teacher.model.named_modules())
    seen: list[tuple[Any, Tensor]] = []

    def note(path: str, features: Tensor) -> None:
        if not seen:
            seen.append((layers[path], features.float()))

    images = start_images("leaves", _LEAVES, teacher.spec, torch.Generator().manual_seed(0))[0]
    batch = min(_LEAVES, teacher.spec.inference_batch_on(teacher.device))
    with hooked(teacher.model, [path for path, module in layers.items() if module in norms], before=note):
        teacher(images[:batch].to(teacher.device))
    if not seen:
        return None
    module, features = seen[0]
    if not _has_settled(module):
        return None
    dims = [dim for dim in range(features.dim()) if dim != 1]
    ratio = (features.var(dims, unbiased=False) + module.eps) / (module.running_var + module.eps)
    return float(0.5 * ratio.log().mean())


def _has_settled(norm: Any) -> bool:
    """Whether next to nothing is left in the running variance of the ones that it started from."""
    seen = 0 if norm.num_batches_tracked is None else int(norm.num_batches_tracked)
    if seen == 0 or norm.momentum is None:  # it was not counted, as in converted weights; or it is a plain average
        return bool((norm.running_var != 1).any())
    return (1 - norm.momentum) ** seen < 0.01
