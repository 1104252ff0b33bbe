"""The steps of a run, known before it begins, so that each can be shown as *step 2 of 6*."""

from __future__ import annotations

from collections.abc import Iterator

from zskd_nni.pipeline.report import CONTROL_IMAGES
from zskd_nni.recipes.schema import Recipe

HELD_OUT, TRANSFER, EXPORT, EVALUATION = "held-out images", "transfer set", "export", "evaluation"
_TITLES = {
    HELD_OUT: "held-out images",
    TRANSFER: "images to train on",
    EXPORT: "exporting the student",
    EVALUATION: "measuring all networks",
}
_WHO = {"student": "the student", "control-none": "the control without distillation"}
_WORK = {
    "pruning": "pruning",
    "distillation": "distilling",
    "quantization": "quantizing",
    "pruning, quantization and distillation": "pruning, quantizing and distilling",
}


def students_of(recipe: Recipe) -> dict[str, str]:
    """The name in the report of each student that a run makes -> its name in ``state/``, in the order of making."""
    controls = [name for name in ("none", *CONTROL_IMAGES) if name in recipe.controls]
    return {"student": "student", **{name: f"control-{name}" for name in controls}}


def headings(recipe: Recipe, given: bool = False) -> dict[str, str]:
    """Each step of a run -> what is shown above it.

    Args:
        recipe: that is run.
        given: whether the images are given, so that only the held-out ones are made.

    Example:
        >>> from zskd_nni.recipes.load import load_recipe
        >>> steps = headings(load_recipe("mnist-half").recipe)
        >>> steps["distillation of student"]
        'step 3 of 6: distilling the student'
    """
    keys = [HELD_OUT, *(() if given else (TRANSFER,)), *_of_students(recipe), EXPORT, EVALUATION]
    return {key: f"step {number} of {len(keys)}: {_title(key)}" for number, key in enumerate(keys, 1)}


def _title(key: str) -> str:
    work, _, who = key.partition(" of ")
    if not who:
        return _TITLES[key]
    return f"{_WORK[work]} {_WHO.get(who) or 'the control on ' + who.removeprefix('control-')}"


def _of_students(recipe: Recipe) -> Iterator[str]:
    pruning, quantization = recipe.compression.pruning, recipe.compression.quantization
    for name in students_of(recipe).values():
        trains = name != "control-none"
        if quantization is not None and quantization.fused and trains:
            yield f"pruning, quantization and distillation of {name}"
            continue
        if pruning is not None:
            yield f"pruning of {name}"
        if trains and (recipe.student is not None or pruning is not None):
            yield f"distillation of {name}"
        if quantization is not None and (trains or _only_rounds(quantization.quantizer)):
            yield f"quantization of {name}"


def _only_rounds(quantizer: str) -> bool:
    """Whether the quantizer can be calibrated without training."""
    from zskd_nni.compression.quantization.nni_quantizer import ROUNDING_QUANTIZERS, quantizer_class_name

    return quantizer_class_name(quantizer) in ROUNDING_QUANTIZERS
