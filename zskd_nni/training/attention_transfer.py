"""Which layers' attention maps a student is compared at with its teacher, by module path; the models stay untouched.

Maps and distances are :func:`zskd_nni.training.losses.attention_map` and
:func:`zskd_nni.training.losses.attention_distance` (Zagoruyko & Komodakis, ICLR 2017); ZSKT and few-shot KD+AT
use them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zskd_nni.models.hooks import evaluating, hooked, module_at, recording_outputs
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError

Pairs = tuple[tuple[str, str], ...]


def attention_pairs(student: nn.Module, teacher: Teacher, layers: str | Pairs = "auto") -> Pairs:
    """Paths ``(teacher's, student's)`` of the layers whose attention maps are compared.

    By themselves, for each spatial size that both networks have: the last module of that size with modules in it (a
    group of a wide residual network, a stage of a ResNet, as in the paper), or the last layer where a network has
    none. Sizes of one pixel hold no attention. There may be no common size: then there is no attention transfer.

    Args:
        student: on the teacher's device.
        teacher: both networks are shown one grey batch.
        layers: ``auto``, ``none``, or the pairs themselves, which are looked at.

    Raises:
        UserError: a named module is not there, gives no ``(N, C, H, W)``, or the two sizes differ.
    """
    if layers == "none":
        return ()
    probe = teacher.example_input()
    if isinstance(layers, str):
        sizes = [_last_of_each_size(network, probe) for network in (teacher.model, student)]
        return tuple((sizes[0][size], sizes[1][size]) for size in sizes[0] if size in sizes[1])
    for ours, theirs in layers:
        shapes = [
            _size_at(network, path, probe, whose)
            for network, path, whose in ((teacher.model, ours, "The teacher"), (student, theirs, "The student"))
        ]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"Attention cannot be compared between the teacher's {ours!r} ({shapes[0][0]} x {shapes[0][1]}) and "
                f"the student's {theirs!r} ({shapes[1][0]} x {shapes[1][1]}): choose layers of the same height and "
                "width, attention: auto finds such, or set attention: none."
            )
    return layers


def _size_at(model: nn.Module, path: str, probe: Tensor, whose: str) -> tuple[int, int]:
    module_at(model, path, whose)
    with recording_outputs(model, [path]) as outputs, evaluating(model), torch.no_grad():
        model(probe)
    output = outputs.get(path)
    if not isinstance(output, Tensor) or output.ndim != 4:
        shape = list(output.shape) if isinstance(output, Tensor) else "nothing"
        raise UserError(
            f"{whose}'s layer {path!r} has no attention map: it gives {shape}, not (N, channels, height, width)."
        )
    return output.shape[2], output.shape[3]


def _last_of_each_size(model: nn.Module, probe: Tensor) -> dict[tuple[int, int], str]:
    groups: dict[tuple[int, int], str] = {}
    layers: dict[tuple[int, int], str] = {}

    def note(path: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
            has_modules = next(model.get_submodule(path).children(), None) is not None
            (groups if has_modules else layers)[output.shape[2], output.shape[3]] = path

    paths = [path for path, _ in model.named_modules() if path]
    with hooked(model, paths, after=note), evaluating(model), torch.no_grad():
        model(probe)
    return {**layers, **groups}
