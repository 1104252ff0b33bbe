"""An NNI evaluator without data: images from a transfer source, trained on in the package's own loop."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nni
import torch
from nni.compression.distillation.basic_distiller import TeacherModelBasedDistiller
from nni.compression.utils.evaluator import Hook, TorchEvaluator
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from zskd_nni.compression.checkpoint_state import CompressionState, owners
from zskd_nni.compression.pruning.masks import Masks, held_at_zero
from zskd_nni.data.sources import TransferSource
from zskd_nni.models.hooks import evaluating
from zskd_nni.models.memory_format import copied_images
from zskd_nni.models.teacher import Teacher, first_tensor
from zskd_nni.recipes.compression_config import CompressionRun
from zskd_nni.runtime.distributed import team
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.rng import generator
from zskd_nni.training.checkpoint import History
from zskd_nni.training.data_parallel import DataParallel
from zskd_nni.training.distillation import DistillationSettings, distillation_identity, transfer_batch
from zskd_nni.training.loop import TrainingRun, cosine_schedule, fit
from zskd_nni.training.metrics import agreement

_logger = logging.getLogger(__name__)
_STEPS_OF_A_STREAM = 1000
_CALIBRATION_BATCH = 256
_RELATIVE_SCALE_STEP = 0.01
TrainingStep = Callable[..., Any]


@dataclass(frozen=True)
class EvaluatorOptions:
    """Settings of a :class:`DataFreeEvaluator` that rarely change.

    Attributes:
        optimizers: one traced optimiser in place of AdamW, as for NNI's ``TorchEvaluator``.
        lr_schedulers: one traced schedule of that optimiser in place of the cosine.
        dummy_input: ``(N, C, H, W)``, normalised; two mid-grey images by default.
        calibration_images: size of the calibration set, which quantizers read ranges from.
        masks: weights that earlier pruning set to zero, by module and parameter; every training keeps them at zero.
        train_while_scoring: whether a Taylor or Slim pruner that runs alone, without a schedule or a distiller, also
            trains the model. By default the model's weights and BatchNorm statistics stay as they are.
        checkpoint_every: seconds between two writes of the checkpoint.
        label: shown beside the progress.
    """

    optimizers: Optimizer | list[Optimizer] | None = None
    lr_schedulers: LRScheduler | list[LRScheduler] | None = None
    dummy_input: Tensor | None = None
    calibration_images: int = 1000
    masks: Masks = field(default_factory=dict)
    train_while_scoring: bool = False
    checkpoint_every: float = 30.0
    label: str = "compression"


class DataFreeEvaluator(TorchEvaluator):
    """Training, scoring and calibration for NNI's pruners, quantizers and distillers, without data.

    The optimiser is AdamW with the settings' learning rate, under a cosine over as many steps as NNI asks for. A batch
    is the source's images, augmented and normalised; student and teacher see the same. ``evaluate()`` returns the share
    of the calibration set on which the bound model chooses the teacher's class, in [0, 1].

    Processes that share a process group of ``torch.distributed`` train together, each on its part of every batch, if
    the compressors look at weights alone (norm pruners, also under a schedule, and distillers). Taylor, Slim and
    Movement pruners and quantizers look at the images or gradients of every step. With them every process trains on
    whole batches, and all do the same.

    Args:
        teacher: labels every batch. Everything happens on its device.
        source: the images.
        settings: temperature of the distillation, learning rate, weight decay, warm-up, augmentation, and the number of
            steps where NNI names neither ``max_steps`` nor ``max_epochs``.
        seed: names the random streams.
        checkpoint: a file to keep the state of a training in; the same run again continues from it. A second training
            with the same evaluator uses a second file (``name-2``).
        pseudo_labels: the loss is the cross-entropy with the teacher's choices as labels. Otherwise it is 0, and
            a fused compressor, such as the distiller, must add one.
        quiet: show no progress.
        options: settings that rarely change.

    Attributes:
        histories: one for each training, in order.

    Raises:
        UserError: more than one optimiser, or a schedule without its optimiser.

    Example:
        >>> from nni.compression.pruning import TaylorPruner
        >>> from zskd_nni import NoiseSource, load_teacher
        >>> teacher = load_teacher("lenet5-digits")
        >>> evaluator = DataFreeEvaluator(teacher, NoiseSource(teacher.spec, 16), pseudo_labels=True, quiet=True)
        >>> config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
        >>> _, masks = TaylorPruner(teacher.student(), config_list, evaluator, training_steps=2).compress()
        >>> masks["conv1"]["weight"].mean().item()
        0.5
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
        quiet: bool = False,
        options: EvaluatorOptions | None = None,
    ) -> None:
        self.options = options = options or EvaluatorOptions()
        optimizers, schedules = _as_list(options.optimizers), _as_list(options.lr_schedulers)
        if len(optimizers) > 1 or len(schedules) > 1:
            raise UserError("DataFreeEvaluator trains with one optimiser and one learning-rate schedule.")
        if schedules and not optimizers:
            raise UserError("lr_schedulers came without its optimizer; pass both.")
        if options.calibration_images < 1:
            raise UserError(f"calibration_images must be at least 1, not {options.calibration_images}.")
        self.teacher, self.source, self.seed, self.quiet = teacher, source, seed, quiet
        self.settings = settings or DistillationSettings()
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.pseudo_labels = pseudo_labels
        self.histories: list[History] = []
        self._tmp_optimizers: list[Optimizer]  # NNI's, until the model is known
        self._own_optimizer = not optimizers
        self._compression = CompressionState(source)
        self._calibration_set: Tensor | None = None
        self._copy_hook: RemovableHandle | None = None
        dummy_input = teacher.example_input() if options.dummy_input is None else options.dummy_input
        super().__init__(
            self._train, optimizers, self._training_loss, schedules, dummy_input, self._agreement_on_calibration
        )
        self._train_with_single_optimizer = True
        self._train_with_single_scheduler = bool(schedules)

    def _init_optimizer_helpers(self, pure_model: nn.Module) -> None:
        # NNI calls this once it knows the model, so that the evaluator can be made without one.
        if not self._tmp_optimizers:
            weights = [parameter for parameter in pure_model.parameters() if parameter.requires_grad]
            if not weights:
                raise UserError("The model has no weight that may be trained (requires_grad is false everywhere).")
            rate, decay = self.settings.learning_rate, self.settings.weight_decay
            self._tmp_optimizers = [nni.trace(torch.optim.AdamW)(weights, lr=rate, weight_decay=decay)]
        super()._init_optimizer_helpers(pure_model)

    def bind_model(self, model: nn.Module, param_names_map: dict[str, str] | None = None) -> None:
        """As NNI's; forgets the compressors of the training before.

        A bound model gets copies of the batches, since it may change its input in place and the teacher sees the same.
        """
        super().bind_model(model, param_names_map)
        self._compression = CompressionState(self.source, model)
        self._copy_hook = model.register_forward_pre_hook(copied_images)

    def unbind_model(self) -> None:
        """As NNI's."""
        if self._copy_hook is not None:
            self._copy_hook.remove()
        super().unbind_model()

    def patch_loss(self, patch: Callable[[Tensor, Any], Tensor]) -> None:
        """As NNI's; also remembers the compressor behind ``patch`` for the checkpoint."""
        self._compression.remember(patch)
        for owner in owners(patch):
            if isinstance(owner, TeacherModelBasedDistiller) and not isinstance(
                owner.teacher_predict, WholeBatchPredict
            ):
                owner.teacher_predict = WholeBatchPredict(owner.teacher_predict)
        super().patch_loss(patch)

    def patch_optimizer_step(self, before_step_tasks: list[Callable], after_step_tasks: list[Callable]) -> None:
        """As NNI's; also remembers the compressors and optimisers behind the tasks for the checkpoint."""
        for task in (*before_step_tasks, *after_step_tasks):
            self._compression.remember(task)
        super().patch_optimizer_step(before_step_tasks, after_step_tasks)

    def patch_optim_param_group(self, module_name_param_dict: dict[str, list[Tensor]]) -> None:
        """As NNI's: adds parameters to the optimiser's group of their module, or to the first group.

        Unlike NNI's, it adds no parameter twice, such as the bias of a folded convolution. It also accepts a network
        with parameters outside its modules, such as a class token.
        """
        assert self.model is not None and self._optimizers
        optimizer, names = self._optimizers[0], {id(weight): name for name, weight in self.model.named_parameters()}
        known = {id(weight) for weight in _optimized(optimizer)}
        added = [(path, weight) for path, weights in module_name_param_dict.items() for weight in weights]
        added = [(path, weight) for path, weight in added if id(weight) not in known]
        own = {id(weight): weight for _, weight in added if self._own_optimizer and weight.numel()}
        scales = {key: weight for key, weight in own.items() if names.get(key, "").endswith("_scale")}
        for scale in scales.values():
            # A step of Adam is as long as its learning rate, whatever the gradient. A learnt quantization scale is
            # often as small as the weights' rate, at which one step would carry it across 0.
            rate = _RELATIVE_SCALE_STEP * float(scale.detach().abs().mean())
            optimizer.add_param_group({"params": [scale], "lr": rate, "weight_decay": 0.0})
        owners = {key: name.rpartition(".")[0].removesuffix("._nni_wrapper") for key, name in names.items()}
        for path, weight in added:
            if id(weight) not in scales:
                groups = optimizer.param_groups
                holding = (group for group in groups if any(owners.get(id(own)) == path for own in group["params"]))
                next(holding, groups[0])["params"].append(weight)

    def register_hooks(self, hooks: list[Hook]) -> None:
        """As NNI's; also remembers the hooks, whose buffers belong into the checkpoint."""
        self._compression.hooks.extend(hooks)
        super().register_hooks(hooks)

    def steps_for(self, max_steps: int | None, max_epochs: int | None) -> int:
        """Optimiser steps of a training: the smaller of the two limits, or the settings' number without either."""
        size = self.source.size
        epoch = _STEPS_OF_A_STREAM if size is None else max(1, size // self.source.batch_size)
        limits = (max_steps, None if max_epochs is None else max_epochs * epoch)
        return min((limit for limit in limits if limit is not None), default=self.settings.steps)

    def batch(self, step: int, random: torch.Generator, model: nn.Module | None = None) -> Tensor:
        """What student and teacher see at a step: ``(N, C, H, W)``, augmented and normalised."""
        images = transfer_batch(self.source, self.teacher, self.settings, step, random, model)
        return self.teacher.spec.normalise(images)

    @torch.no_grad()
    def calibration_set(self) -> Tensor:
        """The first ``calibration_images`` images of the source ``(N, C, H, W)``, normalised, without augmentation."""
        if self._calibration_set is None:
            parts: list[Tensor] = []
            wanted = min(self.options.calibration_images, self.source.size or self.options.calibration_images)
            while sum(map(len, parts)) < wanted:
                parts.append(self.source.batch(len(parts), generator(self.seed, "calibration", len(parts)), self.model))
            images = torch.cat(parts)[:wanted].to(self.teacher.device)
            self._calibration_set = self.teacher.spec.normalise(images)
        return self._calibration_set

    def _training_loss(self, batch: Tensor, model: nn.Module) -> Tensor:
        logits = first_tensor(model(batch))
        if not self.pseudo_labels:
            return 0.0 * logits.sum()  # keeps the graph, so that a backward pass alone is no error
        with torch.no_grad():
            choices = self.teacher.output(self.teacher.model(batch)).argmax(1)
        return functional.cross_entropy(logits, choices)

    @torch.no_grad()
    def _agreement_on_calibration(self, model: nn.Module) -> float:
        """Share of the calibration set on which ``model`` chooses the teacher's class, in [0, 1]."""
        with evaluating(model):
            parts = self.calibration_set().split(min(_CALIBRATION_BATCH, self.teacher.spec.inference_batch))
            student = torch.cat([first_tensor(model(part)) for part in parts])
            teacher = torch.cat([self.teacher.output(self.teacher.model(part)) for part in parts])
        return agreement(student, teacher)

    def _train(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        training_step: TrainingStep,
        lr_scheduler: LRScheduler | None = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        steps = self.steps_for(max_steps, max_epochs)
        if steps < 1:
            return  # only calibration
        if training_step == self._ori_training_step and self._compression.only_calibrates():
            self._show(model, steps)
            return
        if training_step == self._ori_training_step and not self.pseudo_labels:
            _logger.warning(
                "There is no loss: the weights will not change, and a pruner that scores by gradients (Taylor, "
                "Movement) finds every score 0. Fuse a distiller (ZeroShotDistiller.from_compressor) or set "
                "pseudo_labels=True."
            )
        only_scores = self._compression.only_scores() and not self.options.train_while_scoring
        masks, distilled = self.options.masks, distillation_identity(self.teacher, self.source, self.settings)
        shared = DataParallel(team(), divided=self._compression.can_be_divided())

        def loss(step: int, random: torch.Generator) -> Tensor:
            whole = self.batch(step, random, model)
            images = shared.part(whole)
            with shared.forward():
                value = loss_of(training_step(images, model))
            return shared.weighted(value, len(images), len(whole))

        run = TrainingRun(
            steps,
            seed=self.seed,
            checkpoint=self._checkpoint_path(),
            checkpoint_every=self.options.checkpoint_every,
            label=self.options.label,
            after_step=_put_back(model, optimizer) if only_scores else held_at_zero(model, masks) if masks else None,
            quiet=self.quiet,
            identity=[distilled, self.pseudo_labels, only_scores, self._compression.description()],
            extra=self._compression,
            shared=shared,
        )
        schedule = lr_scheduler or cosine_schedule(optimizer, steps, min(self.settings.warmup, steps // 2))
        with warnings.catch_warnings():
            # NNI replaces the optimiser's step, which PyTorch takes for a mistake in the order of the user's calls.
            warnings.filterwarnings("ignore", "Seems like `optimizer.step\\(\\)` has been overridden")
            # DoReFa rounds gradients in hooks that run before a layer's own. PyTorch 2.11 warns of them where a layer's
            # input needs no gradient, as at the first layer; what they do there is right.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            self.histories.append(fit(model, optimizer, schedule, loss, run))

    def _show(self, model: nn.Module, steps: int) -> None:
        """Let a quantizer that only reads ranges see the batches of ``steps`` steps; nothing of the model moves."""
        with evaluating(model), torch.no_grad():
            for step in range(steps):
                model(self.batch(step, generator(self.seed, "shown", step), model))

    def _checkpoint_path(self) -> Path | None:
        path, number = self.checkpoint, len(self.histories) + 1
        return path.with_name(f"{path.stem}-{number}{path.suffix}") if path and self.histories else path


def evaluator_of_run(
    run: CompressionRun,
    teacher: Teacher,
    images: TransferSource,
    settings: DistillationSettings,
    pseudo_labels: bool = False,
    **options: Any,
) -> DataFreeEvaluator:
    """The evaluator of one training; further arguments are those of :class:`EvaluatorOptions`."""
    given: dict[str, Any] = {"seed": run.seed, "checkpoint": run.checkpoint, "quiet": run.quiet}
    rare = EvaluatorOptions(**options)
    return DataFreeEvaluator(teacher, images, settings, pseudo_labels=pseudo_labels, options=rare, **given)


class WholeBatchPredict:
    """A ``teacher_predict`` as NNI's examples write it, for a batch that is the images themselves.

    NNI's batches are images and labels, and its examples call ``teacher(batch[0])``. Here ``batch[0]`` would be one
    image: the teacher gets the whole batch in its place.
    """

    def __init__(self, predict: Callable[[Any, nn.Module], Any]) -> None:
        self.predict: Callable[[Any, nn.Module], Any] = predict

    def __call__(self, batch: Any, teacher: nn.Module) -> Any:
        """The teacher's output for all images of the batch."""

        def whole(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            image = arguments[0] if arguments else None
            if not isinstance(image, Tensor) or not isinstance(batch, Tensor) or image.shape != batch.shape[1:]:
                return None
            return batch.to(image.device), *arguments[1:]

        hook = teacher.register_forward_pre_hook(whole) if isinstance(teacher, nn.Module) else None
        try:
            return self.predict(batch, teacher)
        except (IndexError, KeyError, TypeError) as error:
            raise UserError(
                f"teacher_predict(batch, teacher) fails ({type(error).__name__}: {error}): the batch of a "
                f"DataFreeEvaluator is a tensor of images (N, C, H, W), normalised, without labels; write "
                f"teacher_predict=lambda batch, teacher: teacher(batch)"
            ) from error
        finally:
            if hook is not None:
                hook.remove()


def _put_back(model: nn.Module, optimizer: Optimizer) -> Callable[[int], None]:
    """An ``after_step`` of ``fit`` that undoes the step: weights and BatchNorm statistics are again as they are now."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    held = [*_optimized(optimizer), *(buffer for norm in norms for buffer in norm.buffers(recurse=False))]
    before = [tensor.detach().clone() for tensor in held]

    @torch.no_grad()
    def put_back(_: int) -> None:
        for tensor, value in zip(held, before, strict=True):
            tensor.copy_(value)

    return put_back


def _optimized(optimizer: Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def loss_of(result: Any) -> Tensor:
    """The loss in what a training step returns: a tensor, a sequence's first entry, or a mapping's ``loss``."""
    if isinstance(result, Tensor):
        return result
    return result["loss"] if isinstance(result, dict) else result[0]


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
