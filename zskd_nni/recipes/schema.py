"""Recipes: an NNI compression config with a teacher and a transfer method, as YAML.

NNI's own ``config_list`` passes through untouched. Unknown keys are errors that name the most similar known key.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from zskd_nni.data.datasets import Fit
from zskd_nni.data.procedural import KINDS
from zskd_nni.methods.registry import default_preset, find_method, is_data_free, preset_for
from zskd_nni.models.build import FORMS
from zskd_nni.models.foreign import ONNX_SUFFIX
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.recipes.compression_config import DistillerConfig, PruningConfig, QuantizationConfig, Section
from zskd_nni.recipes.search_space import check_space
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import plain
from zskd_nni.runtime.validation import unknown_key
from zskd_nni.training.distillation import DistillationSettings


class NetworkSection(Section):
    """A network: how it is built and which weights it gets.

    Attributes:
        model: ``zoo:NAME``, ``torchvision:NAME``, ``timm:NAME``, ``transformers:FOLDER``, ``file.onnx``,
            ``package.module:factory`` or ``file.py:factory``.
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
        if not (colon and source and name) and not value.lower().endswith(ONNX_SUFFIX):
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


class StudentSection(NetworkSection):
    """Another network than the teacher's, to be trained.

    Attributes:
        start: ``random``: as the factory makes it, or from ``weights``; ``teacher``: with the teacher's channels of the
            largest norms, where the student is the teacher's network with fewer channels.
    """

    start: Literal["random", "teacher"] = "random"

    @model_validator(mode="after")
    def _one_start(self) -> StudentSection:
        if self.start == "teacher" and self.weights is not None:
            raise ValueError("start: teacher and weights exclude each other; leave out one of the two")
        return self


class TransferSection(BaseModel):
    """The images on which the student is trained. Further keys are the method's own, put over its preset.

    Attributes:
        method: name of an installed method.
        preset: one of the method's presets; where none is named, its default, ``best`` where it has one.
        size: number of distinct images.
        held_out: impressions of another seed on which agreement is measured.
        fresh: a kind of procedural images, drawn anew at every step, of which a part of each batch consists.
        fresh_share: that part, in (0, 1).
        also: path of unlabelled images of the user's own (a folder, or an ``.npz``), for training alone; a run with
            them is not data-free.
        also_share: of each batch that is drawn from ``also``, in (0, 1).
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str = "zskd"
    preset: str = "best"
    size: int = Field(default=12000, ge=1)
    held_out: int = Field(default=500, ge=1)
    fresh: str | None = None
    fresh_share: float = Field(default=0.5, gt=0, lt=1)
    also: str | None = None
    also_share: float = Field(default=0.25, gt=0, lt=1)

    @field_validator("fresh")
    @classmethod
    def _is_a_kind(cls, value: str | None) -> str | None:
        if value is not None and value not in KINDS:
            raise ValueError(f"fresh is one of {', '.join(KINDS)}, not {value!r}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _preset_of_the_method(cls, given: Any) -> Any:
        name = given.get("method", "zskd") if isinstance(given, dict) else None
        if not isinstance(name, str) or "preset" in given:
            return given
        try:
            return {**given, "preset": default_preset(find_method(name))}
        except UserError:  # an unknown method, which the next validator refuses
            return given

    @model_validator(mode="after")
    def _options_are_right(self) -> TransferSection:
        try:
            method = find_method(self.method)
        except UserError as error:
            raise ValueError(str(error)) from error
        known = [*type(self).model_fields, *(entry.name for entry in fields(method.options(self.preset, {})))]
        for key in self.model_extra or {}:
            if key not in known and not getattr(method, "ignores_other_keys", False):
                raise ValueError(unknown_key(key, key, known))
        self.options()
        if self.fresh is not None and self.also is not None and self.fresh_share + self.also_share >= 1:
            raise ValueError(
                f"fresh_share ({self.fresh_share:g}) and also_share ({self.also_share:g}) must leave a part of each "
                "batch: their sum is below 1"
            )
        return self

    def options(self, teacher: Teacher | None = None) -> Any:
        """The method's settings; the preset ``best`` may depend on the teacher."""
        method = find_method(self.method)
        preset = self.preset if teacher is None else preset_for(method, self.preset, teacher)
        return method.options(preset, self.model_extra or {})

    @property
    def data_free(self) -> bool:
        """Whether a student is trained on no real image."""
        return self.also is None and self.method_is_data_free

    @property
    def method_is_data_free(self) -> bool:
        """Whether the method's own images are made from the teacher alone."""
        return is_data_free(find_method(self.method), self.options())


class CompressionSection(Section):
    """What NNI does to the student.

    Attributes:
        pruning: NNI pruning.
        quantization: NNI quantization, of what pruning and distillation leave.
        distiller: for the trainings under NNI; of the logits where absent.
    """

    pruning: PruningConfig | None = None
    quantization: QuantizationConfig | None = None
    distiller: DistillerConfig | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> CompressionSection:
        fused = self.quantization is not None and self.quantization.fused
        if fused and (self.pruning is None or not self.pruning.speedup):
            raise ValueError("quantization.fused needs pruning with speedup beside it; leave fused out")
        if self.distiller is not None and self.pruning is None and self.quantization is None:
            raise ValueError("distiller is for trainings under NNI: it needs pruning or quantization beside it")
        return self


class EvaluationSection(Section):
    """Real test data, to measure the finished networks and for nothing else.

    Attributes:
        data: name or path, as ``--data-root`` and ``ZSKD_NNI_DATA`` find it.
        split: train or test.
        fit: how test images of another size than the teacher's input are fitted: ``exact`` refuses them, ``pad``,
            ``resize`` or ``crop``. Where absent, 28x28 images are padded to 32x32, those of ``digits`` resized, and any
            other size is refused.
        any_teacher: go on with a teacher that is hardly better than chance on this data.
    """

    data: str
    split: Literal["train", "test"] = "test"
    fit: Fit | None = None
    any_teacher: bool = False


class SearchSection(Section):
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


class Recipe(Section):
    """A whole recipe.

    Attributes:
        name: for reports.
        description: one sentence.
        teacher: the network to compress.
        student: another network to train; the teacher itself where absent.
        transfer: the images on which the student is trained.
        compression: what NNI does to the student.
        distillation: how the student is trained.
        evaluation: test data, if there is any.
        controls: made beside the student by the same steps: ``none`` without distillation, ``noise`` with uniform
            noise in the place of the images, ``leaves`` with procedural images that fill the frame.
        selected_on: where these settings were chosen.
        seed: names all random streams.
        scale: which of ``scales`` this is; ``full`` is the recipe as it stands.
        scales: smaller (or larger) versions by name: key paths of the recipe and what stands there instead.
        search: an NNI experiment over the keys above.
    """

    name: str
    description: str = ""
    teacher: TeacherSection
    student: StudentSection | None = None
    transfer: TransferSection = Field(default_factory=TransferSection)
    compression: CompressionSection = Field(default_factory=CompressionSection)
    distillation: DistillationSettings = Field(default_factory=DistillationSettings)
    evaluation: EvaluationSection | None = None
    controls: list[Literal["none", "noise", "leaves"]] = ["none", "noise"]
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

    def described(self) -> dict[str, Any]:
        """JSON-able, what a run is known by."""
        content: dict[str, Any] = plain(self.model_dump(mode="json", exclude={"scales", "search"}))
        return content

    @property
    def only_calibrates(self) -> bool:
        """Whether nothing is trained: the teacher itself is quantized by its ranges alone."""
        quantization = self.compression.quantization
        trained = self.student is not None or self.compression.pruning is not None
        return quantization is not None and quantization.quantizer in ("PtqQuantizer", "ptq") and not trained


def completed(recorded: dict[str, Any]) -> dict[str, Any]:
    """A recipe as :meth:`Recipe.described` once gave it; a key that is newer than the record gets its default.

    What is no recipe any more stays as it is.
    """
    try:
        return Recipe.model_validate(recorded).described()
    except (ValueError, TypeError, UserError):
        return recorded
