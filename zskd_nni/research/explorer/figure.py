"""The explorer's figure: class similarity, target and prediction, and the image during its synthesis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zskd_nni.models.input_spec import InputSpec
from zskd_nni.research.display import LABEL, SMALL, TITLE, finish, label_classes, new_figure, show_image, style
from zskd_nni.research.explorer.one_impression import Answer

_ASKED, _ANSWERED, _SEEN = "#b0bec5", "#00796b", "#e64a19"


def exploration_picture(answer: Answer, spec: InputSpec, label: int, names: Sequence[str] | None = None) -> bytes:
    """Draw the explored impression as PNG.

    Args:
        answer: from :func:`zskd_nni.research.explorer.one_impression.explore_one`.
        spec: the value range.
        label: the class that was asked for; its row of the similarity matrix is framed.
        names: of the classes; their numbers where absent.
    """
    from matplotlib.patches import Rectangle

    names, places = names or [str(number) for number in range(len(answer.target))], np.arange(len(answer.target))
    figure = new_figure(10.4, 5.2, dpi=96)
    above, below = figure.subfigures(2, 1, height_ratios=(2.1, 1))  # type: ignore[misc]
    matrix, bars, image = above.subplots(1, 3, width_ratios=(1.15, 1.6, 1))

    # The diagonal is 1; colours are scaled to the other entries.
    similarity = answer.similarity.numpy()
    extreme = max(0.1, float(np.abs(similarity - np.diag(np.diag(similarity))).max()))
    drawn = matrix.imshow(similarity, cmap="RdBu_r", vmin=-extreme, vmax=extreme)
    above.colorbar(drawn, ax=matrix, shrink=0.72, pad=0.03).ax.tick_params(labelsize=SMALL)
    matrix.add_patch(Rectangle((-0.5, label - 0.5), len(names), 1, fill=False, linewidth=2.2))
    matrix.set_title("Class similarity", fontsize=TITLE)
    matrix.set_xlabel("class", fontsize=SMALL)
    matrix.set_ylabel("class", fontsize=SMALL)
    label_classes(matrix, names, both=True)

    for offset, values, colour, name in (
        (-0.28, answer.target, _ASKED, "soft target"),
        (0.0, answer.fitted[-1], _ANSWERED, "prediction at that temperature"),
        (0.28, answer.seen[-1], _SEEN, "prediction at temperature 1"),
    ):
        bars.bar(places + offset, values.numpy(), 0.28, color=colour, label=name)
    bars.set_ylim(0, 1)
    style(bars, f"Soft target drawn for class {names[label]}", x="class", y="probability")
    label_classes(bars, names)
    bars.legend(fontsize=SMALL, frameon=False, loc="best")

    confidence, choice = answer.seen[-1].max(0)
    note = f"{answer.steps[-1]} steps, KL {float(answer.fit[-1]):.3f} nats"
    title = f"Predicted: {names[int(choice)]}, {100 * float(confidence):.0f} %"
    show_image(image, answer.images[-1], spec, title, note, LABEL)
    for axis, step, picture, fit in zip(
        below.subplots(1, len(answer.steps), squeeze=False)[0], answer.steps, answer.images, answer.fit, strict=True
    ):
        show_image(axis, picture, spec, "start" if step == 0 else f"step {step}", f"KL {float(fit):.3f}")
    return finish(figure, "").png
