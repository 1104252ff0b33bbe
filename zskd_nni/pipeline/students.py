"""The students of a run: pruned under NNI, distilled, shrunk, distilled, quantized.

Each stage leaves its network in the run's ``state/`` folder; one whose network is there is not run again.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from zskd_nni.data.sources import TransferSource
from zskd_nni.models.serialization import load_network, save_network
from zskd_nni.models.teacher import Teacher
from zskd_nni.recipes.load import LoadedRecipe
from zskd_nni.recipes.schema import NetworkSection
from zskd_nni.runtime.distributed import team
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import make_folder, plain, read_json, remove_leftovers
from zskd_nni.runtime.rng import derive_seed
from zskd_nni.runtime.tensors import load_sealed, save_sealed
from zskd_nni.training.distillation import distill
from zskd_nni.training.hints import feature_pairs

if TYPE_CHECKING:
    from zskd_nni.compression.pruning.masks import Masks
    from zskd_nni.compression.quantization.quantize import Quantization

T = TypeVar("T")


@dataclass
class Made:
    """A finished student and how it came about.

    Attributes:
        network: in ``eval()`` mode, on the CPU.
        record: JSON-able; what pruning and shrinking did, the losses along the way.
        quantization: of the network where the recipe asks for it, and where it can be had for this student.
        masks: weights that pruning silenced and did not remove, which no training may bring back.
    """

    network: nn.Module
    record: dict[str, Any] = field(default_factory=dict)
    quantization: Quantization | None = None
    masks: Masks = field(default_factory=dict)


class Students:
    """Makes a recipe's students, or takes them up where they were left.

    Processes that share a process group of ``torch.distributed`` do the same calls and train together; the first of
    them alone writes.

    Args:
        loaded: the recipe.
        teacher: its teacher.
        folder: for what the stages leave; made if need be.
        timed: counts the seconds of a stage by its name.
        device: cpu or cuda.
        quiet: no progress.
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
        """What the recipe says of the student's network."""
        return self.recipe.student or self.recipe.teacher

    def fresh(self) -> nn.Module:
        """The network before anything is done to it; the same at every call."""
        if self.recipe.student is None:
            return self.teacher.student().cpu()
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.recipe.seed, "student"))
            return self.loaded.network(self.recipe.student).float()

    def make(self, name: str, source: TransferSource | None, scores: TransferSource | None = None) -> Made:
        """Make a student, or load it where it was finished before.

        Args:
            name: of the files in ``state/``.
            source: what it learns on; None leaves it untaught.
            scores: what a pruner scores channels on and a quantizer is calibrated on; ``source`` where absent.
        """
        self.team.first(lambda: remove_leftovers(make_folder(self.folder)))
        section = self.recipe.compression.quantization
        if section is not None and section.fused and source is not None:
            made = self._in_one_training(name, source)
        else:
            made = self._taught(name, source, scores)
            if section is not None:
                images = scores if source is None else source
                assert images is not None
                made.quantization = self._quantized(name, made, images, train=source is not None)
        # Here, where a run that was killed after a stage comes by as well.
        for stage in ("", "-pruning", "-quantization"):
            self._checkpoint(name + stage).unlink(missing_ok=True)
        return made

    def _checkpoint(self, stage: str) -> Path:
        return self.folder / f"{stage}.checkpoint.safetensors"

    def _taught(self, name: str, source: TransferSource | None, scores: TransferSource | None) -> Made:
        """Pruned and distilled, in floating point."""
        finished = self.folder / f"{name}.json"
        known = self._load(finished, source)
        if known is not None:
            return known
        made = Made(self.fresh())
        if self.recipe.compression.pruning is not None:
            made = self._pruned(name, made.network, source, scores)
        checkpoint = self._checkpoint(name)
        # The teacher itself, not pruned, has nothing to learn from itself before it is quantized.
        something_to_learn = self.recipe.student is not None or self.recipe.compression.pruning is not None
        if source is not None and something_to_learn:
            with self.timed(f"distillation of {name}"):
                self._distil(made, source, checkpoint, f"distillation of {name}")
        made.network.cpu().eval()
        if "pruning" in made.record:
            from zskd_nni.compression.pruning.masks import share_of_zeros

            made.record["pruning"]["zeros"] = share_of_zeros(made.network, made.record["pruning"]["sparsity"])
        self.team.first(lambda: self._save_stage(made, finished, source))
        # As a later run finds it: training leaves another memory format, whose sums round otherwise.
        return Made(load_network(finished), made.record, masks=made.masks)

    def _distil(self, made: Made, source: TransferSource, checkpoint: Path, label: str) -> None:
        """Train the network where it is; what pruning silenced in it stays silent."""
        network = made.network.to(self.device)
        after_step = None
        if made.masks:
            from zskd_nni.compression.pruning.masks import held_at_zero

            after_step = held_at_zero(network, made.masks)
        history = distill(
            network,
            self.teacher.to(self.device),
            source,
            self.recipe.distillation,
            seed=derive_seed(self.recipe.seed, "distillation") % 2**31,
            checkpoint=checkpoint,
            label=label,
            after_step=after_step,
            quiet=self.quiet,
        )
        pairs = feature_pairs(network, self.teacher, self.recipe.distillation.features)
        made.record["distillation"] = {
            "steps": history.steps,
            "losses": history.losses,
            "features": [list(pair) for pair in pairs],
        }

    def _pruned(
        self, name: str, network: nn.Module, source: TransferSource | None, scores: TransferSource | None
    ) -> Made:
        """Masks by NNI, trained under them, and the network shrunk to what they leave."""
        from zskd_nni.compression.pruning.prune import prune

        finished = self.folder / f"{name}-pruned.json"
        known = self._load(finished, source)
        if known is not None:
            return known
        section = self.recipe.compression.pruning
        assert section is not None
        checkpoint = self._checkpoint(f"{name}-pruning")
        with self.timed(f"pruning of {name}"):
            pruned = prune(
                network.to(self.device),
                section,
                self.teacher.to(self.device),
                source,
                self.recipe.distillation,
                scores=scores,
                distiller=self.recipe.compression.distiller,
                seed=derive_seed(self.recipe.seed, "pruning") % 2**31,
                checkpoint=checkpoint,
                quiet=self.quiet,
            )
            made = Made(pruned.network, {"pruning": pruned.record}, masks=pruned.masks)
            self.team.first(lambda: self._save_stage(made, finished, source))
        # What each of many has made by itself may differ in the last bits from one machine to the next.
        return made if self.team.alone else _made(finished)

    def _quantized(self, name: str, made: Made, images: TransferSource, train: bool) -> Quantization | None:
        """A finished student quantized by NNI; None where the quantizer would have to train and may not."""
        from zskd_nni.compression.quantization.serialization import load_quantization
        from zskd_nni.compression.quantization.stage import quantize_student

        finished = self.folder / f"{name}-quantized.json"
        live = images if train else None

        def load(description: Path) -> Quantization:
            known = load_quantization(description)
            self._put_back(live, description)
            return known

        known = self._reload(load, finished)
        if known is not None:
            return known
        section = self.recipe.compression.quantization
        assert section is not None
        checkpoint = self._checkpoint(f"{name}-quantization")
        with self.timed(f"quantization of {name}"):
            quantization = quantize_student(
                made.network.to(self.device),
                section,
                self.teacher.to(self.device),
                images,
                self.recipe.distillation,
                train=train,
                distiller=self.recipe.compression.distiller,
                seed=derive_seed(self.recipe.seed, "quantization") % 2**31,
                checkpoint=checkpoint,
                masks=made.masks,
                quiet=self.quiet,
            )
            made.network.cpu()
            if quantization is not None:
                self.team.first(lambda: self._save_quantized(quantization, finished, live))
        return quantization

    def _in_one_training(self, name: str, source: TransferSource) -> Made:
        """Pruned, quantized and distilled in one NNI training, then shrunk."""
        from zskd_nni.compression.quantization.serialization import load_quantization
        from zskd_nni.compression.quantization.stage import compress_in_one_training

        finished, quantized = self.folder / f"{name}.json", self.folder / f"{name}-quantized.json"
        known, known_quantization = self._load(finished, source), self._reload(load_quantization, quantized)
        if known is not None and known_quantization is not None:
            known.quantization = known_quantization
            return known
        compression = self.recipe.compression
        assert compression.pruning is not None and compression.quantization is not None
        checkpoint = self._checkpoint(name)
        with self.timed(f"pruning, quantization and distillation of {name}"):
            pruned, quantization = compress_in_one_training(
                self.fresh().to(self.device),
                compression.pruning,
                compression.quantization,
                self.teacher.to(self.device),
                source,
                self.recipe.distillation,
                distiller=compression.distiller,
                seed=derive_seed(self.recipe.seed, "pruning") % 2**31,
                checkpoint=checkpoint,
                quiet=self.quiet,
            )
            record = {"pruning": pruned.record, "distillation": pruned.record["history"]}
            made = Made(pruned.network.cpu().eval(), record, quantization)
            self.team.first(lambda: self._save_quantized(quantization, quantized))
            self.team.first(lambda: self._save_stage(made, finished, source))
        return made

    def _load(self, description: Path, source: TransferSource | None = None) -> Made | None:
        """A finished stage's network; None where the stage is to be run, because it never was or its files are bad.

        A live source is put back as the stage left it.
        """

        def load(description: Path) -> Made:
            made = _made(description)
            self._put_back(source, description)
            return made

        return self._reload(load, description)

    def _save_stage(self, made: Made, description: Path, source: TransferSource | None) -> None:
        self._keep(source, description)
        self.save(made, description)

    def _keep(self, source: TransferSource | None, description: Path) -> None:
        """Write what a live source has become: later stages score and calibrate on its images."""
        state = {} if source is None else source.state_dict()
        if state:
            save_sealed(_source_of(description), state, {})

    def _put_back(self, source: TransferSource | None, description: Path) -> None:
        if source is not None and source.state_dict():
            source.load_state_dict(load_sealed(_source_of(description))[0])

    def _reload(self, load: Callable[[Path], T], description: Path) -> T | None:
        if not self.team.first(description.exists):
            return None
        loaded = None
        try:
            loaded = load(description)
        except UserError as error:
            if self.team.leads:
                print(f"{error} That stage is run again.", file=sys.stderr)
        # Together, or not at all; and nobody writes these files anew while another reads them.
        return loaded if all(self.team.collect(loaded is not None)) else None

    def _save_quantized(
        self, quantization: Quantization, description: Path, source: TransferSource | None = None
    ) -> None:
        from zskd_nni.compression.quantization.serialization import save_calibration

        self._keep(source, description)
        made = Made(quantization.student)
        self.save(made, description, quantization=plain(save_calibration(quantization, description)))

    def save(self, made: Made, description: Path, **extra: Any) -> None:
        """Write a student's weights and the file that says how to build it.

        Args:
            made: the student.
            description: the ``.json`` file; the weights lie beside it.
            extra: further keys of the description.
        """
        section = self.network
        if made.masks:
            from zskd_nni.compression.pruning.masks import save_masks

            extra["masks"] = save_masks(made.masks, description)
        save_network(
            copy.deepcopy(made.network).cpu(),
            section.model,
            section.arguments,
            description.with_suffix(".safetensors"),
            description,
            self.loaded.base,
            {
                "input": plain(dataclasses.asdict(self.teacher.spec)),
                "classes": self.teacher.num_classes,
                "record": made.record,
                **extra,
            },
        )


def _source_of(description: Path) -> Path:
    return description.with_suffix(".source.safetensors")


def _made(description: Path) -> Made:
    network, content = load_network(description), read_json(description)
    record, masks = content.get("record"), content.get("masks")
    if not isinstance(record, dict):
        raise UserError(f"{description} does not tell how its network was made.")
    if masks is None:
        return Made(network, record)
    from zskd_nni.compression.pruning.masks import load_masks

    return Made(network, record, masks=load_masks(masks, description))
