"""Layers at which the attention maps of student and teacher are compared.

Maps and distances are :func:`zskd_nni.training.losses.attention_map` and
:func:`zskd_nni.training.losses.attention_distance` (Zagoruyko & Komodakis, ICLR 2017). ZSKT and few-shot KD+AT use
them.
"""

from __future__ import annotations

from torch import Tensor, nn

from zskd_nni.models.hooks import module_at
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.hints import Pairs, output_shapes


def attention_pairs(student: nn.Module, teacher: Teacher, layers: str | Pairs = "auto") -> Pairs:
    """Paths ``(teacher's, student's)`` of the layers whose attention maps are compared.

    ``auto`` takes one layer for each spatial size that both networks have: the last module of that size that contains
    modules (a group of a wide residual network, a stage of a ResNet, as in the paper), or else the last layer. Sizes of
    one pixel hold no attention. Without a common size there is no attention transfer.

    Args:
        student: on the teacher's device.
        teacher: both networks see one grey batch.
        layers: ``auto``, ``none``, or the pairs themselves, which are checked.

    Raises:
        UserError: a named module does not exist, gives no ``(N, C, H, W)``, or the two sizes differ.
    """
    if layers == "none":
        return ()
    probe = teacher.example_input()
    if isinstance(layers, str):
        of_teacher, of_student = _last_of_each_size(teacher.model, probe), _last_of_each_size(student, probe)
        return tuple((path, of_student[size]) for size, path in of_teacher.items() if size in of_student)
    for theirs, ours in layers:
        size = _size_at(teacher.model, theirs, probe, "The teacher")
        other = _size_at(student, ours, probe, "The student")
        if size != other:
            raise UserError(
                f"Attention cannot be compared between the teacher's {theirs!r} ({size[0]} x {size[1]}) and the "
                f"student's {ours!r} ({other[0]} x {other[1]}): choose layers of the same height and width, "
                "attention: auto finds such layers, or set attention: none."
            )
    return layers


def _size_at(model: nn.Module, path: str, probe: Tensor, whose: str) -> tuple[int, int]:
    module_at(model, path, whose)
    shape = output_shapes(model, [path], probe).get(path)
    if shape is None or len(shape) != 4:
        raise UserError(
            f"{whose}'s layer {path!r} has no attention map: it gives {shape or 'nothing'}, not (N, channels, height, "
            "width)."
        )
    return shape[2], shape[3]


def _last_of_each_size(model: nn.Module, probe: Tensor) -> dict[tuple[int, int], str]:
    """Paths by spatial size, in the order in which the sizes first appear."""
    groups: dict[tuple[int, int], str] = {}
    layers: dict[tuple[int, int], str] = {}
    paths = [path for path, _ in model.named_modules() if path]
    for path, shape in output_shapes(model, paths, probe).items():
        if len(shape) == 4 and shape[2] * shape[3] > 1:
            has_modules = next(model.get_submodule(path).children(), None) is not None
            (groups if has_modules else layers)[shape[2], shape[3]] = path
    return {**layers, **groups}
