"""Which hidden layers of student and teacher shall answer alike (hints, Romero et al., FitNets, ICLR 2015, 1412.6550).

A pruned student and many hand-made small ones keep some of the teacher's layers at full width. What such a layer gives
can be compared number by number, and says far more about an image than ten logits do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zskd_nni.models.hooks import evaluating, module_at, recording_outputs
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError

Pairs = tuple[tuple[str, str], ...]


def feature_pairs(student: nn.Module, teacher: Teacher, asked: str | Pairs) -> Pairs:
    """Paths ``(teacher's, student's)`` of the layers whose outputs are matched.

    Args:
        student: takes what the teacher takes.
        teacher: whose classifier is left out of ``auto``: its outputs are the logits.
        asked: ``none``; ``auto`` for every linear layer and convolution that both networks have at the same path with
            outputs of one shape (there may be none); or the pairs themselves.

    Raises:
        UserError: a named layer is not there, or the two outputs differ in shape.
    """
    if asked == "none":
        return ()
    if isinstance(asked, str):
        names = [
            name
            for name, module in teacher.model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and name != teacher.classifier_path and _has(student, name)
        ]
        ours, theirs = _shapes(teacher, teacher.model, names), _shapes(teacher, student, names)
        return tuple((name, name) for name in names if name in ours and ours.get(name) == theirs.get(name))
    check_paths(student, teacher, asked)
    ours = _shapes(teacher, teacher.model, [path for path, _ in asked])
    theirs = _shapes(teacher, student, [path for _, path in asked])
    for path, other in asked:
        if ours.get(path) is None or ours.get(path) != theirs.get(other):
            raise UserError(
                f"distillation.features: the teacher's {path!r} gives {_told(ours.get(path))} for an image, the "
                f"student's {other!r} {_told(theirs.get(other))}; only outputs of one shape can be matched. "
                "features: auto finds such."
            )
    return asked


def check_paths(student: nn.Module, teacher: Teacher, asked: Pairs) -> None:
    """Refuse pairs that name what is not there.

    Raises:
        UserError: names the path.
    """
    for path, _ in asked:
        module_at(teacher.model, path, "distillation.features: the teacher")
    for _, path in asked:
        module_at(student, path, "distillation.features: the student")


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _told(shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else str(list(shape))


def _shapes(teacher: Teacher, model: nn.Module, paths: list[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of one image's outputs of the modules at ``paths``, for those that run and give a tensor."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    probe = teacher.example_input().to(device)
    with evaluating(model), torch.no_grad(), recording_outputs(model, paths) as seen:
        model(probe)
    return {path: tuple(value.shape[1:]) for path, value in seen.items() if isinstance(value, Tensor)}
