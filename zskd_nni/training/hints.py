"""Hidden layers whose outputs the student matches (hints, Romero et al., FitNets, ICLR 2015, 1412.6550).

A pruned student and many small hand-made ones keep some of the teacher's layers at full width. The outputs of such a
layer can be compared number by number, and say far more about an image than ten logits do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zskd_nni.models.hooks import evaluating, hooked, module_at
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError

Pairs = tuple[tuple[str, str], ...]
"""Paths ``(teacher's, student's)`` of layers that are compared."""


def feature_pairs(student: nn.Module, teacher: Teacher, layers: str | Pairs) -> Pairs:
    """The layers whose outputs are matched.

    Args:
        student: takes what the teacher takes.
        teacher: its classifier is left out of ``auto``, whose outputs are the logits.
        layers: ``none``; ``auto`` for every linear layer and convolution that both networks have at the same path with
            outputs of one shape (there may be none); or the pairs themselves.

    Raises:
        UserError: a named layer does not exist, or the two outputs differ in shape.
    """
    if layers == "none":
        return ()
    auto = isinstance(layers, str)
    if isinstance(layers, str):
        known = dict(student.named_modules())
        layers = tuple(
            (path, path)
            for path, module in teacher.model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and path != teacher.classifier_path and path in known
        )
    else:
        check_paths(student, teacher, layers)
    probe = teacher.example_input()
    hints = output_shapes(teacher.model, [path for path, _ in layers], probe)
    features = output_shapes(student, [path for _, path in layers], probe)
    matched = []
    for theirs, ours in layers:
        shapes = hints.get(theirs, [])[1:], features.get(ours, [])[1:]  # of one image
        if theirs in hints and ours in features and shapes[0] == shapes[1]:
            matched.append((theirs, ours))
        elif not auto:
            raise UserError(
                f"distillation.features: the teacher's {theirs!r} gives {shapes[0] or 'no tensor'} for an image, the "
                f"student's {ours!r} {shapes[1] or 'no tensor'}; only outputs of one shape can be matched. "
                "features: auto finds such."
            )
    return tuple(matched)


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
    """Shapes of the modules' last outputs for a batch of images, by path, in the order of these calls.

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
