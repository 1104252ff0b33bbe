"""Recipes: an NNI compression config with a teacher and a transfer method in front, as YAML.

NNI's own ``config_list`` passes through untouched. Unknown keys are errors that name the nearest right key.
"""

from __future__ import annotations

import copy
import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from zskd_nni.data import NAMED_SETS
from zskd_nni.distillation import DistillationSettings
from zskd_nni.errors import UserError, said_of
from zskd_nni.files import load_weights
from zskd_nni.inputs import InputSpec
from zskd_nni.key_paths import get_at, set_at
from zskd_nni.methods.registry import default_preset, find_method
from zskd_nni.networks import FORMS, build_network, code_fingerprint, load_into
from zskd_nni.search_space import check_space
from zskd_nni.settings import boolean_for_a_number, describe_validation
from zskd_nni.teacher import Teacher
from zskd_nni.zoo.trained import trained_weights


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


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and where its relative paths are meant from.

    Attributes:
        recipe: the checked recipe.
        base: folder of its file; None for a packaged one.
        source: plain mapping it was made of, overrides applied.
    """

    recipe: Recipe
    base: Path | None
    source: dict[str, Any]

    def path(self, text: str) -> Path:
        """``text`` as a path, from the recipe's folder where it is relative."""
        path = Path(text)
        return path if path.is_absolute() or self.base is None else self.base / path

    def network(self, section: NetworkSection) -> Any:
        """Build a section's network and load its weights."""
        network = build_network(section.model, section.arguments, self.base)
        if section.weights is not None:
            with said_of("teacher.weights" if section is self.recipe.teacher else "student.weights"):
                file = (
                    trained_weights(section.weights[4:])
                    if section.weights.startswith("zoo:")
                    else self.path(section.weights)
                )
                load_into(network, load_weights(file, section.allow_pt), section.weights)
        return network

    def teacher(self) -> Teacher:
        """The recipe's teacher, frozen and checked."""
        section = self.recipe.teacher
        if section.weights is None and section.model.startswith(("zoo:", "torchvision:")):
            raise UserError(
                f"teacher.weights is missing: {section.model} starts at random, and an untrained network has nothing "
                "to teach. Name a .safetensors file, or zoo:NAME for a shipped teacher."
            )
        code = code_fingerprint(section.model, self.base)
        return Teacher(self.network(section), section.input, section.classifier, code=code)

    def data_name(self) -> str | None:
        """The evaluation data: a known name, or a path from the recipe's folder; None without."""
        if self.recipe.evaluation is None:
            return None
        name = self.recipe.evaluation.data
        return name if name in NAMED_SETS else str(self.path(name))


def packaged_folder() -> Path:
    """Where the packaged recipes lie."""
    return Path(str(resources.files("zskd_nni") / "recipes"))


def packaged_names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in packaged_folder().glob("*.yml"))


_LONGEST, _MOST_VALUES, _DEEPEST = 200_000, 100_000, 50


def recipe_text(name_or_file: str) -> tuple[str, Path | None]:
    """The YAML of a packaged recipe or of a file, and the folder its relative paths are meant from.

    Raises:
        UserError: there is no such recipe.
    """
    if name_or_file in packaged_names():
        return (packaged_folder() / f"{name_or_file}.yml").read_text(), None
    path = Path(name_or_file)
    if path.suffix in (".yml", ".yaml") or os.path.exists(path):
        try:
            return path.read_text(), path.resolve().parent
        except FileNotFoundError as error:
            raise UserError(f"There is no recipe file {path}.") from error
        except (OSError, ValueError) as error:
            raise UserError(f"The recipe {path} cannot be read ({error}).") from error
    near = difflib.get_close_matches(name_or_file, packaged_names(), 1, 0.5)
    file = next((f"{name_or_file}{end}" for end in (".yml", ".yaml") if os.path.exists(f"{name_or_file}{end}")), None)
    if file is not None:
        near = [file]
    hint = f"did you mean {near[0]}?" if near else f"packaged ones: {', '.join(packaged_names())}; or name a .yml file."
    raise UserError(f"There is no recipe {name_or_file!r}; {hint}")


def load_recipe(
    name_or_file: str, overrides: Sequence[str] = (), seed: int | None = None, scale: str | None = None
) -> LoadedRecipe:
    """Read and check a recipe.

    Args:
        name_or_file: a packaged recipe's name or a YAML file.
        overrides: ``key.path=value``, values as YAML.
        seed: instead of the recipe's.
        scale: one of the recipe's ``scales``, put over it before the overrides.

    Raises:
        UserError: one sentence on the first thing that is wrong.
    """
    text, base = recipe_text(name_or_file)
    source = _parse_yaml(text, f"The recipe {name_or_file} is not YAML")
    if not isinstance(source, dict):
        raise UserError(f"The recipe {name_or_file} must be a mapping with keys such as teacher and transfer.")
    _check_own_scale(source, f"The recipe {name_or_file}")
    if scale is not None and scale != "full":
        _apply_scale(source, scale, name_or_file)
    for override in overrides:
        if override.partition("=")[0] == "scale":
            raise UserError("--set scale: a scale is chosen by --scale, which puts its keys over the recipe.")
        _apply_override(source, override)
    if seed is not None:
        source["seed"] = seed
    return LoadedRecipe(check_recipe(source, f"The recipe {name_or_file}"), base, source)


def check_recipe(source: Mapping[str, Any], called: str) -> Recipe:
    """A recipe from its plain mapping.

    Args:
        source: as read from YAML.
        called: what messages call it.

    Raises:
        UserError: one sentence on the first thing that is wrong.
    """
    if said := boolean_for_a_number(Recipe, source):
        raise UserError(f"{called}: {said}")
    try:
        recipe = Recipe.model_validate(source)
    except ValidationError as error:
        raise UserError(f"{called}: {describe_validation(error, Recipe)}") from error
    for path, value in _values_in(source):  # in what is NNI's or a factory's, nobody has looked
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{called}: {_dotted(path)}a number is expected, not nan.")
    return recipe


def _check_own_scale(source: Mapping[str, Any], called: str) -> None:
    """Refuse a file that calls itself a scale whose keys are not put over it; a search's ``best.yml`` rightly does."""
    scale, scales = source.get("scale", "full"), source.get("scales") or {}
    if scale == "full" or not isinstance(scale, str) or not isinstance(scales, Mapping):
        return
    if not isinstance(scales.get(scale), Mapping):
        known = ", ".join(["full", *map(str, scales)])
        raise UserError(f"{called}: scale: there is no {scale!r} among its scales ({known}).")

    def stands(path: str, value: Any) -> bool:
        try:
            return bool(get_at(source, path) == value)
        except (KeyError, IndexError, ValueError, TypeError):
            return False

    if scales[scale] and not any(stands(str(path), value) for path, value in scales[scale].items()):
        raise UserError(
            f"{called}: scale says {scale!r}, and nothing of scales.{scale} is put over it; take the key out and run "
            f"it with --scale {scale}."
        )


def _apply_scale(source: dict[str, Any], scale: str, name: str) -> None:
    scales = source.get("scales") or {}
    if not isinstance(scales, dict) or not isinstance(scales.get(scale), dict):
        known = ", ".join(["full", *map(str, scales)]) if isinstance(scales, dict) else "full"
        raise UserError(f"--scale: the recipe {name} has no scale {scale!r}; it has {known}.")
    for path, value in scales[scale].items():
        _put(source, str(path), copy.deepcopy(value), f"scales.{scale}")
    source["scale"] = scale


def _apply_override(source: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise UserError(f"--set takes key.path=value, not {override!r}.")
    value = _parse_yaml(text, f"--set {path}: the value is not YAML")
    _put(source, path, value, "--set")


def _put(source: dict[str, Any], path: str, value: Any, origin: str) -> None:
    """Set what stands at a key path."""
    try:
        set_at(source, path, value)
    except ValueError as error:
        raise UserError(f"{origin} {path}: {error}.") from error


class _EachKeyOnce(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys of a mapping without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands in one mapping twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, complaint: str) -> Any:
    if len(text) > _LONGEST:
        raise UserError(f"{complaint}: it is longer than {_LONGEST:,} characters.")
    try:
        content = yaml.load(text, Loader=_EachKeyOnce)
    except RecursionError as error:
        raise UserError(f"{complaint}: it is nested too deeply.") from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:  # bad dates, numbers, keys
        raise UserError(f"{complaint}: {' '.join(str(error).split())}.") from error
    problem = _not_plain(content)
    if problem:
        raise UserError(f"{complaint.split(' is not YAML')[0].split(': the value')[0]}: {problem}.")
    return content


_HALVES = re.compile("[\ud800-\udfff]")


def _not_plain(content: Any) -> str | None:
    """What in YAML's answer is not a mapping, list, text, number, truth value or null, or is too much to be meant.

    References may make a short text stand for more values than fit into memory, or for one that contains itself.
    """
    for count, (path, value) in enumerate(_values_in(content)):
        if count == _MOST_VALUES:
            return f"it holds more than {_MOST_VALUES:,} values"
        if path.count("\x1f") > _DEEPEST:
            return f"{_dotted(path)[:60]}... is nested too deeply, or contains itself"
        if _HALVES.search(path) or (isinstance(value, str) and _HALVES.search(value)):
            where = f"{path}\x1f{value}" if isinstance(value, str) else path
            told = _dotted(where).encode("unicode_escape").decode()
            return f"{told}half a character, as JSON escapes those beyond U+FFFF; write the character itself"
        if isinstance(value, dict):
            wrong = next((key for key in value if not isinstance(key, str | int | float | None)), None)
            if wrong is not None:
                return f"{_dotted(path)}a key is text, not {wrong!r}"
        elif not isinstance(value, list | str | bool | int | float | None):
            return f"{_dotted(path)}a recipe holds mappings, lists, text, numbers, true, false and null, not {value!r}"
    return None


def _values_in(content: Any) -> Iterator[tuple[str, Any]]:
    """Every value with its path, parts joined by a character that no key has; never ends where content holds itself."""
    waiting: list[tuple[str, Any]] = [("", content)]
    yield waiting[0]
    while waiting:
        path, value = waiting.pop()
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, entry in entries:
            yield f"{path}\x1f{key}", entry
            if isinstance(entry, dict | list):
                waiting.append((f"{path}\x1f{key}", entry))


def _dotted(path: str) -> str:
    return f"{'.'.join(path.split(chr(31))[1:])}: " if path else ""
