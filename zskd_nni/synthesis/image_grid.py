"""Pictures of impressions, each labelled with the teacher's class and confidence."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zskd_nni.models.input_spec import InputSpec
from zskd_nni.runtime import signals
from zskd_nni.runtime.files import write_atomic


def impressions_picture(
    images: Tensor,
    logits: Tensor,
    spec: InputSpec,
    path: Path | io.BytesIO,
    columns: int = 10,
    title: str = "",
    names: Sequence[str] | None = None,
    rows: Sequence[str] = (),
) -> None:
    """Draw ``(N, C, H, W)`` images in a grid with the teacher's class and confidence above each.

    Args:
        images: in the value range.
        logits: ``(N, K)`` of the teacher.
        spec: the value range.
        path: a ``.png`` file, or memory to write one into.
        columns: images in a row.
        title: above the grid.
        names: of the classes; their numbers where absent.
        rows: a label at the left of each row of the grid.
    """
    from matplotlib.figure import Figure

    confidence, seen = torch.softmax(logits.float(), 1).max(1)
    lines, between = max(1, -(-len(images) // columns)), " " if names is None else "\n"
    high = lines * (1.2 if names is None else 1.35) + (0.45 if title else 0)
    figure = Figure(figsize=(columns * 0.95 + (0.3 if rows else 0), high), dpi=110)
    for number, axis in enumerate(figure.subplots(lines, columns, squeeze=False).flat):
        if number >= len(images):
            axis.axis("off")
            continue
        axis.imshow(as_picture(images[number], spec), cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        label = int(seen[number])
        what = label if names is None else names[label]
        axis.set_title(f"{what}{between}{100 * float(confidence[number]):.0f} %", fontsize=9, pad=2)
        if rows and number % columns == 0:
            axis.set_ylabel(rows[number // columns], fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10, y=0.998)
    figure.tight_layout(pad=0.4)
    signals.check()
    buffer = io.BytesIO() if isinstance(path, Path) else path
    figure.savefig(buffer, format="png")
    if isinstance(path, Path):
        write_atomic(path, buffer.getvalue())


def as_picture(image: Tensor, spec: InputSpec) -> np.ndarray:
    """An image ``(C, H, W)`` as matplotlib draws it: ``(H, W, 3)`` in [0, 1].

    Three channels are drawn as colours, any other number by their mean, ``(H, W)``.
    """
    unit = ((image.float() - spec.low) / (spec.high - spec.low)).clamp(0, 1)
    return (unit.permute(1, 2, 0) if len(unit) == 3 else unit.mean(0)).numpy()


def some_of_each(parts: Iterable[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Images and logits of about ``count`` impressions, equally many of every class if there are enough.

    Args:
        parts: images ``(n, C, H, W)`` and logits ``(n, K)`` of each shard, read until there are enough; a shard may
            hold a single class.
        count: how many in all; at least one of every class is taken.
    """
    images, logits = [], []
    for some, answers in parts:
        images.append(some)
        logits.append(answers)
        per_class = max(1, count // answers.shape[1])
        chosen = pick_by_class(torch.cat(logits), per_class)
        if len(chosen) == per_class * answers.shape[1]:
            break
    return torch.cat(images)[chosen], torch.cat(logits)[chosen]


def spread(count: int, most: int = 20) -> list[int]:
    """At most ``most`` numbers of ``range(count)``, evenly spaced, from 0."""
    return sorted({index * count // min(count, most) for index in range(min(count, most))})


def pick_by_class(logits: Tensor, per_class: int) -> Tensor:
    """Indices of up to ``per_class`` images of every predicted class, class by class: ``(N, K) -> (M,)``."""
    seen = logits.argmax(1)
    chosen = [(seen == label).nonzero().flatten()[:per_class] for label in range(logits.shape[1])]
    return torch.cat(chosen)
