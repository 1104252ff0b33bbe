"""Hidden layers whose outputs the student matches (hints, Romero et al., FitNets, ICLR 2015, 1412.6550).

A pruned student keeps some of the teacher's layers at full width, and some channels of the others. The outputs of both
can be compared element by element, and carry far more information about an image than ten logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zskd_nni.models.hooks import evaluating, hooked, module_at
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError

Pairs = tuple[tuple[str, str], ...]
"""Paths ``(teacher's, student's)`` of layers that are compared."""


class Hint(NamedTuple):
    """Two layers that are compared.

    Attributes:
        teacher: path of the teacher's layer.
        student: path of the student's layer.
        channels: the teacher's channels that the student has, in the student's order; None if it has all.
        widths: channels of the student's and of the teacher's layer, where a regressor must lead from one to the other.
    """

    teacher: str
    student: str
    channels: Tensor | None = None
    widths: tuple[int, int] | None = None

    def teacher_part(self, outputs: Tensor) -> Tensor:
        """The part of the teacher's outputs ``(N, C, ...)`` that the student's are compared with."""
        return outputs if self.channels is None else outputs.index_select(1, self.channels.to(outputs.device))


def find_hints(
    student: nn.Module,
    teacher: Teacher,
    layers: str | Pairs,
    kept: Mapping[str, Tensor] | None = None,
    regressors: bool = False,
) -> tuple[Hint, ...]:
    """The layers whose outputs are matched.

    Args:
        student: a network with the teacher's input.
        teacher: ``auto`` leaves out its classifier, whose outputs are the logits.
        layers: ``none``; the pairs themselves; or ``auto``: every linear layer and convolution (or the BatchNorm layer
            that follows it) that both networks have at the same path, if the outputs have the same shape or ``kept``
            names the channels. There may be no such layer.
        kept: layer of the student -> the teacher's channels that pruning kept in it, in order.
        regressors: match layers that differ only in their number of channels, too.

    Raises:
        UserError: a named layer does not exist, or the two outputs differ in shape.
    """
    if layers == "none":
        return ()
    auto = isinstance(layers, str)
    if isinstance(layers, str):
        layers = tuple((path, path) for path in _shared_layers(student, teacher))
    else:
        check_paths(student, teacher, layers)
    probe = teacher.example_input()
    hints = output_shapes(teacher.model, [path for path, _ in layers], probe)
    features = output_shapes(student, [path for _, path in layers], probe)
    matched: list[Hint] = []
    for theirs, ours in layers:
        shapes = hints.get(theirs, [])[1:], features.get(ours, [])[1:]  # of one image
        channels = (kept or {}).get(ours)
        if theirs in hints and ours in features and shapes[0] == shapes[1]:
            matched.append(Hint(theirs, ours))
        elif theirs == ours and channels is not None and shapes[1] == [len(channels), *shapes[0][1:]]:
            matched.append(Hint(theirs, ours, channels))
        elif regressors and all(shapes) and shapes[0][1:] == shapes[1][1:]:
            matched.append(Hint(theirs, ours, widths=(shapes[1][0], shapes[0][0])))
        elif not auto:
            raise UserError(
                f"distillation.features: the teacher's {theirs!r} gives {shapes[0] or 'no tensor'} for an image, the "
                f"student's {ours!r} {shapes[1] or 'no tensor'}; only outputs of one shape can be matched, and with "
                "regressors: true those that differ in their channels alone. features: auto finds such layers."
            )
    return tuple(matched)


class Regressors(nn.ModuleList):
    """Linear maps from the student's channels to the teacher's, one for each hint (FitNets, section 2.2).

    They are trained along with the student and thrown away with the training. A hint whose outputs have the teacher's
    channels already gets the identity.

    Args:
        hints: as :func:`find_hints` gives them.
        like: a weight of the student; the maps lie on its device.

    Example:
        >>> maps = Regressors([Hint("conv", "conv", widths=(4, 8))], torch.zeros(1))
        >>> maps.outputs(0, torch.rand(2, 4, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(self, hints: Sequence[Hint], like: Tensor) -> None:
        maps = [nn.Identity() if hint.widths is None else nn.Linear(*hint.widths) for hint in hints]
        super().__init__(maps)
        self.to(like.device)

    def outputs(self, index: int, features: Tensor) -> Tensor:
        """The student's outputs ``(N, C, ...)`` in the teacher's number of channels: ``(N, C', ...)``."""
        regressor = self[index]
        if isinstance(regressor, nn.Identity):
            return features
        return regressor(features.movedim(1, -1)).movedim(-1, 1)


def _shared_layers(student: nn.Module, teacher: Teacher) -> list[str]:
    """Paths of the linear, convolution and BatchNorm layers that both networks have, for ``auto``."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    layers = [entry for entry in teacher.model.named_modules() if isinstance(entry[1], (nn.Linear, nn.Conv2d, *norms))]
    following = [layer for _, layer in layers[1:]] + [None]
    known = dict(student.named_modules())
    return [
        path
        for (path, layer), after in zip(layers, following, strict=True)
        if path in known
        and path != teacher.classifier_path
        and (isinstance(layer, norms) or not isinstance(after, norms))  # BatchNorm's output is compared
    ]


def check_paths(student: nn.Module, teacher: Teacher, layers: Pairs) -> None:
    """Refuse pairs that name a module that does not exist.

    Raises:
        UserError: names the path.
    """
    for theirs, ours in layers:
        module_at(teacher.model, theirs, "distillation.features: the teacher")
        module_at(student, ours, "distillation.features: the student")


@torch.no_grad()
def output_shapes(model: nn.Module, paths: list[str], probe: Tensor) -> dict[str, list[int]]:
    """Shapes of the modules' last outputs for a batch of images, by path, in the order of the calls.

    Modules that do not run or give no tensor are left out.

    Args:
        model: left as it is.
        paths: of modules that exist.
        probe: ``(N, C, H, W)``, normalised.

    Example:
        >>> output_shapes(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), ["0", "1"], torch.zeros(3, 1, 2, 2))
        {'0': [3, 4], '1': [3, 2]}
    """
    device = next((p.device for p in model.parameters()), probe.device)
    shapes: dict[str, list[int]] = {}

    def note(path: str, output: Any) -> None:
        shapes.pop(path, None)
        if isinstance(output, Tensor):
            shapes[path] = list(output.shape)

    with evaluating(model), hooked(model, paths, after=note):
        model(probe.to(device))
    return shapes
