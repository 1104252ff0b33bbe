"""The content of ``report.json``: every network of a run measured on the same images, and how it was made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from zskd_nni.data.datasets import NAMED_SETS, LabelledImages, describe_fit
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.macs import multiply_accumulates
from zskd_nni.models.teacher import Teacher
from zskd_nni.pipeline.export import INTEGERS, integer_answers
from zskd_nni.pipeline.first_look import FirstLook
from zskd_nni.pipeline.neutral import COUNT, neutral_images
from zskd_nni.pipeline.students import StudentResult
from zskd_nni.pipeline.twin import Twin
from zskd_nni.recipes.load import LoadedRecipe
from zskd_nni.recipes.schema import Recipe
from zskd_nni.runtime.files import fingerprint_of
from zskd_nni.runtime.progress import Progress
from zskd_nni.runtime.provenance import provenance
from zskd_nni.synthesis import ImpressionStore
from zskd_nni.synthesis.batch_norm_statistics import batch_norms
from zskd_nni.training.inference import float_answers, logits_on
from zskd_nni.training.metrics import accuracy, agreement

# Controls that are trained on procedural images -> kind of image, and its name in the report.
CONTROL_IMAGES = {"noise": ("uniform", "uniform noise"), "leaves": ("leaves", "dead leaves")}


class ReportedRun(Protocol):
    """What a report tells of its run (:class:`zskd_nni.pipeline.run.Run`)."""

    recipe: Recipe
    loaded: LoadedRecipe
    teacher: Teacher
    given: ImpressionStore | None
    twin: Twin | None
    look: FirstLook | None
    real_images: int | None
    identity: dict[str, Any]
    device: str


@dataclass(frozen=True)
class Figures:
    """Measurements of every network by name; ``NAME_int8`` is the quantized student NAME.

    Attributes:
        held_out: agreement with the teacher on images that no student was trained on, in [0, 1].
        neutral: agreement on procedural images, the same for every method, in [0, 1].
        test: agreement on test data, in [0, 1]; None without.
        accuracy: on test data, in percent; empty without.
    """

    held_out: dict[str, float]
    neutral: dict[str, float]
    test: dict[str, float] | None
    accuracy: dict[str, float]

    @property
    def agreement(self) -> dict[str, float]:
        """Agreement on test data if there is some, otherwise on neutral images."""
        return self.neutral if self.test is None else self.test


def measure(
    students: Mapping[str, StudentResult],
    teacher: Teacher,
    out: Path,
    held_out: Tensor,
    test: LabelledImages | None,
    quiet: bool = True,
) -> Figures:
    """Measure students against their teacher, all on the CPU.

    Args:
        students: by name; the int8 file of the one called ``student`` is in ``out``.
        teacher: their teacher.
        out: of the run.
        held_out: images ``(N, C, H, W)``.
        test: test data, if there is some.
        quiet: no progress.
    """
    spec = teacher.spec
    networks: dict[str, Callable[[Tensor], Tensor]] = {"teacher": teacher}
    for name, student in students.items():
        networks[name] = float_answers(student.network, spec)
        if student.quantization is not None:
            exported = out / INTEGERS if name == "student" else None
            networks[f"{name}_int8"] = integer_answers(student.quantization, spec, exported)
    neutral = neutral_images(teacher)
    on_held_out, on_neutral, on_test = {}, {}, {}
    with Progress("measuring", len(networks), "networks", quiet=quiet) as progress:
        for name, network in networks.items():
            on_held_out[name], on_neutral[name] = _logits(network, held_out, spec), _logits(network, neutral, spec)
            if test is not None:
                on_test[name] = logits_on(network, test, spec)
            progress.advance(1)
    agreements = _agreements(on_held_out), _agreements(on_neutral)
    if test is None:
        return Figures(*agreements, None, {})
    accuracies = {name: round(accuracy(each, test.labels), 3) for name, each in on_test.items()}
    return Figures(*agreements, _agreements(on_test), accuracies)


@torch.no_grad()
def _logits(network: Callable[[Tensor], Tensor], images: Tensor, spec: InputSpec) -> Tensor:
    return torch.cat([network(part) for part in images.split(spec.inference_batch_on(images.device))])


def _agreements(logits: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: agreement(each, logits["teacher"]) for name, each in logits.items()}


def build_report(
    run: ReportedRun,
    students: Mapping[str, StudentResult],
    figures: Figures,
    exported: Mapping[str, Any],
    test: LabelledImages | None,
    store: ImpressionStore | None,
) -> dict[str, Any]:
    """The content of ``report.json``, without its seconds.

    Args:
        run: whose report it is.
        students: the student and the controls, by name.
        figures: of all of them.
        exported: as :func:`zskd_nni.pipeline.export.export_student` returns it.
        test: the evaluation data; None without.
        store: the impressions that were trained on; None where the method makes none.
    """
    recipe, student, options = run.recipe, students["student"], run.recipe.transfer.options()
    data_free = recipe.transfer.data_free
    impressions = None if store is None else store.summary()
    if impressions is not None and run.given is not None:  # the recipe does not describe how the store was made
        impressions["given"] = {"fingerprint": run.given.fingerprint, **run.given.manifest["identity"]}
    controls = {name: each for name, each in students.items() if name != "student"}
    return {
        "name": recipe.name,
        "description": recipe.description,
        "accuracy": {name: figures.accuracy.get(name) for name in ("teacher", "student", "student_int8")},
        "agreement": round(figures.agreement["student"], 6),
        "agreements": _by_network(figures),
        "agreement_on": _measured_on(recipe, test),
        "agreement_held_out": round(figures.held_out["student"], 6),
        "agreement_neutral": round(figures.neutral["student"], 6),
        "agreement_int8": _rounded(figures.agreement.get("student_int8")),
        "agreement_onnx": None if exported["quantization"] is None else exported["quantization"]["agreement"],
        "parameters": {
            name: sum(p.numel() for p in network.parameters())
            for name, network in (("teacher", run.teacher.model), ("student", student.network))
        },
        "macs": {
            name: multiply_accumulates(network, run.teacher.spec)
            for name, network in (("teacher", run.teacher.model), ("student", student.network))
        },
        "batch_norm": bool(batch_norms(student.network)),
        "bytes": exported["bytes"],
        "latency_ms": exported["latency_ms"],
        "controls": {name: _control(name, each, figures, recipe) for name, each in controls.items()},
        "twin": None if run.twin is None else run.twin.figures(),
        "impressions": impressions,
        "start": student.record.get("start"),
        "pruning": student.record.get("pruning"),
        "quantization": exported["quantization"],
        "history": student.record.get("distillation"),
        "onnx_difference": exported["onnx_difference"],
        "data_free": data_free,
        "only_calibrated": recipe.only_calibrates,
        "learnt_on": None if data_free else _learnt_on(recipe, options),
        "real_images": run.real_images,
        "learnt_on_what_is_measured": not data_free and test is not None and _trained_on_it(run.loaded, options, test),
        "classifier": run.teacher.classifier_path,
        "first_look": None
        if run.look is None
        else {
            "spread": run.look.spread,
            "lines": run.look.lines,
            "warnings": run.look.lines[len(run.look.lines) - run.look.warnings :],
        },
        "evaluation": recipe.evaluation.data if recipe.evaluation and test is not None else None,
        "test_images": None if test is None else len(test),
        "seconds": {},
        "recipe": run.identity["recipe"],
        "fingerprint": fingerprint_of(run.identity),
        "provenance": {
            **provenance(run.device, recipe.seed),
            "selected_on": recipe.selected_on,
            "teacher": run.teacher.fingerprint,
        },
    }


def _by_network(figures: Figures) -> dict[str, dict[str, float | None]]:
    """The agreement of each network with the teacher, by the kind of images."""
    on_test = figures.test or {}
    return {
        name: {
            "test": _rounded(on_test.get(name)),
            "held_out": _rounded(figures.held_out[name]),
            "neutral": _rounded(figures.neutral[name]),
        }
        for name in figures.held_out
    }


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 6)


def _learnt_on(recipe: Recipe, options: Any) -> str:
    """The real images that the student was trained on, in words."""
    section = recipe.transfer
    if section.also is None:
        sources = getattr(options, "sources", None)
        return str(getattr(options, "data", section.method)) if sources is None else f"ats: {', '.join(sources)}"
    own = "" if section.method_is_data_free else f"{getattr(options, 'data', section.method)} and "
    return f"{own}{section.also}, {section.also_share:.0%} of each batch"


def _measured_on(recipe: Recipe, test: LabelledImages | None) -> str:
    """What agreement is measured on, in words."""
    if test is None:
        return f"{COUNT:,} procedural images, the same for every method, balanced by the teacher's classes"
    section = recipe.evaluation
    assert section is not None
    what = "training data" if section.data in NAMED_SETS and section.split == "train" else "test data"
    fit = describe_fit(test, recipe.teacher.input.shape)
    return f"{what} ({test.name}, {len(test)} images{f', {fit}' if fit else ''})"


def _trained_on_it(loaded: LoadedRecipe, options: Any, test: LabelledImages) -> bool:
    """Whether real images that a student is trained on are those that it is measured on."""
    section, own = loaded.recipe.evaluation, loaded.own_images()
    assert section is not None
    if own is not None and _greys(own) & _greys(test):
        return True
    names = [*str(getattr(options, "data", "")).split(", "), *getattr(options, "sources", ())]
    if section.data in NAMED_SETS:
        return section.data in names and section.split == getattr(options, "split", "train")
    measured = loaded.path(section.data).resolve()
    return any(name and name not in NAMED_SETS and loaded.path(name).resolve() == measured for name in names)


def _greys(data: LabelledImages) -> set[bytes]:
    """The images in grey, as a folder and a data set may keep the same ones in one channel and in three."""
    return {image.float().mean(0).round().byte().numpy().tobytes() for image in data.images}


def _control(name: str, student: StudentResult, figures: Figures, recipe: Recipe) -> dict[str, Any]:
    calibrated = recipe.only_calibrates
    return {
        "accuracy": figures.accuracy.get(name),
        "agreement": round(figures.agreement[name], 6),
        "accuracy_int8": figures.accuracy.get(f"{name}_int8"),
        "agreement_int8": _rounded(figures.agreement.get(f"{name}_int8")),
        "label": "not distilled" if name == "none" else f"{'calibrated' if calibrated else 'distilled'} on {name}",
        "what": _describe_control(name, recipe, student.quantization is not None),
    }


def _describe_control(name: str, recipe: Recipe, quantized: bool) -> str:
    pruning = recipe.compression.pruning
    if name in CONTROL_IMAGES:
        made = "the same network, calibrated on" if recipe.only_calibrates else "the same student, with"
        return f"{made} {CONTROL_IMAGES[name][1]} in the place of the images"
    from zskd_nni.compression.pruning.nni_pruner import is_data_driven

    parts = ["the same student without distillation"]
    if pruning is not None and is_data_driven(pruning):
        parts.append(f"{pruning.pruner} scored its channels on the same images, the weights are those from before")
    if pruning is not None and pruning.schedule is not None:
        parts.append("pruned at once, without the schedule")
    if quantized:
        parts.append("quantized by calibration alone")
    return "; ".join(parts)
