"""A cell: one row of a table; and its plan: every setting of it at a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

from zskd_nni.methods.registry import find_method, preset_for_kind
from zskd_nni.research.baselines.kd_at import KdAtSettings
from zskd_nni.research.reproduction.pairs import PAIRS, PUBLISHED_STUDENT, SELECTED_ON, Pair, Scale
from zskd_nni.research.reproduction.records import Record
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import fingerprint_of, plain
from zskd_nni.runtime.run_identity import with_defaults
from zskd_nni.runtime.validation import build_settings
from zskd_nni.training.distillation import DistillationSettings

# Methods that stand behind a transfer source of the registry, under the names that records have.
SOURCES = {"zskd": "zskd", "sts": "sts", "class-impressions": "class-impressions", "ats": "ats", "real-kd": "real"}
IMPRESSIONS = ("zskd", "sts", "class-impressions")
METHODS = (*SOURCES, "zskt", "real-labels", "kd-at", "none", "noise")
_method = cache(find_method)  # looking one up reads the metadata of every installed package


@dataclass(frozen=True)
class Cell:
    """One row.

    Attributes:
        pair: of :data:`zskd_nni.research.reproduction.pairs.PAIRS`.
        method: of :data:`METHODS`.
        preset: one of the method's; ``""`` if it has none. For ``real-kd`` it decides how the student is trained.
        variant: the difference from the preset, in a word or two; ``""`` for the preset itself.
        size: images of the transfer set, or their fraction of the training split, or the preset whose size is taken;
            None for the size of the cell's preset.
        options: changes to the method's options.
        student: changes to how the student is trained; None is the pair's own value whatever the preset. With ZSKT
            any key makes its generator a source of images for a student that is trained like the pair's others.
        network: which of the pair's students; ``""`` for the first.
        shots: M, images a class (few-shot KD+AT).
        transition: whether the mean transition error is measured.
    """

    pair: str
    method: str
    preset: str = ""
    variant: str = ""
    size: int | float | str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    student: Mapping[str, Any] = field(default_factory=dict)
    network: str = ""
    shots: int | None = None
    transition: bool = False

    @property
    def name(self) -> str:
        """``pair-method[-preset][-network][-variant]``."""
        return "-".join(part for part in (self.pair, self.method, self.preset, self.network, self.variant) if part)


@dataclass(frozen=True)
class Plan:
    """A cell at a scale: every setting resolved.

    Attributes:
        cell: the row.
        pair: its networks and data.
        scale: how large.
        scale_name: its name.
        options: the method's settings object; None where it has none.
        student: its recipe.
        size: images of the transfer set, at most; None for a stream or nothing at all.
        network: reference and arguments of the student.
    """

    cell: Cell
    pair: Pair
    scale: Scale
    scale_name: str
    options: Any
    student: DistillationSettings
    size: int | None
    network: tuple[str, Mapping[str, Any]]

    @property
    def name(self) -> str:
        """The cell's name, and its scale where that is not ``full``."""
        return self.cell.name + ("" if self.scale_name == "full" else f"-{self.scale_name}")

    def record_name(self, seed: int) -> str:
        """File name of the record of a run."""
        return f"{self.name}-seed{seed}.json"

    @property
    def zskt_trains_student(self) -> bool:
        """Whether ZSKT's own optimiser and schedule train the student, as published.

        With a memory, or if the cell names a student recipe, ZSKT is a source of images like any other.
        """
        return self.cell.method == "zskt" and not self.options.memory and not self.cell.student

    @property
    def ingredients(self) -> dict[str, Any]:
        """Every setting of method and student, JSON-able."""
        result: dict[str, Any] = {} if self.options is None else asdict(self.options)
        if self.cell.shots is not None:
            result["images_a_class"] = self.cell.shots
        if self.cell.method != "none" and not self.zskt_trains_student:
            result["student"] = asdict(self.student)
        return plain(result)

    @property
    def sizes(self) -> dict[str, int | None]:
        """What of the scale shapes a run beside the ingredients."""
        return {
            "size": self.size,
            "block": self.scale.block if self.cell.method in IMPRESSIONS else None,
            "training_images": self.scale.training_images,
        }

    @property
    def selected_on(self) -> str:
        """Where the settings were chosen."""
        chosen = {**SELECTED_ON, **PAIRS[self.cell.pair].selected_on}
        names = (f"{self.cell.method}-{self.cell.preset}", self.cell.method, self.cell.preset, "")
        return next(chosen[name] for name in names if name in chosen)

    def fingerprint(self, teacher: str, seed: int) -> str:
        """Of a run with the teacher of that fingerprint; names the folder of an unfinished run."""
        network = plain(list(self.network))
        return fingerprint_of([teacher, self.cell.method, self.ingredients, self.sizes, network, seed])

    def matches(self, record: Record) -> bool:
        """Whether a record is of a run with these settings; its teacher and its seed are not looked at.

        A setting that the record does not name is newer than the record: it had its default then. Older records name
        of the sizes only the number of images; the others follow from their scale.
        """
        defaults = {} if self.options is None else asdict(type(self.options)())
        defaults = plain({**defaults, "student": asdict(DistillationSettings())})
        wanted = self.ingredients
        ingredients = with_defaults(record["ingredients"], {k: v for k, v in defaults.items() if k in wanted})
        images = {} if self.size is None or record["impressions"] is None else {"size": record["impressions"]}
        return (
            record["method"] == self.cell.method
            and record["networks"].get("student") == plain(list(self.network))
            and {**self.sizes, **images, **record.get("sizes", {})} == self.sizes
            and ingredients == wanted
        )


def resolve(cell: Cell, scale_name: str) -> Plan:
    """The settings of a cell at a scale.

    Raises:
        UserError: the pair has no such scale, or a setting is not right.
    """
    pair = PAIRS[cell.pair]
    scale = pair.scale(scale_name, cell.pair)
    student = _student(cell, pair, scale)
    size: int | None = None
    if cell.method in SOURCES:
        whole = min(pair.training_images, scale.training_images or pair.training_images)
        if isinstance(cell.size, float):
            size = max(1, round(cell.size * whole))
        elif isinstance(cell.size, int):
            size = cell.size
        else:  # the two presets of ATS have one size: they are compared with each other
            preset = cell.size or ("" if cell.method == "ats" else cell.preset)
            size = whole if cell.method == "real-kd" else scale.size(preset)
    try:
        options = _options(cell, pair, scale, student)
    except ValueError as error:
        raise UserError(f"{cell.name}: {error}.") from error
    network = pair.students[cell.network or next(iter(pair.students))]
    return Plan(cell, pair, scale, scale_name, options, student, size, network)


def _student(cell: Cell, pair: Pair, scale: Scale) -> DistillationSettings:
    own = student = replace(pair.student, steps=scale.steps, batch=scale.batch or pair.student.batch)
    # Both presets of ATS, which are compared with each other, have the pair's own student.
    if cell.method in SOURCES and cell.method != "ats" and cell.preset in PUBLISHED_STUDENT:
        published = {**PUBLISHED_STUDENT[cell.preset], **pair.published_student}
        published["augmentation"] = replace(own.augmentation, **published.get("augmentation", {}))
        published["steps"] = scale.published_steps or own.steps
        published["batch"] = scale.published_batch or own.batch
        student = replace(own, **published)
    changes = {key: getattr(own, key) if value is None else value for key, value in cell.student.items()}
    return replace(student, **changes)


def _options(cell: Cell, pair: Pair, scale: Scale, student: DistillationSettings) -> Any:
    if cell.method == "kd-at":
        return build_settings(KdAtSettings, {**pair.kd_at, **cell.options})
    if cell.method == "zskt":
        given: dict[str, Any] = {"batch": student.batch}
        for changes in (pair.zskt, scale.zskt):
            given.update(changes.get(cell.preset, changes.get("", {})))
        given.update(cell.options)
        if not pair.teacher_has_batch_norm:
            given["batch_statistics"] = 0.0
        return _method("zskt").options(cell.preset, given)
    if cell.method == "real-kd":
        return _method("real").options("best", {"data": pair.recipe.data})
    if cell.method not in SOURCES:
        return None
    given = {key: dict(value) if isinstance(value, Mapping) else value for key, value in cell.options.items()}
    if cell.method == "ats":
        given = {**pair.ats, **given}
    if cell.method in IMPRESSIONS:
        smaller = {**scale.synthesis.get("", {}), **scale.synthesis.get(cell.preset, {})}
        given["synthesis"] = {**smaller, **given.get("synthesis", {})}
        if not pair.teacher_has_batch_norm:  # the term is always 0 in these rows, and in their records
            given["synthesis"]["batch_statistics"] = 0.0
        if cell.method == "sts":
            given["targets"] = {**pair.sts, **given.get("targets", {})}
    method = _method(SOURCES[cell.method])
    preset = preset_for_kind(method, cell.preset, pair.recipe.spec.shape[0])
    return method.options(preset, given)
