"""Figures of every step between a teacher and its student, for notebooks."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from zskd_nni.models.input_spec import InputSpec
from zskd_nni.research.display import (
    LABEL,
    SMALL,
    TITLE,
    Picture,
    finish,
    label_classes,
    new_figure,
    new_grid,
    show_image,
    style,
)
from zskd_nni.research.explorer.one_impression import Answer
from zskd_nni.runtime.errors import UserError
from zskd_nni.synthesis import Impressions
from zskd_nni.synthesis.image_grid import impressions_picture
from zskd_nni.training.checkpoint import History
from zskd_nni.training.metrics import TransitionResult

if TYPE_CHECKING:
    from zskd_nni.compression.pruning.speedup import LayerWidths

ASKED, ANSWERED, OTHER = "#90a4ae", "#00796b", "#e64a19"
BEFORE = "#cfd8dc"
# Colours that most colour-blind people can distinguish (Okabe and Ito), and two greys for controls.
SERIES = ("#00796b", "#e69f00", "#0072b2", "#d55e00", "#cc79a7", "#56b4e9", "#546e7a", "#b0bec5")
_MOST_NUMBERS = 12  # classes of a matrix whose entries are written out


def _names(names: Sequence[str] | None, classes: int) -> list[str]:
    if names is None:
        return [str(number) for number in range(classes)]
    if len(names) != classes:
        raise UserError(f"{len(names)} names were given for {classes} classes.")
    return list(names)


def _matrix(
    matrix: Tensor, names: list[str], title: str, alt: str, diverging: bool, axes: tuple[str, str, str]
) -> Picture:
    values, classes = matrix.double().numpy(), len(names)
    figure = new_figure(6.6, 5.6)
    axis = figure.subplots()
    # Colours are scaled to the entries off the diagonal, which differ little beside it.
    rest = np.abs(values[~np.eye(classes, dtype=bool)])
    extreme = max(float(rest.max(initial=0.0)), 1e-9)
    drawn = axis.imshow(
        values, cmap="RdBu_r" if diverging else "YlGnBu", vmin=-extreme if diverging else 0, vmax=extreme
    )
    bar = figure.colorbar(drawn, ax=axis, shrink=0.85, extend="max")
    bar.ax.tick_params(labelsize=SMALL)
    bar.set_label(axes[2], fontsize=LABEL)
    if classes <= _MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            text = f"{value:.2f}".replace("-0.00", "0.00").replace("0.", ".") if diverging else f"{value:.0f}"
            strong = abs(value) > 0.62 * extreme
            axis.text(
                column, row, text, ha="center", va="center", fontsize=SMALL, color="white" if strong else "#263238"
            )
    label_classes(axis, names, both=True)
    axis.set_xlabel(axes[0], fontsize=LABEL)
    axis.set_ylabel(axes[1], fontsize=LABEL)
    axis.set_title(title, fontsize=TITLE)
    return finish(figure, alt)


def similarity_picture(similarity: Tensor, names: Sequence[str] | None = None) -> Picture:
    """A teacher's class similarity as a heat map.

    Args:
        similarity: ``(K, K)`` cosines, :func:`zskd_nni.methods.zskd.class_similarity`.
        names: of the classes.
    """
    shown = _names(names, len(similarity))
    others = similarity - 2 * torch.eye(len(similarity))
    one, other = divmod(int(others.argmax()), len(similarity))
    alt = f"Heat map of class similarity; the most alike are {shown[one]} and {shown[other]}."
    return _matrix(
        similarity, shown, "Class similarity", alt, True, ("class", "class", "cosine of the two rows of weights")
    )


def confusion_picture(counts: Tensor, names: Sequence[str] | None = None, title: str = "") -> Picture:
    """Which class is taken for which, as a heat map; colours are scaled to the mistakes.

    Args:
        counts: ``(K, K)``, rows true, columns chosen, :func:`zskd_nni.training.metrics.confusion`.
        names: of the classes.
        title: above it.
    """
    shown = _names(names, len(counts))
    mistakes = counts - torch.diag(counts.diagonal())
    one, other = divmod(int(mistakes.argmax()), len(counts))
    alt = f"Heat map of {title or 'mistakes'}; {shown[one]} is most often taken for {shown[other]}."
    axes = ("predicted class", "true class", "images")
    return _matrix(counts, shown, title or "Images of each class by the class predicted", alt, False, axes)


def targets_picture(
    rows: Mapping[str, Tensor], label: int | None, names: Sequence[str] | None = None, title: str = ""
) -> Picture:
    """Soft targets as bars.

    Args:
        rows: by caption, ``(n, K)`` targets; one row of charts each.
        label: the class they were drawn for; its bar is coloured. None where they were not drawn for one.
        names: of the classes.
        title: above them; by default the class they were drawn for.
    """
    columns = max(map(len, rows.values()))
    shown = _names(names, next(iter(rows.values())).shape[1])
    colours = [ANSWERED if k == label else ASKED for k in range(len(shown))]
    figure = new_figure(9.4, 0.8 + 1.75 * len(rows))
    grid = figure.subplots(len(rows), columns, squeeze=False, sharex=True, sharey=True)
    for line, (caption, targets) in zip(grid, rows.items(), strict=True):
        for axis, target in zip(line, targets, strict=False):
            axis.bar(range(len(shown)), target.numpy(), 0.85, color=colours)
            axis.set_ylim(0, 1)
            style(axis)
            label_classes(axis, shown)
        for axis in line[len(targets) :]:
            axis.axis("off")
        line[0].set_ylabel(caption, fontsize=LABEL)
    drawn_for = "" if label is None else f" drawn for class {shown[label]} (dark bar)"
    figure.suptitle(title or f"Soft targets{drawn_for}", fontsize=TITLE)
    figure.supxlabel("class", fontsize=LABEL)
    figure.supylabel("probability", fontsize=LABEL)
    alt = f"Bar charts of soft targets{drawn_for}: {', '.join(rows)}."
    return finish(figure, alt)


def gallery_picture(
    images: Tensor,
    logits: Tensor,
    spec: InputSpec,
    names: Sequence[str] | None = None,
    columns: int = 10,
    title: str = "",
    rows: Sequence[str] = (),
) -> Picture:
    """A grid of images with the teacher's class and confidence above each.

    Args:
        images: ``(N, C, H, W)`` in the value range.
        logits: ``(N, K)`` of the teacher.
        spec: the value range.
        names: of the classes.
        columns: images in a row.
        title: above the grid.
        rows: a label at the left of each row.
    """
    buffer, columns = io.BytesIO(), min(columns, max(1, len(images)))
    shown = None if names is None else _names(names, logits.shape[1])
    impressions_picture(images, logits, spec, buffer, columns, title, shown, rows)
    alt = f"{title or 'Images'}: {len(images)}, with what the teacher sees."
    return Picture(buffer.getvalue(), alt, columns * 70 + (22 if rows else 0))


def opinions_picture(
    made: Impressions, spec: InputSpec, temperature: float, names: Sequence[str] | None = None, columns: int = 3
) -> Picture:
    """Images, each beside its soft target and the teacher's prediction.

    Args:
        made: a few of them.
        spec: the value range.
        temperature: of the teacher's softmax during their synthesis.
        names: of the classes.
        columns: images in a row.
    """
    shown, count = _names(names, made.targets.shape[1]), len(made)
    answers = torch.softmax(made.logits.float() / temperature, 1)
    certain, chosen = torch.softmax(made.logits.float(), 1).max(1)
    rows = -(-count // columns)
    figure = new_figure(9.4, 0.7 + 1.85 * rows)
    grid = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 1.5] * columns)
    places = np.arange(len(shown))
    axes = grid.flatten()
    for axis in axes[2 * count :]:
        axis.axis("off")
    for number, (left, right) in enumerate(zip(axes[0 : 2 * count : 2], axes[1::2], strict=False)):
        seen = f"{shown[int(chosen[number])]}, {100 * float(certain[number]):.0f} %"
        show_image(left, made.images[number], spec, seen)
        right.bar(places - 0.2, made.targets[number].numpy(), 0.4, color=ASKED, label="soft target")
        right.bar(places + 0.2, answers[number].numpy(), 0.4, color=ANSWERED, label="prediction")
        right.set_ylim(0, 1)
        style(right)
        label_classes(right, shown)
    handles = grid[0][1].get_legend_handles_labels()
    figure.suptitle("Each impression beside its soft target and the teacher's prediction", fontsize=TITLE)
    figure.supxlabel(f"class (bars: probability at temperature {temperature:g})", fontsize=LABEL)
    figure.legend(*handles, loc="outside lower right", ncols=2, fontsize=SMALL, frameon=False)
    return finish(figure, f"{count} impressions, each beside its soft target and the teacher's answer.")


def evolution_picture(
    answers: Sequence[Answer], spec: InputSpec, names: Sequence[str] | None = None, rows: Sequence[str] = ()
) -> Picture:
    """Impressions at several steps of their synthesis, one row each.

    Args:
        answers: from :func:`zskd_nni.research.explorer.one_impression.explore_one`.
        spec: the value range.
        names: of the classes.
        rows: a label for each; by default the class with the largest part of its target.
    """
    shown = _names(names, len(answers[0].target))
    columns = max(len(answer.steps) for answer in answers)
    labels = rows or [f"target: {shown[int(answer.target.argmax())]}" for answer in answers]
    figure = new_figure(9.4, 1.75 * len(answers) + 0.5)
    grid = figure.subplots(len(answers), columns, squeeze=False)
    for line, answer, label in zip(grid, answers, labels, strict=True):
        line[0].set_ylabel(label, fontsize=SMALL)
        for axis in line[len(answer.steps) :]:
            axis.axis("off")
        for number, (axis, step) in enumerate(zip(line, answer.steps, strict=False)):
            certain, choice = answer.seen[number].max(0)
            note = f"{shown[int(choice)]}\n{100 * float(certain):.0f} %\nKL {float(answer.fit[number]):.3f}"
            show_image(axis, answer.images[number], spec, "start" if step == 0 else f"step {step}", note)
    title = "Impressions during synthesis; below each: the teacher's class, its confidence, KL from the target (nats)"
    figure.suptitle(title, fontsize=LABEL)
    asked = ", ".join(dict.fromkeys(shown[int(answer.target.argmax())] for answer in answers))
    return finish(figure, f"Impressions at several steps of their synthesis, for targets of the classes {asked}.")


def curves_picture(
    histories: Mapping[str, History], title: str = "Loss during training", ylabel: str = "distillation loss"
) -> Picture:
    """Losses along the steps, on a logarithmic scale.

    Args:
        histories: by name, as :func:`zskd_nni.training.distillation.distill` gives them.
        title: above them.
        ylabel: what is drawn.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = new_figure(7.6, 3.4)
    axis = figure.subplots()
    for (name, history), colour in zip(histories.items(), SERIES * len(histories), strict=False):
        losses = [max(loss, 1e-12) for loss in history.losses]
        axis.plot(history.steps, losses, color=colour, label=name, marker="o" if len(losses) < 3 else None)
    axis.set_yscale("log")
    axis.grid(alpha=0.25, which="both")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")  # 0.1 in the place of a power with a tiny exponent
    axis.yaxis.set_minor_formatter(NullFormatter())
    style(axis, title, x="training step", y=f"{ylabel} (log scale)")
    axis.legend(fontsize=SMALL, frameon=False)
    return finish(figure, f"Curves of the {ylabel}: {', '.join(histories)}.")


def bars_picture(values: Mapping[str, float | None], title: str, unit: str = "%") -> Picture:
    """Values side by side, as horizontal bars.

    Args:
        values: by name; those that are None (not measured) are left out.
        title: above them.
        unit: of all values.

    Raises:
        UserError: nothing was measured.
    """
    known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
    if not known:
        raise UserError("There is nothing to draw: none of the figures was measured.")
    figure = new_figure(7.6, 1.0 + 0.36 * len(known))
    axis = figure.subplots()
    names = list(known)[::-1]
    drawn = axis.barh(names, [known[name] for name in names], 0.68, color=ANSWERED)
    axis.bar_label(drawn, [f" {known[name]:.2f} {unit}".rstrip() for name in names], fontsize=SMALL)
    axis.set_xlim(0, 1.14 * max(known.values()) or 1)
    style(axis, title, x=unit)
    return finish(figure, f"{title}: " + ", ".join(f"{name} {value:.2f} {unit}" for name, value in known.items()))


def transitions_picture(results: Mapping[str, TransitionResult], followed: str = "student") -> Picture:
    """Transition curves of two networks along the same images, one chart for each pair.

    Args:
        results: by name, from :func:`zskd_nni.training.metrics.mean_transition_error`.
        followed: name of the network whose gradient was followed; the other is the teacher.
    """
    columns = 2 if len(results) == 4 else min(3, len(results))
    figure, axes = new_grid(len(results), columns, 9.4 if columns > 1 else 5.2, 2.5)
    for (name, result), axis in zip(results.items(), axes, strict=True):
        steps = np.arange(result.steps)
        mine, others = result.followed.numpy(), result.other.numpy()
        axis.fill_between(steps, mine, others, color=OTHER, alpha=0.14)
        axis.plot(steps, mine, color=OTHER, label=followed)
        axis.plot(steps, others, color=ANSWERED, label="teacher")
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.25)
        style(axis, f"{name}: error {result.error:.3f}")
    figure.suptitle("Transition curves, mean over the images", fontsize=TITLE)
    figure.supxlabel("step towards another class", fontsize=LABEL)
    figure.supylabel("probability of that class", fontsize=LABEL)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower right", ncols=2, fontsize=SMALL, frameon=False)
    alt = ", ".join(f"{name} {result.error:.3f}" for name, result in results.items())
    return finish(figure, f"Transition curves of {followed} and teacher; mean transition error: {alt}.")


def embedding_picture(
    points: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    behind: str | None = None,
    names: Sequence[str] | None = None,
) -> Picture:
    """Sets of images in one plane, a chart for each, with a legend of the classes.

    Args:
        points: by name of the set, ``(n, 2)``, :func:`zskd_nni.research.tutorial.measuring.embed`.
        labels: by name, ``(n,)`` the class of each, which gives the colour.
        behind: a set that is drawn behind every other one in grey, for comparison.
        names: of the classes; their numbers where absent, of which there are at least ten.
    """
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    classes = len(names) if names is not None else max(10, 1 + max(int(label.max()) for label in labels.values()))
    figure, axes = new_grid(len(points), min(3, len(points)), 9.4, 3.1)
    colours = colormaps["tab10"] if classes <= 10 else colormaps["turbo"].resampled(classes)
    for (name, at), axis in zip(points.items(), axes, strict=True):
        if behind is not None and name != behind:
            axis.scatter(*points[behind].T.numpy(), s=5, color=BEFORE, linewidths=0)
        axis.scatter(*at.T.numpy(), s=9, color=colours(labels[name].numpy()), linewidths=0)
        style(axis, name, x="first t-SNE axis (no unit)", y="second t-SNE axis (no unit)")
        axis.set(xticks=[], yticks=[])
    dots: list[tuple[Any, str]] = [(colours(k), name) for k, name in enumerate(_names(names, classes))]
    dots += [] if behind is None else [(BEFORE, behind)]
    handles = [Line2D([], [], marker="o", linestyle="", color=colour, label=name) for colour, name in dots]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=SMALL, frameon=False,
                  title="class that the teacher predicts", title_fontsize=SMALL)  # fmt: skip
    beside = "" if behind is None else f", with {behind} in grey behind"
    return finish(figure, f"Embedding of {', '.join(points)}{beside}.")


def widths_picture(layers: Sequence[LayerWidths | Mapping[str, Any]], title: str = "") -> Picture:
    """Channels of each layer before and after shrinking.

    Args:
        layers: of :class:`~zskd_nni.compression.pruning.speedup.ShrinkResult`, or of a report's ``pruning``.
        title: above it.
    """
    rows = [layer if isinstance(layer, Mapping) else vars(layer) for layer in layers]
    rows = [row for row in rows if "Norm" not in row["kind"]]
    figure = new_figure(7.6, 1.1 + 0.34 * len(rows))
    axis = figure.subplots()
    places = np.arange(len(rows))[::-1]
    before, after = ([row[f"outputs_{when}"] for row in rows] for when in ("before", "after"))
    drawn = axis.barh(places, before, 0.7, color=BEFORE, label="before")
    axis.barh(places, after, 0.7, color=ANSWERED, label="after")
    labels = [f" {b} to {a}" if a != b else f" {b}" for b, a in zip(before, after, strict=True)]
    axis.bar_label(drawn, labels, fontsize=SMALL, label_type="edge")
    axis.set_yticks(places, [f"{row['name']} ({row['kind']})" for row in rows], fontsize=SMALL)
    style(axis, title, x="channels (convolutions) or units (linear layers)")
    axis.legend(fontsize=SMALL, frameon=False)
    changed = [f"{row['name']} {b} to {a}" for row, b, a in zip(rows, before, after, strict=True) if a != b]
    return finish(figure, f"Widths of the layers before and after: {', '.join(changed) or 'nothing changed'}.")
