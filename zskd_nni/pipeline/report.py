"""What ``report.json`` holds: every network of a run measured on the same images, and how it came about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zskd_nni.data.datasets import NAMED_SETS, LabelledImages
from zskd_nni.methods.registry import find_method, is_data_free
from zskd_nni.models.teacher import Teacher
from zskd_nni.pipeline.export import INTEGERS, float_answers, integer_answers
from zskd_nni.pipeline.students import StudentResult
from zskd_nni.recipes.compression_config import PruningConfig
from zskd_nni.recipes.load import LoadedRecipe
from zskd_nni.recipes.schema import Recipe
from zskd_nni.runtime.files import fingerprint_of
from zskd_nni.runtime.provenance import provenance
from zskd_nni.training.inference import logits_on
from zskd_nni.training.metrics import accuracy, agreement


@dataclass(frozen=True)
class Figures:
    """Of every network by name; ``NAME_int8`` is the quantized student NAME.

    Attributes:
        held_out: how often each chooses as the teacher does on images that no student learnt on, 0 to 1.
        test: the same on test data; None without.
        accuracy: on test data, in percent; empty without.
    """

    held_out: dict[str, float]
    test: dict[str, float] | None
    accuracy: dict[str, float]

    @property
    def agreement(self) -> dict[str, float]:
        """On test data where there is some."""
        return self.held_out if self.test is None else self.test


def answering(teacher: Teacher, made: Mapping[str, StudentResult], out: Path) -> dict[str, Callable[[Tensor], Tensor]]:
    """What each network of a run answers to images ``(N, C, H, W)``, the student's integers by the file in ``out``."""
    networks: dict[str, Callable[[Tensor], Tensor]] = {"teacher": teacher}
    for name, one in made.items():
        networks[name] = float_answers(one.network, teacher.spec)
        if one.quantization is not None:
            exported = out / INTEGERS if name == "student" else None
            networks[f"{name}_int8"] = integer_answers(one.quantization, teacher.spec, exported)
    return networks


def measure(
    networks: Mapping[str, Callable[[Tensor], Tensor]], teacher: Teacher, held_out: Tensor, test: LabelledImages | None
) -> Figures:
    """Measure networks against the teacher among them.

    Args:
        networks: by name, ``teacher`` one of them; on the CPU.
        teacher: for its input.
        held_out: images ``(N, C, H, W)``.
        test: test data, where there is some.
    """
    with torch.no_grad():
        parts = held_out.split(teacher.spec.inference_batch)
        answers = {name: torch.cat([network(part) for part in parts]) for name, network in networks.items()}
    agreements = {name: agreement(logits, answers["teacher"]) for name, logits in answers.items()}
    if test is None:
        return Figures(agreements, None, {})
    on_test = {name: logits_on(network, test, teacher.spec) for name, network in networks.items()}
    return Figures(
        agreements,
        {name: agreement(logits, on_test["teacher"]) for name, logits in on_test.items()},
        {name: round(accuracy(logits, test.labels), 3) for name, logits in on_test.items()},
    )


def report_content(
    loaded: LoadedRecipe,
    teacher: Teacher,
    made: Mapping[str, StudentResult],
    figures: Figures,
    exported: Mapping[str, Any],
    *,
    test: LabelledImages | None,
    impressions: Mapping[str, Any] | None,
    identity: Mapping[str, Any],
    device: str,
) -> dict[str, Any]:
    """The report of a finished run, but for its seconds.

    Args:
        loaded: the recipe.
        teacher: its teacher.
        made: the student and the controls, by name.
        figures: of all of them.
        exported: as :func:`zskd_nni.pipeline.export.export_student` returns it.
        test: what was measured on.
        impressions: summary of the store; None where there is none.
        identity: of the run.
        device: cpu or cuda.
    """
    recipe, record = loaded.recipe, made["student"].record
    method, options = find_method(recipe.transfer.method), recipe.transfer.options()
    data_free = is_data_free(method, options)
    parameters = {name: sum(p.numel() for p in one.network.parameters()) for name, one in made.items()}
    return {
        "name": recipe.name,
        "description": recipe.description,
        "accuracy": {name: figures.accuracy.get(name) for name in ("teacher", "student", "student_int8")},
        "agreement": round(figures.agreement["student"], 6),
        "agreement_on": _measured_on(recipe, test, data_free),
        "agreement_held_out": round(figures.held_out["student"], 6),
        "agreement_int8": _rounded(figures.agreement.get("student_int8")),
        "agreement_onnx": None if exported["quantization"] is None else exported["quantization"]["agreement"],
        "parameters": {
            "teacher": sum(p.numel() for p in teacher.model.parameters()),
            "student": parameters["student"],
        },
        "bytes": exported["bytes"],
        "latency_ms": exported["latency_ms"],
        "controls": {name: _control(name, one, figures, recipe) for name, one in made.items() if name != "student"},
        "impressions": impressions,
        "pruning": record.get("pruning"),
        "quantization": exported["quantization"],
        "history": record.get("distillation"),
        "onnx_difference": exported["onnx_difference"],
        "data_free": data_free,
        "only_calibrated": recipe.only_calibrates,
        "learnt_on": None if data_free else getattr(options, "data", method.name),
        "learnt_on_what_is_measured": not data_free and test is not None and _learnt_on_it(loaded, options),
        "classifier": teacher.classifier_path,
        "evaluation": recipe.evaluation.data if recipe.evaluation and test is not None else None,
        "seconds": {},
        "recipe": identity["recipe"],
        "fingerprint": fingerprint_of(identity),
        "provenance": {
            **provenance(device, recipe.seed),
            "selected_on": recipe.selected_on,
            "teacher": teacher.fingerprint,
        },
    }


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 6)


def _measured_on(recipe: Recipe, test: LabelledImages | None, data_free: bool) -> str:
    """What agreement is measured on, in words."""
    if test is None:
        return f"held-out {'impressions of another seed' if data_free else 'images that no student learnt on'}"
    section = recipe.evaluation
    assert section is not None
    what = "training data" if section.data in NAMED_SETS and section.split == "train" else "test data"
    return f"{what} ({test.name}, {len(test)} images)"


def _learnt_on_it(loaded: LoadedRecipe, options: Any) -> bool:
    """Whether real images that a student learns on are those that it is measured on."""
    section = loaded.recipe.evaluation
    assert section is not None
    names = [*str(getattr(options, "data", "")).split(", "), *getattr(options, "sources", ())]
    if section.data in NAMED_SETS:
        return section.data in names and section.split == getattr(options, "split", "train")
    measured = loaded.path(section.data).resolve()
    return any(name and name not in NAMED_SETS and loaded.path(name).resolve() == measured for name in names)


def _control(name: str, made: StudentResult, figures: Figures, recipe: Recipe) -> dict[str, Any]:
    integers = f"{name}_int8"
    return {
        "accuracy": figures.accuracy.get(name),
        "agreement": round(figures.agreement[name], 6),
        "accuracy_int8": figures.accuracy.get(integers),
        "agreement_int8": _rounded(figures.agreement.get(integers)),
        "label": _label_of_a_control(name, recipe),
        "what": _what_a_control_is(name, recipe, made.quantization is not None),
    }


def _label_of_a_control(name: str, recipe: Recipe) -> str:
    if name == "none":
        return "not distilled"
    return "calibrated on noise" if recipe.only_calibrates else "distilled on noise"


def _what_a_control_is(name: str, recipe: Recipe, quantized: bool) -> str:
    pruning = recipe.compression.pruning
    if name == "noise" and recipe.only_calibrates:
        return "the same network, calibrated on uniform noise in the place of the images"
    if name == "noise":
        return "the same student, with uniform noise in the place of the images"
    what = "the same student without distillation"
    if pruning is not None and _is_data_driven(pruning):
        what += f"; {pruning.pruner} scored its channels on the same images, the weights are those from before"
    if pruning is not None and pruning.schedule is not None:
        what += "; pruned at once, without the schedule"
    if quantized:
        what += "; quantized by calibration alone"
    return what


def _is_data_driven(section: PruningConfig) -> bool:
    from zskd_nni.compression.pruning.prune import is_data_driven

    return is_data_driven(section)
