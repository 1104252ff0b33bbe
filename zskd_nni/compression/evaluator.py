"""An NNI evaluator that needs no data: images from a transfer source, training by the package's own loop."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nni
import torch
from nni.common.types import SCHEDULER
from nni.compression.utils import TorchEvaluator
from nni.compression.utils.evaluator import Hook
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from zskd_nni.compression.checkpoint_state import FusedState
from zskd_nni.compression.pruning.masks import Masks, held_at_zero
from zskd_nni.data.sources import TransferSource
from zskd_nni.models.memory_format import copied_images
from zskd_nni.models.teacher import Teacher, first_tensor
from zskd_nni.runtime.distributed import team
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import fingerprint_of
from zskd_nni.runtime.rng import generator
from zskd_nni.training.checkpoint import Checkpoint, History
from zskd_nni.training.data_parallel import DataParallel
from zskd_nni.training.distillation import DistillationSettings, run_fingerprint, transfer_batch
from zskd_nni.training.loop import cosine_schedule, fit, training_mode
from zskd_nni.training.metrics import agreement

_logger = logging.getLogger(__name__)
_STEPS_OF_A_STREAM = 1000
_CALIBRATION_BATCH = 256
_RELATIVE_SCALE_STEP = 0.01
TrainingStep = Callable[..., Any]


class DataFreeEvaluator(TorchEvaluator):
    """What NNI's pruners, quantizers and distillers train, score and calibrate on, without data.

    The optimiser is AdamW as the settings say, under a cosine over as many steps as NNI asks for; one or both can
    be replaced by the user's own, made by ``nni.trace``. A batch is the source's images, augmented and normalised:
    what student and teacher see.

    Processes that share a process group of ``torch.distributed`` train together, each on its part of every batch,
    where what is fused looks at weights alone (norm pruners, also under a schedule, and distillers). Taylor, Slim and
    Movement pruners and quantizers look at the images or the gradients of every step: with them each process trains
    on whole batches, and all do the same.

    Args:
        teacher: answers; its device is where everything happens.
        source: the images.
        settings: learning rate, weight decay, warm-up, augmentation, and the steps of a run for which NNI names
            neither ``max_steps`` nor ``max_epochs``.
        seed: names the random streams.
        checkpoint: a file to keep the state of a training in; the same run again goes on from it. A second training
            with the same evaluator keeps its state beside it (``name-2``).
        pseudo_labels: the loss is the cross-entropy on the teacher's choices. Without it the loss is 0 and something
            fused, such as the distiller, must bring one.
        calibration_images: images in the calibration set, which ``evaluate`` runs.
        optimizers: one traced optimiser in place of AdamW.
        lr_schedulers: one traced schedule of that optimiser in place of the cosine.
        dummy_input: ``(2, C, H, W)`` of mid-grey by default.
        masks: what earlier pruning set to zero in the model, and every training is to leave at zero.
        checkpoint_every: seconds between two writes.
        label: shown beside the progress.
        quiet: no progress.

    Attributes:
        histories: of each training, in order.

    Raises:
        UserError: more than one optimiser, or a schedule without its optimiser.
    """

    def __init__(
        self,
        teacher: Teacher,
        source: TransferSource,
        settings: DistillationSettings | None = None,
        *,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        pseudo_labels: bool = False,
        calibration_images: int = 1000,
        optimizers: Optimizer | list[Optimizer] | None = None,
        lr_schedulers: LRScheduler | list[LRScheduler] | None = None,
        dummy_input: Tensor | None = None,
        masks: Masks | None = None,
        checkpoint_every: float = 30.0,
        label: str = "compression",
        quiet: bool = False,
    ) -> None:
        given_optimizers, given_schedules = _listed(optimizers), _listed(lr_schedulers)
        if len(given_optimizers) > 1 or len(given_schedules) > 1:
            raise UserError("DataFreeEvaluator trains with one optimiser and one learning-rate schedule.")
        if given_schedules and not given_optimizers:
            raise UserError("lr_schedulers came without its optimizer; pass both.")
        if calibration_images < 1:
            raise UserError(f"calibration_images must be at least 1, not {calibration_images}.")
        self.teacher, self.source, self.seed = teacher, source, seed
        self.settings = settings or DistillationSettings()
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.pseudo_labels, self.calibration_images = pseudo_labels, calibration_images
        self.checkpoint_every, self.label, self.quiet = checkpoint_every, label, quiet
        self.masks = masks or {}
        self.histories: list[History] = []
        self._tmp_optimizers: list[Optimizer]  # NNI's, until the model is known
        self._own_optimizer = not given_optimizers
        self._compression = FusedState(source)
        self._calibration_set: Tensor | None = None
        self._own_images: RemovableHandle | None = None
        if dummy_input is None:
            dummy_input = teacher.example_input()
        super().__init__(
            self._train,
            given_optimizers,
            self._answer_step,
            given_schedules,
            dummy_input,
            self._agreement_on_calibration,
        )
        self._train_with_single_optimizer = True
        self._train_with_single_scheduler = bool(given_schedules)

    def _init_optimizer_helpers(self, pure_model: nn.Module) -> None:
        # The model is known here and not before, so that the evaluator can be made without it.
        if not self._tmp_optimizers:
            traced = nni.trace(torch.optim.AdamW)
            weights = [parameter for parameter in pure_model.parameters() if parameter.requires_grad]
            if not weights:
                raise UserError("The model has no weight that may be trained (requires_grad is false everywhere).")
            self._tmp_optimizers = [
                traced(weights, lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay)
            ]
        super()._init_optimizer_helpers(pure_model)

    def bind_model(self, model: nn.Module, param_names_map: dict[str, str] | None = None) -> None:
        """NNI's, and a fresh record of what the fused compressors count with.

        While bound, the model gets copies of the batches: it may change its input in place, and the teacher is asked
        about the same images.
        """
        super().bind_model(model, param_names_map)
        self._compression = FusedState(self.source, model)
        self._own_images = model.register_forward_pre_hook(copied_images)

    def unbind_model(self) -> None:
        """NNI's."""
        if self._own_images is not None:
            self._own_images.remove()
            self._own_images = None
        super().unbind_model()

    def patch_loss(self, patch: Callable[[Tensor, Any], Tensor]) -> None:
        """NNI's; the compressor behind ``patch`` is noted for the checkpoint."""
        self._compression.note(patch)
        super().patch_loss(patch)

    def patch_optimizer_step(self, before_step_tasks: list[Callable], after_step_tasks: list[Callable]) -> None:
        """NNI's; the compressors and optimisers behind the tasks are noted for the checkpoint."""
        for task in (*before_step_tasks, *after_step_tasks):
            self._compression.note(task)
        super().patch_optimizer_step(before_step_tasks, after_step_tasks)

    def patch_optim_param_group(self, module_name_param_dict: dict[str, list[Tensor]]) -> None:
        """As NNI's: into the group of the module's other parameters, or the first.

        But no parameter enters the optimiser twice, as the bias of a folded convolution would, and a network may have
        parameters of its own beside its modules' (a class token), over which NNI stumbles.
        """
        known = {
            id(weight)
            for optimizer in self._optimizers or []
            for group in optimizer.param_groups
            for weight in group["params"]
        }
        fresh = {
            path: [weight for weight in weights if id(weight) not in known]
            for path, weights in module_name_param_dict.items()
        }
        if self._own_optimizer:
            self._add_scales(fresh)
        for path, weights in fresh.items():
            self._group_of(path)["params"].extend(weights)

    def _group_of(self, path: str) -> dict[str, Any]:
        """The optimisers' group that holds a parameter of the module ``path``; the first where none does."""
        assert self.model is not None and self._optimizers
        owners = {
            id(weight): name.rpartition(".")[0].removesuffix("._nni_wrapper")
            for name, weight in self.model.named_parameters()
        }
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        holding = (group for group in groups if any(owners.get(id(weight)) == path for weight in group["params"]))
        return next(holding, groups[0])

    def _add_scales(self, weights_by_path: dict[str, list[Tensor]]) -> None:
        # A step of Adam is as long as its learning rate, whatever the gradient: at the weights' rate it would throw
        # a learnt quantization scale, often as small as that rate, to the other side of 0.
        assert self.model is not None and self._optimizers
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        for path, weights in weights_by_path.items():
            scales = [weight for weight in weights if names.get(id(weight), "").endswith("_scale") and weight.numel()]
            for scale in scales:
                rate = _RELATIVE_SCALE_STEP * float(scale.detach().abs().mean())
                self._optimizers[0].add_param_group({"params": [scale], "lr": rate, "weight_decay": 0.0})
            taken = {id(scale) for scale in scales}
            weights_by_path[path] = [weight for weight in weights if id(weight) not in taken]

    def register_hooks(self, hooks: list[Hook]) -> None:
        """NNI's; what the hooks gather is noted for the checkpoint."""
        self._compression.hooks.extend(hooks)
        super().register_hooks(hooks)

    def steps_for(self, max_steps: int | None, max_epochs: int | None) -> int:
        """Optimiser steps of a training: the shorter of the two limits, or the settings' own without any."""
        size = self.source.size
        epoch = _STEPS_OF_A_STREAM if size is None else max(1, size // self.source.batch_size)
        limits = [] if max_steps is None else [max_steps]
        if max_epochs is not None:
            limits.append(max_epochs * epoch)
        return min(limits, default=self.settings.steps)

    def batch(self, step: int, random: torch.Generator, model: nn.Module | None = None) -> Tensor:
        """What student and teacher see at a step: ``(N, C, H, W)`` augmented, normalised."""
        return self.teacher.spec.normalise(
            transfer_batch(self.source, self.teacher, self.settings, step, random, model)
        )

    @property
    def calibration_batch(self) -> int:
        """How many images a quantizer is calibrated on at once: 256, fewer of large ones."""
        return min(_CALIBRATION_BATCH, self.teacher.spec.measuring_batch)

    @torch.no_grad()
    def calibration_set(self) -> Tensor:
        """The first ``calibration_images`` images of the source as the networks see them, without augmentation."""
        if self._calibration_set is None:
            parts: list[Tensor] = []
            wanted = min(self.calibration_images, self.source.size or self.calibration_images)
            while sum(map(len, parts)) < wanted:
                parts.append(self.source.batch(len(parts), generator(self.seed, "calibration", len(parts)), self.model))
            images = torch.cat(parts)[:wanted].to(self.teacher.device)
            self._calibration_set = self.teacher.spec.normalise(images)
        return self._calibration_set

    def _answer_step(self, batch: Tensor, model: nn.Module) -> Tensor:
        logits = first_tensor(model(batch))
        if not self.pseudo_labels:
            return 0.0 * logits.sum()  # keeps the graph, so that a backward pass alone is no error
        with torch.no_grad():
            choices = self.teacher.output(self.teacher.model(batch)).argmax(1)
        return functional.cross_entropy(logits, choices)

    def _agreement_on_calibration(self, model: nn.Module) -> float:
        """Share of the calibration set on which ``model`` chooses as the teacher does, in [0, 1]."""
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                parts = self.calibration_set().split(self.calibration_batch)
                student = torch.cat([first_tensor(model(part)) for part in parts])
                teacher = torch.cat([self.teacher.output(self.teacher.model(part)) for part in parts])
        finally:
            model.train(was_training)
        return agreement(student, teacher)

    def _train(
        self,
        model: nn.Module,
        optimizers: Optimizer,
        training_step: TrainingStep,
        lr_schedulers: SCHEDULER | None = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        steps = self.steps_for(max_steps, max_epochs)
        if steps < 1:
            return  # a calibration alone
        if training_step == self._ori_training_step and not self.pseudo_labels:
            _logger.warning(
                "Nothing brings a loss, so that the weights will not change, and a pruner that scores by gradients "
                "(Taylor, Movement) finds every score 0: fuse a distiller "
                "(ZeroShotDistiller.from_compressor) or set pseudo_labels=True."
            )
        schedule = lr_schedulers or cosine_schedule(optimizers, steps, min(self.settings.warmup, steps // 2))

        shared = DataParallel(team(), divided=self._compression.can_be_divided())

        def loss(step: int, random: torch.Generator) -> Tensor:
            whole = self.batch(step, random, model)
            images = shared.part(whole)
            with shared.forward():
                value = loss_of(training_step(images, model))
            return shared.weighed(value, len(images), len(whole))

        checkpoint = None
        if self.checkpoint is not None:
            fingerprint = fingerprint_of(
                [
                    run_fingerprint(self.teacher, self.source, self.settings, self.seed, model),
                    steps,
                    self.pseudo_labels,
                    self._compression.description(),
                ]
            )
            checkpoint = Checkpoint(self._checkpoint_path(), fingerprint, self.checkpoint_every)
        with training_mode(model), warnings.catch_warnings():
            # NNI puts its own step around the optimiser's, which PyTorch takes for a mistake in the user's loop.
            warnings.filterwarnings("ignore", "Seems like `optimizer.step\\(\\)` has been overridden")
            history = fit(
                model,
                optimizers,
                schedule,
                loss,
                steps=steps,
                seed=self.seed,
                label=self.label,
                checkpoint=checkpoint,
                after_step=held_at_zero(model, self.masks) if self.masks else None,
                extra=self._compression,
                shared=shared,
                quiet=self.quiet,
            )
        self.histories.append(history)

    def _checkpoint_path(self) -> Path:
        assert self.checkpoint is not None
        if not self.histories:
            return self.checkpoint
        return self.checkpoint.with_name(f"{self.checkpoint.stem}-{len(self.histories) + 1}{self.checkpoint.suffix}")


def loss_of(result: Any) -> Tensor:
    """The loss in what a training step returns: a tensor, a sequence's first entry, or a mapping's ``loss``."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, dict):
        return result["loss"]
    return result[0]


def _listed(value: Any) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
