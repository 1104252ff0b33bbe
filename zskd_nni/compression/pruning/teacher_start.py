"""A narrower student that starts from the teacher's channels instead of at random."""

from __future__ import annotations

from torch import Tensor, nn

from zskd_nni.compression.pruning.prune import prune
from zskd_nni.models.teacher import Teacher
from zskd_nni.recipes.compression_config import PruningConfig
from zskd_nni.runtime.errors import UserError

_ONLY_NARROWER = (
    "Only the teacher's own network with fewer channels can start from it; leave start out to begin at random."
)


def start_from_teacher(student: nn.Module, teacher: Teacher) -> dict[str, Tensor]:
    """Give a student the weights of the teacher's channels with the largest L1 norms.

    The teacher is pruned to the student's widths, as NNI's ``L1NormPruner`` prunes, and its weights are copied. The
    student must be the teacher's network with fewer channels: the same layers under the same names.

    Args:
        student: changed in place.
        teacher: left as it is.

    Returns:
        Layer -> the teacher's channels that the student has, in order; for ``distill(kept=...)``.

    Raises:
        UserError: a layer of the student is missing in the teacher, is wider, or has another shape than the pruned one.

    Example:
        >>> from zskd_nni.models.teacher import load_teacher
        >>> from zskd_nni.models.zoo import lenet5_half
        >>> kept = start_from_teacher(lenet5_half(), load_teacher("lenet5-digits"))
        >>> len(kept["conv1"]), len(kept["conv2"])
        (3, 8)
    """
    narrower = [
        {"op_names": [path], "sparse_ratio": 1 - _width(layer) / _width(theirs)}
        for path, layer, theirs in _matching_layers(student, teacher.model)
        if _width(layer) < _width(theirs)
    ]
    network, kept = teacher.student().cpu(), {}
    if narrower:
        pruned = prune(network, PruningConfig(narrower), teacher, None, train=False)
        network, kept = pruned.network, pruned.kept_channels
    weights, own = network.state_dict(), student.state_dict()
    for name in own.keys() | weights.keys():
        ours, theirs = (list(state[name].shape) if name in state else None for state in (own, weights))
        if ours != theirs:
            raise UserError(
                f"student.start: teacher: the student's {name} is {ours or 'missing'}, and the teacher's, once pruned, "
                f"{theirs or 'missing'}. {_ONLY_NARROWER}"
            )
    student.load_state_dict(weights)
    return kept


def _width(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def _matching_layers(student: nn.Module, teacher: nn.Module) -> list[tuple[str, nn.Module, nn.Module]]:
    """Path, the student's layer and the teacher's, for every convolution and linear layer of the student."""
    theirs = dict(teacher.named_modules())
    found: list[tuple[str, nn.Module, nn.Module]] = []
    for path, layer in student.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        match = theirs.get(path)
        if match is None or type(match) is not type(layer) or _width(match) < _width(layer):
            same = match is not None and type(match) is type(layer)
            has = f"has only {_width(match)} channels there" if match is not None and same else "has no such layer"
            raise UserError(
                f"student.start: teacher: the student's {path} has {_width(layer)} channels, and the teacher {has}. "
                f"{_ONLY_NARROWER}"
            )
        found.append((path, layer, match))
    return found
