"""The explorer's picture: likeness of classes, target and answer, and the image on its way."""

from __future__ import annotations

import io

import numpy as np
from torch import Tensor

from zskd_nni.models.input_spec import InputSpec
from zskd_nni.research.explorer.one_impression import Answer
from zskd_nni.synthesis.image_grid import as_picture

_ASKED, _ANSWERED, _SEEN = "#b0bec5", "#00796b", "#e64a19"


def exploration_picture(answer: Answer, spec: InputSpec, label: int) -> bytes:
    """Draw an answer as PNG.

    Args:
        answer: from :func:`zskd_nni.research.explorer.one_impression.explore_one`.
        spec: the value range.
        label: the class that was asked for; its row of the similarity matrix is framed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    classes, looks = len(answer.target), len(answer.steps)
    figure = Figure(figsize=(10.4, 5.2), dpi=96, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(2.1, 1))  # type: ignore[misc]
    matrix, bars, image = above.subplots(1, 3, width_ratios=(1.15, 1.6, 1))

    # Every class is exactly like itself; the scale is that of the others, among which the differences are.
    similarity = answer.similarity.numpy()
    extreme = max(0.1, float(np.abs(similarity - np.diag(np.diag(similarity))).max()))
    drawn = matrix.imshow(similarity, cmap="RdBu_r", vmin=-extreme, vmax=extreme)
    above.colorbar(drawn, ax=matrix, shrink=0.72, pad=0.03).ax.tick_params(labelsize=7)
    matrix.add_patch(Rectangle((-0.5, label - 0.5), classes, 1, fill=False, linewidth=2.2))
    matrix.set_title("How alike the teacher finds classes", fontsize=10)
    _few_ticks(matrix, classes)

    places = np.arange(classes)
    for offset, values, colour, name in (
        (-0.28, answer.target, _ASKED, "asked"),
        (0.0, answer.fitted[-1], _ANSWERED, "answered at that temperature"),
        (0.28, answer.seen[-1], _SEEN, "answered at temperature 1"),
    ):
        bars.bar(places + offset, values.numpy(), 0.28, color=colour, label=name)
    bars.set_ylim(0, 1)
    bars.set_xticks(places if classes <= 20 else places[:: classes // 10])
    bars.set_title(f"Soft target of class {label}, and the teacher's answer", fontsize=10)
    bars.legend(fontsize=8, frameon=False, loc="best")
    bars.spines[["top", "right"]].set_visible(False)

    confidence, choice = answer.seen[-1].max(0)
    _show(image, answer.images[-1], spec)
    image.set_title(f"Seen as {int(choice)}, {100 * float(confidence):.0f} %", fontsize=10)
    image.set_xlabel(f"{answer.steps[-1]} steps, divergence {float(answer.fit[-1]):.3f}", fontsize=9)

    for axis, step, picture, fit in zip(
        below.subplots(1, looks, squeeze=False)[0], answer.steps, answer.images, answer.fit, strict=True
    ):
        _show(axis, picture, spec)
        axis.set_title("start" if step == 0 else f"step {step}", fontsize=8)
        axis.set_xlabel(f"{float(fit):.3f}", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _show(axis, image: Tensor, spec: InputSpec) -> None:  # type: ignore[no-untyped-def]
    axis.imshow(as_picture(image, spec), cmap="gray", vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])


def _few_ticks(axis, classes: int) -> None:  # type: ignore[no-untyped-def]
    ticks = list(range(classes)) if classes <= 20 else list(range(0, classes, classes // 10))
    axis.set_xticks(ticks)
    axis.set_yticks(ticks)
    axis.tick_params(labelsize=7)
