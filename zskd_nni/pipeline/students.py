"""The students of a run: pruned under NNI, distilled, shrunk, distilled, quantized.

Each stage leaves its network in the run's ``state/`` folder; a stage whose network is there is not run again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from zskd_nni.data.sources import TransferSource
from zskd_nni.models.serialization import load_network, save_network
from zskd_nni.models.teacher import Teacher
from zskd_nni.recipes.compression_config import CompressionRun
from zskd_nni.recipes.load import LoadedRecipe
from zskd_nni.recipes.schema import NetworkSection
from zskd_nni.runtime.distributed import team
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import make_folder, plain, read_json, remove_leftovers
from zskd_nni.runtime.progress import say
from zskd_nni.runtime.rng import derive_seed
from zskd_nni.runtime.tensors import load_sealed, save_sealed
from zskd_nni.training.distillation import DistillationSettings, distill
from zskd_nni.training.hints import find_hints

if TYPE_CHECKING:
    from zskd_nni.compression.pruning.dependency_config import PruningPlan
    from zskd_nni.compression.pruning.masks import Masks
    from zskd_nni.compression.quantization.quantize import QuantizedNetwork

T = TypeVar("T")
_SOURCE_STATE = ".source.pt"


@dataclass
class StudentResult:
    """A finished student and how it was made.

    Attributes:
        network: in ``eval()`` mode, on the CPU.
        record: JSON-able; what pruning and shrinking did, the losses along the way.
        quantization: of the network, if the recipe asks for it and this student can have it.
        masks: weights that pruning zeroed and did not remove; further training leaves them at zero.
        kept: layer -> the channels that pruning kept in it; empty if nothing was removed.
    """

    network: nn.Module
    record: dict[str, Any] = field(default_factory=dict)
    quantization: QuantizedNetwork | None = None
    masks: Masks = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)


class Students:
    """Makes a recipe's students, or continues from the last finished stage.

    Processes that share a process group of ``torch.distributed`` do the same calls and train together. Only the first
    of them writes.

    Args:
        loaded: the recipe.
        teacher: its teacher.
        folder: for the networks of the stages; made if need be.
        timed: counts the seconds of a stage by its name.
        device: cpu or cuda.
        quiet: show no progress.
    """

    def __init__(
        self,
        loaded: LoadedRecipe,
        teacher: Teacher,
        folder: Path,
        timed: Callable[[str], AbstractContextManager[None]],
        *,
        device: str = "cpu",
        quiet: bool = False,
    ) -> None:
        self.loaded, self.recipe, self.teacher = loaded, loaded.recipe, teacher
        self.folder, self.timed, self.device, self.quiet = folder, timed, device, quiet
        self.team = team()

    @property
    def network(self) -> NetworkSection:
        """The recipe's section for the student's network."""
        return self.recipe.student or self.recipe.teacher

    def fresh(self) -> nn.Module:
        """The network before anything is done to it; the same at every call."""
        if self.recipe.student is None:
            return self.teacher.student().cpu()
        return copy.deepcopy(self._given[0])

    @cached_property
    def _given(self) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """The recipe's own student as it starts, and which channels of the teacher it starts from, by layer."""
        section = self.recipe.student
        assert section is not None
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.recipe.seed, "student"))
            network = self.loaded.network(section).float()
        if section.start == "random":
            return network, {}
        from zskd_nni.compression.pruning.teacher_start import start_from_teacher

        return network, start_from_teacher(network, self.teacher)

    @cached_property
    def pruning_plan(self) -> PruningPlan:
        """The pruning config completed for the student's network: one for the checks and all students of the run.

        Raises:
            UserError: NNI refuses the config, or the network cannot be traced or pruned.
        """
        from zskd_nni.compression.pruning.nni_pruner import pruning_plan

        assert self.recipe.compression.pruning is not None
        return pruning_plan(self.fresh(), self.recipe.compression.pruning, self.teacher)

    def make(self, name: str, images: TransferSource, train: bool = True) -> StudentResult:
        """Make a student, or load it if it was finished before.

        Args:
            name: of the files in ``state/``.
            images: to learn on, to score channels on, to calibrate a quantizer on.
            train: whether the student learns; without, it is pruned and calibrated on the images.
        """
        self.team.first(lambda: remove_leftovers(make_folder(self.folder)))
        quantization = self.recipe.compression.quantization
        if quantization is not None and quantization.fused and train:
            student = self._in_one_training(name, images)
        else:
            student = self._distilled(name, images, train)
            if quantization is not None:
                student.quantization = self._quantized(name, student, images, train)
        # A run that was killed between a stage and this line continues here.
        for stage in ("", "-pruning", "-quantization"):
            self._checkpoint(name + stage).unlink(missing_ok=True)
        return student

    def _checkpoint(self, stage: str) -> Path:
        return self.folder / f"{stage}.checkpoint.pt"

    def _compression_run(self, checkpoint: str, seed: str) -> CompressionRun:
        number = derive_seed(self.recipe.seed, seed) % 2**31
        return CompressionRun(number, self._checkpoint(checkpoint), self.recipe.compression.distiller, self.quiet)

    def _lesson(self, images: TransferSource) -> tuple[Teacher, TransferSource, DistillationSettings]:
        """What every training takes after its student; the teacher is moved to the device."""
        return self.teacher.to(self.device), images, self.recipe.distillation

    def _distilled(self, name: str, images: TransferSource, train: bool) -> StudentResult:
        """Pruned and distilled, in floating point."""
        finished, live = self.folder / f"{name}.json", images if train else None
        if (known := self._reload(_load_student, finished, live)) is not None:
            return known
        pruning = self.recipe.compression.pruning
        student = self._unpruned() if pruning is None else self._pruned(name, images, train)
        # The teacher itself, not pruned, needs no distillation before it is quantized.
        if train and (self.recipe.student is not None or pruning is not None):
            with self.timed(f"distillation of {name}"):
                self._distil(student, images, name)
        student.network.cpu().eval()
        if "pruning" in student.record:
            from zskd_nni.compression.pruning.masks import share_of_zeros

            student.record["pruning"]["zeros"] = share_of_zeros(student.network, student.record["pruning"]["sparsity"])
        self.team.first(lambda: self._save_stage(student, finished, live))
        # Loaded, as in a later run: training leaves another memory format, whose sums round differently.
        return StudentResult(load_network(finished), student.record, masks=student.masks)

    def _unpruned(self) -> StudentResult:
        """The student where the recipe prunes nothing."""
        if self.recipe.student is None or self.recipe.student.start == "random":
            return StudentResult(self.fresh())
        network, kept = self.fresh(), self._given[1]
        weighted = [path for path, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        channels = {path: len(kept[path]) for path in weighted if path in kept}
        return StudentResult(network, {"start": {"from": "teacher", "channels": channels}}, kept=kept)

    def _distil(self, student: StudentResult, images: TransferSource, name: str) -> None:
        """Train the network in place; masked weights stay at zero."""
        network = student.network.to(self.device)
        after_step = None
        if student.masks:
            from zskd_nni.compression.pruning.masks import held_at_zero

            after_step = held_at_zero(network, student.masks)
        history = distill(
            network,
            *self._lesson(images),
            student.kept,
            seed=derive_seed(self.recipe.seed, "distillation") % 2**31,
            checkpoint=self._checkpoint(name),
            label=f"distillation of {name}",
            after_step=after_step,
            quiet=self.quiet,
        )
        settings = self.recipe.distillation
        hints = find_hints(network, self.teacher, settings.features, student.kept, settings.regressors)
        matched = [[hint.teacher, hint.student] for hint in hints]
        student.record["distillation"] = {"steps": history.steps, "losses": history.losses, "features": matched}

    def _pruned(self, name: str, images: TransferSource, train: bool) -> StudentResult:
        """Masked by NNI, trained under the masks, and shrunk."""
        from zskd_nni.compression.pruning.prune import prune

        finished, live = self.folder / f"{name}-pruned.json", images if train else None
        if (known := self._reload(_load_student, finished, live)) is not None:
            return known
        pruning = self.recipe.compression.pruning
        assert pruning is not None
        run = self._compression_run(f"{name}-pruning", "pruning")
        with self.timed(f"pruning of {name}"):
            pruned = prune(self.fresh(), pruning, *self._lesson(images), train=train, plan=self.pruning_plan, run=run)
            record = {"pruning": pruned.record}
            student = StudentResult(pruned.network, record, None, pruned.masks, self._of_teacher(pruned.kept_channels))
            self.team.first(lambda: self._save_stage(student, finished, live))
        # Processes that all pruned may differ in the last bits: all take what the first has saved.
        return student if self.team.alone else _load_student(finished)

    def _of_teacher(self, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Channels that pruning kept, as the teacher counts them: a student that starts from it has only some."""
        if self.recipe.student is None or self.recipe.student.start == "random":
            return dict(kept)
        had = self._given[1]
        return {**had, **{path: had[path][channels] if path in had else channels for path, channels in kept.items()}}

    def _quantized(
        self, name: str, student: StudentResult, images: TransferSource, train: bool
    ) -> QuantizedNetwork | None:
        """A finished student quantized by NNI; None if the quantizer would have to train and may not."""
        from zskd_nni.compression.quantization.nni_quantizer import ROUNDING_QUANTIZERS, quantizer_class_name
        from zskd_nni.compression.quantization.quantize import quantize
        from zskd_nni.compression.quantization.serialization import load_quantization

        finished, live = self.folder / f"{name}-quantized.json", images if train else None
        if (known := self._reload(load_quantization, finished, live)) is not None:
            return known
        config = self.recipe.compression.quantization
        assert config is not None
        if not train and quantizer_class_name(config.quantizer) not in ROUNDING_QUANTIZERS:
            return None
        run = self._compression_run(f"{name}-quantization", "quantization")
        with self.timed(f"quantization of {name}"):
            quantized = quantize(
                student.network, config, *self._lesson(images), train=train, masks=student.masks, run=run
            )
            self.team.first(lambda: self._save_quantized(quantized, finished, live))
        return quantized

    def _in_one_training(self, name: str, images: TransferSource) -> StudentResult:
        """Pruned, quantized and distilled in one NNI training, then shrunk."""
        from zskd_nni.compression.quantization.serialization import load_quantization
        from zskd_nni.compression.quantization.stage import compress_in_one_training

        finished, quantized = self.folder / f"{name}.json", self.folder / f"{name}-quantized.json"
        known = self._reload(_load_student, finished, images)
        known_quantization = self._reload(load_quantization, quantized)
        if known is not None and known_quantization is not None:
            known.quantization = known_quantization
            return known
        pruning, quantization = self.recipe.compression.pruning, self.recipe.compression.quantization
        assert pruning is not None and quantization is not None
        run = self._compression_run(name, "pruning")
        with self.timed(f"pruning, quantization and distillation of {name}"):
            network = self.fresh().to(self.device)
            pruned, integers = compress_in_one_training(
                network, pruning, quantization, *self._lesson(images), plan=self.pruning_plan, run=run
            )
            record = {"pruning": pruned.record, "distillation": pruned.record["history"]}
            student = StudentResult(pruned.network.cpu().eval(), record, integers)
            self.team.first(lambda: self._save_quantized(integers, quantized, None))
            self.team.first(lambda: self._save_stage(student, finished, images))
        return student

    def _reload(self, load: Callable[[Path], T], description: Path, live: TransferSource | None = None) -> T | None:
        """A finished stage's result; None if the stage is still to be run, or its files are damaged.

        A live source (one with a state) is put back as the stage left it.
        """
        if not self.team.first(description.exists):
            return None
        try:
            result: T | None = load(description)
            if live is not None and live.state_dict():
                live.load_state_dict(load_sealed(description.with_suffix(_SOURCE_STATE)))
        except UserError as error:
            result = None
            if self.team.leads:
                say(f"{error} That stage is run again.")
        # All or none, so that nobody writes these files again while another process reads them.
        return result if all(self.team.collect(result is not None)) else None

    def _save_stage(self, student: StudentResult, description: Path, live: TransferSource | None, **extra: Any) -> None:
        """Write a stage's network, and the state of a live source: later stages score and calibrate on its images."""
        if live is not None and (state := live.state_dict()):
            save_sealed(description.with_suffix(_SOURCE_STATE), state)
        self.save(student, description, **extra)

    def _save_quantized(self, quantized: QuantizedNetwork, description: Path, live: TransferSource | None) -> None:
        from zskd_nni.compression.quantization.serialization import save_calibration

        calibration = plain(save_calibration(quantized, description))
        self._save_stage(StudentResult(quantized.network), description, live, quantization=calibration)

    def save(self, student: StudentResult, description: Path, **extra: Any) -> None:
        """Write a student's weights and the description to build it from.

        Args:
            student: the network, its record and its masks.
            description: the ``.json`` file; the weights lie beside it.
            extra: further keys of the description.
        """
        if student.masks:
            from zskd_nni.compression.pruning.masks import save_masks

            extra["masks"] = save_masks(student.masks, description)
        if student.kept:
            extra["kept_channels"] = {path: channels.tolist() for path, channels in student.kept.items()}
        content = {"input": plain(asdict(self.teacher.spec)), "classes": self.teacher.num_classes}
        content |= {"record": student.record, **extra}
        network, section = copy.deepcopy(student.network).cpu(), self.network
        weights = description.with_suffix(".safetensors")
        save_network(network, section.model, section.arguments, weights, description, self.loaded.base, content)


def _load_student(description: Path) -> StudentResult:
    network, content = load_network(description), read_json(description)
    student = StudentResult(network, content.get("record"))
    if not isinstance(student.record, dict):
        raise UserError(f"{description} has no record of how its network was made.")
    try:
        kept = content.get("kept_channels", {})
        student.kept = {path: torch.tensor(channels, dtype=torch.long) for path, channels in kept.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{description} has no lists of the kept channels.") from error
    if content.get("masks") is not None:
        from zskd_nni.compression.pruning.masks import load_masks

        student.masks = load_masks(content["masks"], description)
    return student
