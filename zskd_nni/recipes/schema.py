"""Recipes: an NNI compression config with a teacher and a transfer method in front, as YAML.

NNI's own ``config_list`` passes through untouched. Unknown keys are errors that name the nearest right key.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from zskd_nni.methods.registry import default_preset, find_method
from zskd_nni.models.build import FORMS
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.recipes.search_space import check_space
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.distillation import DistillationSettings


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NetworkSection(_Section):
    """A network: how it is built and which weights it gets.

    Attributes:
        model: ``zoo:NAME``, ``torchvision:NAME``, ``package.module:factory`` or ``file.py:factory``.
        arguments: keyword arguments of the factory.
        weights: ``zoo:NAME`` for a shipped teacher, or a file; without, the network starts at random.
        allow_pt: read weights in PyTorch's own format (with ``weights_only=True``).
    """

    model: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    allow_pt: bool = False

    @field_validator("model")
    @classmethod
    def _named(cls, value: str) -> str:
        source, colon, name = value.rpartition(":")
        if not (colon and source and name):
            raise ValueError(f"a network is named as {FORMS}, not {value!r}")
        return value


class TeacherSection(NetworkSection):
    """The trained network that is to be compressed.

    Attributes:
        input: shape, value range and normalisation of its input.
        classifier: path of the layer that makes the logits; found where absent.
    """

    input: InputSpec
    classifier: str | None = None


class TransferSection(BaseModel):
    """Which images the student learns on. Further keys are the method's own, put over its preset.

    Attributes:
        method: name of an installed method.
        preset: one of the method's presets; where none is named, its default, ``best`` where it has one.
        size: number of distinct images.
        held_out: impressions of another seed on which agreement is measured.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str = "zskd"
    preset: str = "best"
    size: int = Field(default=12000, ge=1)
    held_out: int = Field(default=500, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _preset_of_the_method(cls, given: Any) -> Any:
        name = given.get("method", "zskd") if isinstance(given, dict) else None
        if not isinstance(name, str) or "preset" in given:
            return given
        try:
            return {**given, "preset": default_preset(find_method(name))}
        except UserError:  # the method is unknown, which is said below
            return given

    @model_validator(mode="after")
    def _options_are_right(self) -> TransferSection:
        try:
            method = find_method(self.method)
        except UserError as error:
            raise ValueError(str(error)) from error
        known = [*type(self).model_fields, *(entry.name for entry in fields(method.options(self.preset, {})))]
        for key in self.model_extra or {}:
            if key not in known and not getattr(method, "passes_over_other_keys", False):
                near = difflib.get_close_matches(key, known, 1, 0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
                raise ValueError(f"unknown key {key!r}; {hint}")
        self.options()
        return self

    def options(self) -> Any:
        """The method's settings."""
        return find_method(self.method).options(self.preset, self.model_extra or {})


class ScheduleSection(_Section):
    """A pruning schedule over the pruner.

    Attributes:
        name: NNI's ``AGPPruner`` or ``LinearPruner``.
        interval: steps between two prunings.
        total_times: number of prunings.
    """

    name: Literal["AGPPruner", "LinearPruner"]
    interval: int = Field(ge=1)
    total_times: int = Field(ge=1)


class PruningSection(_Section):
    """NNI pruning, fused with distillation, then shrinking.

    Attributes:
        pruner: name of an NNI pruner.
        config_list: NNI's own, untouched.
        arguments: further keyword arguments of the pruner, such as ``training_steps``; sensible ones follow from
            ``steps``.
        schedule: of the sparsity; one shot where absent.
        steps: distillation steps under the masks, before the network is shrunk; ``distillation.steps`` come after.
        speedup: shrink the network to what the masks leave.
    """

    pruner: str = "L1NormPruner"
    config_list: list[dict[str, Any]] = Field(min_length=1)
    arguments: dict[str, Any] = Field(default_factory=dict)
    schedule: ScheduleSection | None = None
    steps: int = Field(default=200, ge=0)
    speedup: bool = True

    @field_validator("config_list")
    @classmethod
    def _sparsity_in_range(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for number, config in enumerate(value):
            for path, ratio in _sparsities(config, f"{number}"):
                if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
                    raise ValueError(f"{path}: a sparsity lies in [0, 1), not {ratio!r}")
        return value

    @model_validator(mode="after")
    def _schedule_fits(self) -> PruningSection:
        if self.schedule is not None and self.steps < self.schedule.interval * self.schedule.total_times:
            raise ValueError(
                f"steps ({self.steps}) must be at least schedule.interval x schedule.total_times "
                f"({self.schedule.interval * self.schedule.total_times})"
            )
        return self


def _sparsities(config: Any, path: str) -> list[tuple[str, Any]]:
    found = []
    if isinstance(config, Mapping):
        for key, value in config.items():
            here = f"{path}.{key}"
            if key in ("sparse_ratio", "sparsity", "sparsity_per_layer", "total_sparsity"):
                found.append((here, value))
            else:
                found.extend(_sparsities(value, here))
    return found


class QuantizationSection(_Section):
    """NNI quantization of the finished student, and its export to integers.

    Attributes:
        quantizer: name of an NNI quantizer.
        config_list: NNI's own, untouched.
        arguments: further keyword arguments of the quantizer, such as ``quant_start_step``.
        fuse_names: modules that act as one, such as ``[conv1, bn1, relu1]``.
        fuse_batch_norm: find them in the network's graph.
        steps: distillation steps under quantization; ``PtqQuantizer`` takes none.
        learning_rate: of those steps; a tenth of the distillation's where absent.
        calibration_images: images that ranges are read off.
        fused: prune, quantize and distil in one training instead of one after the other.
    """

    quantizer: str = "PtqQuantizer"
    config_list: list[dict[str, Any]] = Field(min_length=1)
    arguments: dict[str, Any] = Field(default_factory=dict)
    fuse_names: list[list[str]] = Field(default_factory=list)
    fuse_batch_norm: bool = False
    steps: int = Field(default=500, ge=0)
    learning_rate: float | None = Field(default=None, gt=0)
    calibration_images: int = Field(default=1000, ge=1)
    fused: bool = False


class DistillerSection(_Section):
    """Which distiller teaches the student while NNI prunes or quantizes it.

    Attributes:
        name: ours, or one of NNI's own two.
        config_list: NNI's distillation config; NNI's own two need one.
    """

    name: Literal["ZeroShotDistiller", "DynamicLayerwiseDistiller", "Adaptive1dLayerwiseDistiller"] = (
        "ZeroShotDistiller"
    )
    config_list: list[dict[str, Any]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _nnis_own_need_targets(self) -> DistillerSection:
        if self.name != "ZeroShotDistiller" and not self.config_list:
            raise ValueError(f"{self.name} needs a config_list that names what it matches")
        return self


class CompressionSection(_Section):
    """What NNI does to the student.

    Attributes:
        pruning: NNI pruning.
        quantization: NNI quantization, of what pruning and distillation leave.
        distiller: for the trainings under NNI; of the logits where absent.
    """

    pruning: PruningSection | None = None
    quantization: QuantizationSection | None = None
    distiller: DistillerSection | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> CompressionSection:
        fused = self.quantization is not None and self.quantization.fused
        if fused and (self.pruning is None or not self.pruning.speedup):
            raise ValueError("quantization.fused needs pruning with speedup beside it; leave fused out")
        if self.distiller is not None and self.pruning is None and self.quantization is None:
            raise ValueError("distiller is for trainings under NNI: it needs pruning or quantization beside it")
        return self


class EvaluationSection(_Section):
    """Real test data, to measure the finished networks and for nothing else.

    Attributes:
        data: name or path, as ``--data-root`` and ``ZSKD_NNI_DATA`` find it.
        split: train or test.
    """

    data: str
    split: Literal["train", "test"] = "test"


class SearchSection(_Section):
    """An NNI experiment over the recipe, for ``zskd-nni search``; other commands pass over it.

    Attributes:
        space: NNI's search space; its names are key paths of the recipe.
        objective: ``agreement`` of student and teacher on a fixed probe set, which needs no data, or ``accuracy`` on
            the evaluation data.
        max_bytes: budget of the student's deployable file; a trial above it is never chosen.
        trials: how many.
        concurrency: how many at a time.
        tuner: one of NNI's by name, or NNI's own mapping (``name``, ``class_args``).
        seed: of the tuner and the probe set; the recipe's where absent.
        probe: images in the probe set.
        training_service: NNI's own config, untouched.
    """

    space: dict[str, Any]
    objective: Literal["agreement", "accuracy"] = "agreement"
    max_bytes: int | None = Field(default=None, ge=1)
    trials: int = Field(default=20, ge=1)
    concurrency: int = Field(default=1, ge=1)
    tuner: str | dict[str, Any] = "TPE"
    seed: int | None = Field(default=None, ge=0)
    probe: int = Field(default=1000, ge=50)
    training_service: dict[str, Any] = Field(default_factory=lambda: {"platform": "local"})

    @field_validator("space")
    @classmethod
    def _is_a_space(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_space(value)
        return value


class Recipe(_Section):
    """A whole recipe.

    Attributes:
        name: for reports.
        description: one sentence.
        teacher: the network to compress.
        student: another network to teach; the teacher itself where absent.
        transfer: which images the student learns on.
        compression: what NNI does to the student.
        distillation: how the student is taught.
        evaluation: test data, if there is any.
        controls: made beside the student by the same steps: ``none`` without distillation, ``noise`` with uniform
            noise in the place of the images.
        selected_on: where these settings were chosen.
        seed: of everything random.
        scale: which of ``scales`` this is; ``full`` is the recipe as it stands.
        scales: smaller (or larger) versions by name: key paths of the recipe and what stands there instead.
        search: an NNI experiment over the keys above.
    """

    name: str
    description: str = ""
    teacher: TeacherSection
    student: NetworkSection | None = None
    transfer: TransferSection = Field(default_factory=TransferSection)
    compression: CompressionSection = Field(default_factory=CompressionSection)
    distillation: DistillationSettings = Field(default_factory=DistillationSettings)
    evaluation: EvaluationSection | None = None
    controls: list[Literal["none", "noise"]] = ["none", "noise"]
    selected_on: str | None = None
    seed: int = Field(default=0, ge=0)
    scale: str = "full"
    scales: dict[str, dict[str, Any]] = Field(default_factory=dict)
    search: SearchSection | None = None

    @model_validator(mode="after")
    def _something_to_do(self) -> Recipe:
        if self.student is None and self.compression.pruning is None and self.compression.quantization is None:
            raise ValueError(
                "a recipe needs a student, or compression.pruning or .quantization to make one of the teacher"
            )
        return self

    @property
    def only_calibrates(self) -> bool:
        """Whether nothing is trained: the teacher itself is quantized by its ranges alone."""
        quantization = self.compression.quantization
        trained = self.student is not None or self.compression.pruning is not None
        return quantization is not None and quantization.quantizer in ("PtqQuantizer", "ptq") and not trained
