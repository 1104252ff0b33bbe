"""How a student is pruned and quantized: the configs of the Python API, and the sections of a recipe of those names."""

# No postponed annotations: under Python 3.10 pydantic cannot read KW_ONLY out of a string.

import re
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

NniConfigList = Annotated[list[dict[str, Any]], Field(min_length=1)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ScheduleConfig(Section):
    """A pruning schedule over the pruner.

    Attributes:
        name: NNI's ``AGPPruner`` or ``LinearPruner``.
        interval: steps between two prunings.
        total_times: number of prunings.
    """

    name: Literal["AGPPruner", "LinearPruner"]
    interval: int = Field(ge=1)
    total_times: int = Field(ge=1)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PruningConfig:
    """How NNI prunes a student: masks, distillation under the masks, then shrinking.

    Attributes:
        config_list: NNI's own, in the keys of NNI 2 or NNI 3.
        pruner: name of an NNI pruner.
        arguments: further keyword arguments of the pruner, such as ``training_steps``; defaults follow from ``steps``.
        schedule: of the sparsity; by default everything is pruned at once.
        steps: distillation steps under the masks, before the network is shrunk. A recipe's ``distillation.steps``
            come after.
        speedup: remove the channels that the masks zero.

    Raises:
        ValueError: a value outside its range, or an unknown key.

    Example:
        >>> config = PruningConfig([{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], pruner="TaylorPruner", steps=2000)
        >>> config.pruner, config.steps, config.speedup
        ('TaylorPruner', 2000, True)
    """

    config_list: NniConfigList
    _: KW_ONLY
    pruner: str = "L1NormPruner"
    arguments: dict[str, Any] = Field(default_factory=dict)
    schedule: ScheduleConfig | None = None
    steps: Annotated[int, Field(ge=0)] = 200
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
    def _schedule_fits(self) -> "PruningConfig":
        if self.schedule is not None and self.steps < self.schedule.interval * self.schedule.total_times:
            raise ValueError(
                f"steps ({self.steps}) must be at least schedule.interval x schedule.total_times "
                f"({self.schedule.interval * self.schedule.total_times})"
            )
        return self


def _sparsities(config: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key in ("sparse_ratio", "sparsity", "sparsity_per_layer", "total_sparsity"):
                yield f"{path}.{key}", value
            else:
                yield from _sparsities(value, f"{path}.{key}")


# What is done to a network that is only calibrated: ranges, rounding, correct_biases.
_PLAIN, _REFINED = ("extremes", "nearest", False), ("least_error", "joint", True)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class QuantizationConfig:
    """How NNI quantizes a student.

    Attributes:
        config_list: NNI's own, unchanged.
        quantizer: name of an NNI quantizer, or ``ptq``, ``qat``, ``lsq``, ``lsq_plus``, ``dorefa``, ``bnn``.
        arguments: further keyword arguments of the quantizer, such as ``quant_start_step``.
        fuse_names: modules that act as one, such as ``[conv1, bn1, relu1]``.
        fuse_batch_norm: find such modules in the network's graph.
        steps: distillation steps under quantization; ``PtqQuantizer`` takes none.
        learning_rate: of those steps; a tenth of the distillation's by default.
        calibration_images: number of images from which the ranges are read.
        fused: prune, quantize and distil in one training instead of one after the other. For recipes and
            :func:`~zskd_nni.compression.quantization.stage.compress_in_one_training`.
        ranges: of the inputs of layers under ``PtqQuantizer``: ``extremes`` as NNI finds them, or ``least_error``,
            narrower ones that round with the least squared error.
        rounding: of weights under ``PtqQuantizer``: to the ``nearest`` level, or ``joint``, as in SQuant.
        correct_biases: under ``PtqQuantizer``, take from biases by how much quantization moves the means of channels.
            Of these three keys, one that is None becomes NNI's own way (``extremes``, ``nearest``, False) at 8 bits and
            where modules are fused, and the other where the config list names fewer bits.

    Raises:
        ValueError: a value outside its range, or an unknown key.

    Example:
        >>> layers = {"op_types": ["Conv2d", "Linear"], "target_names": ["_input_", "weight"], "quant_dtype": "int8"}
        >>> QuantizationConfig([layers], quantizer="QATQuantizer").steps
        500
    """

    config_list: NniConfigList
    _: KW_ONLY
    quantizer: str = "PtqQuantizer"
    arguments: dict[str, Any] = Field(default_factory=dict)
    fuse_names: list[list[str]] = Field(default_factory=list)
    fuse_batch_norm: bool = False
    steps: Annotated[int, Field(ge=0)] = 500
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    calibration_images: Annotated[int, Field(ge=1)] = 1000
    fused: bool = False
    ranges: Literal["extremes", "least_error"] | None = None
    rounding: Literal["nearest", "joint"] | None = None
    correct_biases: bool | None = None

    @property
    def refines(self) -> bool:
        """Whether the calibrated network is changed further."""
        return (self.ranges, self.rounding, self.correct_biases) != _PLAIN

    @model_validator(mode="after")
    def _refined_where_bits_are_few(self) -> "QuantizationConfig":
        fused = self.fuse_names or self.fuse_batch_norm or any("fuse_names" in entry for entry in self.config_list)
        calibrates = self.quantizer in ("PtqQuantizer", "ptq") and not fused
        usual = _REFINED if calibrates and min(_bits(self.config_list), default=8) < 8 else _PLAIN
        for key, value in zip(("ranges", "rounding", "correct_biases"), usual, strict=True):
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)  # so that a run's record says what was done
        return self

    @model_validator(mode="after")
    def _refines_what_is_only_calibrated(self) -> "QuantizationConfig":
        if self.refines and self.quantizer not in ("PtqQuantizer", "ptq"):
            raise ValueError(
                f"ranges, rounding and correct_biases are for PtqQuantizer; {self.quantizer} learns while it quantizes"
            )
        if self.refines and (self.fuse_names or self.fuse_batch_norm):
            raise ValueError(
                "ranges, rounding and correct_biases change single layers and exclude fuse_names and fuse_batch_norm; "
                "leave one of the two out"
            )
        return self


def _bits(part: Any) -> Iterator[int]:
    """All widths that a config list names, under the keys of NNI 3 or of NNI 2."""
    for key, value in part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ():
        if key == "quant_bits":
            yield from (one for one in (value.values() if isinstance(value, dict) else [value]) if type(one) is int)
        elif key == "quant_dtype" and (width := re.fullmatch(r"u?int(\d+)", str(value))):
            yield int(width[1])
        else:
            yield from _bits(value)


class DistillerConfig(Section):
    """Which distiller trains the student while NNI prunes or quantizes it.

    Attributes:
        name: our distiller, or one of NNI's two.
        config_list: NNI's distillation config; NNI's two distillers need one.
    """

    name: Literal["ZeroShotDistiller", "DynamicLayerwiseDistiller", "Adaptive1dLayerwiseDistiller"] = (
        "ZeroShotDistiller"
    )
    config_list: list[dict[str, Any]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _nnis_own_need_targets(self) -> "DistillerConfig":
        if self.name != "ZeroShotDistiller" and not self.config_list:
            raise ValueError(f"{self.name} needs a config_list that names what it matches")
        return self


@dataclass(frozen=True)
class CompressionRun:
    """How one training under NNI is run; the same for pruning and for quantization.

    Attributes:
        seed: names the random streams.
        checkpoint: a file to keep the state of the training in; the same call again continues from it.
        distiller: another than :class:`~zskd_nni.compression.distiller.ZeroShotDistiller` on the logits.
        quiet: show no progress.
    """

    seed: int = 0
    checkpoint: Path | None = None
    distiller: DistillerConfig | None = None
    quiet: bool = False
