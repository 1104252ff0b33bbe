"""The engine: a fixed number of slots, each holding an image that is optimised towards its target.

The published loop optimises 100 images for 1,500 steps each, even if they fit earlier. Here an image that fits, reaches
its step limit or stops improving is finished. The next image of the shard takes its slot and starts with a new
optimiser state. With ``tolerance: null`` and one step limit all images of a batch finish together, as published.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from zskd_nni.models.hooks import FeaturePoint, recording_features
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime import signals
from zskd_nni.runtime.device import to_device
from zskd_nni.runtime.errors import UserError
from zskd_nni.synthesis.batch_norm_statistics import StatisticsTracker, batch_norms
from zskd_nni.synthesis.settings import SynthesisSettings
from zskd_nni.training.losses import soft_target_divergence, total_variation

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's defaults, as the authors use them
REFERENCE_TEMPERATURE = 20.0
_IMPROVEMENT = 0.99  # a divergence below this share of the best one so far counts as progress


@dataclass(frozen=True)
class Impressions:
    """Finished images in the order of their targets, on the CPU.

    Attributes:
        images: ``(N, C, H, W)`` float32, in the teacher's value range unless the settings leave it free.
        targets: ``(N, K)`` the soft targets they were made for.
        logits: ``(N, K)`` the teacher's logits of them.
        fit: ``(N,)`` ``KL(target || softmax(logits / T))``.
        steps: ``(N,)`` int32, optimiser steps taken.
    """

    images: Tensor
    targets: Tensor
    logits: Tensor
    fit: Tensor
    steps: Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class ShardInputs:
    """Starts, targets and weights of a shard's impressions, one row per impression.

    Attributes:
        targets: ``(N, K)`` rows of probabilities.
        starts: ``(N, C, H, W)`` in the teacher's value range.
        temperatures: ``(N, 1)`` the teacher's temperature for each.
        prior: ``(N,)`` weight of the total variation of each.
        limits: ``(N,)`` float32, step limit of each; always on the CPU.
        free: ``(N, 1, H, W)`` which pixels may change, 1 or 0; None for all.
    """

    targets: Tensor
    starts: Tensor
    temperatures: Tensor
    prior: Tensor
    limits: Tensor
    free: Tensor | None = None

    def to(self, device: torch.device) -> ShardInputs:
        """A copy on a device, except ``limits``: the engine reads them on the CPU, without waiting for the device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return ShardInputs(**{n: v if v is None or n == "limits" else v.to(device) for n, v in values.items()})


@dataclass(frozen=True)
class FeatureTerm:
    """A further term of the objective, computed from the features at a point inside the teacher.

    Attributes:
        point: where the features are taken.
        weight: of the term beside the divergence, at every temperature.
        value: takes the features ``(N, ...)`` and gives the term ``(N,)``, which is minimised.
    """

    point: FeaturePoint
    weight: float
    value: Callable[[Tensor], Tensor]


class _Slots:
    """The images being optimised: one row per slot, on the device except ``index`` and ``due``.

    Args:
        inputs: of the whole shard, on the device.
        count: of slots.
    """

    def __init__(self, inputs: ShardInputs, count: int) -> None:
        self.inputs, self.device = inputs, inputs.starts.device
        self.next_image = count  # the first image of the shard that waits for a slot
        self.index = torch.arange(count)  # which image of the shard each slot holds
        self.due = inputs.limits[:count].long()  # turn of the engine at which each reaches its step limit
        self._given = ("targets", "temperatures", "prior", *(() if inputs.free is None else ("free",)))
        given = (inputs.targets, inputs.temperatures, inputs.prior)
        self.targets, self.temperatures, self.prior = (values[:count].clone() for values in given)
        self.free = None if inputs.free is None else inputs.free[:count].clone()
        self.images = inputs.starts[:count].clone()
        self.first = torch.zeros_like(self.images)  # Adam's moments
        self.second = torch.zeros_like(self.images)
        self.age = torch.zeros(count, device=self.device)  # steps of this image
        self.adam_step = torch.zeros(count, device=self.device)  # steps of this Adam state
        self.best = torch.full((count,), float("inf"), device=self.device)  # lowest divergence so far
        self.best_age = torch.zeros(count, device=self.device)
        self._rows = (*self._given, "images", "first", "second", "age", "adam_step", "best", "best_age")

    def __len__(self) -> int:
        return len(self.index)

    def finished(self, fit: Tensor, turn: int, settings: SynthesisSettings) -> Tensor:
        """Rows, on the CPU, of the images that fit, do not improve any more or reach their step limit."""
        leaving = self.due <= turn  # known in advance, so that no step waits for the device
        if settings.tolerance is not None:
            leaving |= (fit <= settings.tolerance).cpu()
        if settings.patience:
            better = fit < self.best * _IMPROVEMENT
            self.best = torch.where(better, fit, self.best)
            self.best_age = torch.where(better, self.age, self.best_age)
            leaving |= (self.age - self.best_age >= settings.patience).cpu()
        return leaving.nonzero().flatten()

    def adam_update(self, gradient: Tensor, learning_rate: float) -> None:
        """Adam (Kingma & Ba 2015, algorithm 1) with a step count for each slot."""
        self.age += 1
        self.adam_step += 1
        self.first.lerp_(gradient, 1 - BETA1)
        self.second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        correction1 = (1 - BETA1**self.adam_step).view(-1, 1, 1, 1)
        correction2 = (1 - BETA2**self.adam_step).view(-1, 1, 1, 1)
        denominator = (self.second / correction2).sqrt_().add_(EPSILON)
        self.images.sub_(self.first / denominator * (learning_rate / correction1))

    def replace(self, rows: Tensor, warm_start: bool, turn: int) -> Tensor:
        """Put the next images of the shard into these rows; ``turn`` is that of their first step.

        Returns:
            The rows for which no image was left. They are removed.
        """
        fresh = torch.arange(self.next_image, min(len(self.inputs.targets), self.next_image + len(rows)))
        self.next_image += len(fresh)
        filled, removed = rows[: len(fresh)], rows[len(fresh) :]
        if len(filled):
            self._fill(filled, fresh, warm_start, turn)
        if len(removed):
            stay = torch.ones(len(self), dtype=torch.bool)
            stay[removed] = False
            self._keep(stay.nonzero().flatten())
        return removed

    def _fill(self, rows: Tensor, index: Tensor, warm_start: bool, turn: int) -> None:
        self.index[rows] = index
        self.due[rows] = turn + self.inputs.limits[index].long()
        rows, index = to_device(rows, self.device), to_device(index, self.device)
        for name in self._given:
            getattr(self, name)[rows] = getattr(self.inputs, name)[index]
        self.age[rows], self.best[rows], self.best_age[rows] = 0, float("inf"), 0
        if not warm_start:
            self.images[rows] = self.inputs.starts[index]
            self.first[rows], self.second[rows], self.adam_step[rows] = 0, 0, 0

    def _keep(self, rows: Tensor) -> None:
        self.index, self.due = self.index[rows], self.due[rows]
        rows = to_device(rows, self.device)
        for name in self._rows:
            setattr(self, name, getattr(self, name)[rows])


class _Objective:
    """What the images minimise: the divergence from their targets (ZSKD equation 5) and what the settings add to it."""

    def __init__(self, teacher: Teacher, settings: SynthesisSettings, term: FeatureTerm | None) -> None:
        self.teacher, self.settings, self.term = teacher, settings, term
        compared = settings.batch_statistics and batch_norms(teacher.model)
        self.statistics = StatisticsTracker(teacher.model) if compared else None

    def value(self, slots: _Slots, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sum over the images ``(n, C, H, W)``, their divergence ``(n,)`` and the teacher's logits ``(n, K)``."""
        settings, spec = self.settings, self.teacher.spec
        features: list[Tensor] = []
        distances: list[Tensor] = []
        with ExitStack() as hooks:
            if self.term is not None:
                features = hooks.enter_context(recording_features(self.teacher.model, self.term.point))
            if self.statistics is not None:
                distances = hooks.enter_context(self.statistics.distances())
            logits = self.teacher(images)
        fit = soft_target_divergence(logits, slots.targets, slots.temperatures)  # equation 5
        loss = fit
        if self.term is not None:
            loss = loss + self.term.weight * self.term.value(features[-1])
        if self.statistics is not None:
            # One distance of all images together. The factor gives each image the same share of it at any batch size.
            share = (len(loss) + self.statistics.retired) / len(loss)
            loss = loss + settings.batch_statistics * share * torch.stack(distances).sum()
        # The divergence's gradient falls with 1 / T. The factor T / 20 keeps the balance with the prior the same at
        # every temperature; Adam itself does not depend on the scale.
        total = (loss * slots.temperatures[:, 0]).sum() / REFERENCE_TEMPERATURE
        if settings.total_variation != (0.0, 0.0):
            total = total + (slots.prior * total_variation(images / (spec.high - spec.low))).sum()
        return total, fit.detach(), logits.detach()


class _Results:
    """The finished images in the order of the shard, on the device: no step waits for a copy."""

    def __init__(self, inputs: ShardInputs) -> None:
        count, device = len(inputs.targets), inputs.starts.device
        self.images, self.logits = torch.zeros_like(inputs.starts), torch.zeros_like(inputs.targets)
        self.fit, self.steps = torch.zeros(count, device=device), torch.zeros(count, dtype=torch.int32, device=device)

    def add(self, slots: _Slots, rows: Tensor, fit: Tensor, logits: Tensor) -> None:
        place, rows = to_device(slots.index[rows], slots.device), to_device(rows, slots.device)
        self.images[place] = slots.images[rows]
        self.logits[place] = logits[rows].float()
        self.fit[place] = fit[rows].float()
        self.steps[place] = slots.age[rows].to(torch.int32)

    def require_finite(self, learning_rate: float) -> None:
        """Refuse an image that has diverged; waits for the device."""
        if not torch.isfinite(self.fit).all() or not torch.isfinite(self.images).all():
            raise UserError(
                f"Synthesis diverged: the teacher's logits are not finite after {int(self.steps.max())} steps. A "
                f"smaller synthesis.learning_rate (now {learning_rate}) usually helps."
            )


def synthesize_shard(
    teacher: Teacher,
    inputs: ShardInputs,
    settings: SynthesisSettings,
    on_finished: Callable[[int], None] | None = None,
    term: FeatureTerm | None = None,
) -> Impressions:
    """Optimise starts until the teacher's output matches their soft targets (ZSKD equation 5).

    Args:
        teacher: on the device to use.
        inputs: targets, starts and weights.
        settings: the schedule.
        on_finished: called with the number of images that finished at a step.
        term: added to the objective, if given.

    Raises:
        UserError: the teacher's logits or their gradient are not finite.
    """
    spec, targets = teacher.spec, inputs.targets
    inputs = inputs.to(teacher.device)
    results, slots = _Results(inputs), _Slots(inputs, min(settings.slots, len(targets)))
    objective = _Objective(teacher, settings, term)
    turn = 0
    while len(slots):
        signals.check()
        # The authors' code leaves the rescaling out before the last step and the final logits.
        if settings.range == "rescale" and int(slots.due[0]) - turn > 1:
            slots.images = _rescaled(slots.images, spec.low, spec.high)
        with torch.set_grad_enabled(bool((slots.due > turn).any())):  # the last look at a batch needs no gradient
            images = slots.images.requires_grad_(torch.is_grad_enabled())
            total, fit, logits = objective.value(slots, images)
        slots.images = images.detach()
        rows = slots.finished(fit, turn, settings)
        if len(rows):
            results.add(slots, rows, fit, logits)
            if teacher.device.type == "cpu":  # elsewhere at the end of the shard
                results.require_finite(settings.learning_rate)
            if on_finished is not None:
                on_finished(len(rows))
        if len(rows) < len(slots):
            (gradient,) = torch.autograd.grad(total, images)
            if slots.free is not None:
                gradient = gradient * slots.free
            slots.adam_update(gradient, settings.learning_rate * (spec.high - spec.low))
            if settings.range == "clamp":
                slots.images.clamp_(spec.low, spec.high)
        if len(rows):
            removed = slots.replace(rows, settings.warm_start, turn + 1)
            if objective.statistics is not None and len(removed):
                objective.statistics.retire(to_device(removed, teacher.device))
        turn += 1
    results.require_finite(settings.learning_rate)
    return Impressions(results.images.cpu(), targets, results.logits.cpu(), results.fit.cpu(), results.steps.cpu())


def _rescaled(images: Tensor, low: float, high: float) -> Tensor:
    """The authors' rescaling of a whole batch by its extremes."""
    smallest, largest = images.min(), images.max()
    return low + (images - smallest) / (largest - smallest).clamp_min(1e-12) * (high - low)
