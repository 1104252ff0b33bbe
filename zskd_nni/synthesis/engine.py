"""The engine: a fixed number of slots, each an image on its way to its target.

The published loop optimises 100 images for 1,500 steps, whether they converged after 60 or never will. Here an image
that has reached its target, its step limit or a standstill leaves, and a fresh one takes its slot with an optimiser
state of its own. With ``tolerance: null`` all images of a batch leave together, which is the published schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from zskd_nni import interrupt
from zskd_nni.batch_statistics import statistics_distances
from zskd_nni.errors import UserError
from zskd_nni.feature_points import FeaturePoint, watched
from zskd_nni.losses import soft_target_divergence, total_variation
from zskd_nni.synthesis.settings import SynthesisSettings
from zskd_nni.teacher import Teacher

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's defaults, as the authors use them
REFERENCE_TEMPERATURE = 20.0
_STANDSTILL = 0.99


@dataclass(frozen=True)
class Impressions:
    """Finished images in the order of their targets, on the CPU.

    Attributes:
        images: ``(N, C, H, W)`` float32, in the teacher's value range unless the settings leave it free.
        targets: ``(N, K)`` the soft targets they were made for.
        logits: ``(N, K)`` the teacher's answer to them.
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
class Orders:
    """What is asked for, one row an impression, on the CPU.

    Attributes:
        targets: ``(N, K)`` rows of probabilities.
        starts: ``(N, C, H, W)`` in the teacher's value range.
        temperatures: ``(N, 1)`` the teacher's temperature for each.
        prior: ``(N,)`` weight of the total variation of each.
        limits: ``(N,)`` float32, after how many steps each leaves at the latest.
        free: ``(N, 1, H, W)`` which pixels may change, or None for all.
    """

    targets: Tensor
    starts: Tensor
    temperatures: Tensor
    prior: Tensor
    limits: Tensor
    free: Tensor | None = None


@dataclass(frozen=True)
class FeatureTerm:
    """A further term of the objective, computed from what passes a point inside the teacher.

    Attributes:
        point: where the features are taken.
        weight: of the term beside the divergence, at every temperature.
        value: takes the features ``(N, ...)`` and gives what is to become small, ``(N,)``.
    """

    point: FeaturePoint
    weight: float
    value: Callable[[Tensor], Tensor]


class _Slots:
    """The state of the images in flight; every tensor has one row a slot."""

    _ORDERED = ("targets", "temperatures", "prior", "limits")
    _ROWS = ("images", *_ORDERED, "first", "second", "age", "adam_step", "best", "best_age")

    def __init__(self, count: int, device: torch.device, orders: Orders) -> None:
        self.device = device
        self.index = torch.arange(count)  # which image of the shard (CPU)
        self.images = orders.starts[:count].to(device, copy=True)  # the caller's stay as they are
        self.targets = orders.targets[:count].to(device, copy=True)
        self.temperatures = orders.temperatures[:count].to(device, copy=True)
        self.prior = orders.prior[:count].to(device, copy=True)
        self.limits = orders.limits[:count].to(device, copy=True)
        self.free = None if orders.free is None else orders.free[:count].to(device, copy=True)
        self.first = torch.zeros_like(self.images)  # Adam's moments
        self.second = torch.zeros_like(self.images)
        self.age = torch.zeros(count, device=device)  # steps of this image
        self.adam_step = torch.zeros(count, device=device)  # steps of this Adam state
        self.best = torch.full((count,), float("inf"), device=device)
        self.best_age = torch.zeros(count, device=device)

    def refill(self, rows: Tensor, index: Tensor, orders: Orders, warm: bool) -> None:
        on_device = rows.to(self.device)
        self.index[rows] = index
        for name in self._ORDERED:
            getattr(self, name)[on_device] = getattr(orders, name)[index].to(self.device)
        if self.free is not None and orders.free is not None:
            self.free[on_device] = orders.free[index].to(self.device)
        self.age[on_device] = 0
        self.best[on_device] = float("inf")
        self.best_age[on_device] = 0
        if not warm:
            self.images[on_device] = orders.starts[index].to(self.device)
            self.first[on_device] = 0
            self.second[on_device] = 0
            self.adam_step[on_device] = 0

    def keep(self, rows: Tensor) -> None:
        on_device = rows.to(self.device)
        self.index = self.index[rows]
        for name in self._ROWS:
            setattr(self, name, getattr(self, name)[on_device])
        if self.free is not None:
            self.free = self.free[on_device]


def synthesize_shard(
    teacher: Teacher,
    orders: Orders,
    settings: SynthesisSettings,
    on_finished: Callable[[int], None] | None = None,
    term: FeatureTerm | None = None,
) -> Impressions:
    """Optimise starts until the teacher answers them with their targets (ZSKD equation 5).

    Args:
        teacher: on the device to use.
        orders: targets, starts and weights.
        settings: the schedule.
        on_finished: called with the number of images that left at a step.
        term: added to the objective, if given.

    Raises:
        UserError: the teacher's answer or its gradient is not finite.
    """
    spec, device, starts, targets = teacher.spec, teacher.device, orders.starts, orders.targets
    count = len(targets)
    result_images = torch.empty_like(starts)
    result_logits = torch.empty(count, targets.shape[1])
    result_fit, result_steps = torch.empty(count), torch.zeros(count, dtype=torch.int32)
    slots = _Slots(min(settings.slots, count), device, orders)
    following = len(slots.index)  # the next image of the shard that waits for a slot
    # Without a reason to leave early all images of a batch leave together, and one of them tells when.
    smallest, largest = settings.step_limits
    together = settings.tolerance is None and not settings.patience and smallest == largest
    with_prior = settings.total_variation != (0.0, 0.0)
    value_range = spec.high - spec.low

    while len(slots.index):
        interrupt.check()
        if settings.range == "rescale":
            slots.images = _rescaled(slots.images, slots.age, largest, spec.low, spec.high)
        images = slots.images.requires_grad_(True)
        seen: AbstractContextManager[list[Tensor]] = nullcontext([])
        if term is not None:
            seen = watched(teacher.model, term.point)
        crowd: AbstractContextManager[list[Tensor]] = nullcontext([])
        if settings.batch_statistics:
            crowd = statistics_distances(teacher.model)
        with seen as features, crowd as distances:
            logits = teacher(images)
        fit = soft_target_divergence(logits, slots.targets, slots.temperatures)
        # A logit's pull falls with 1 / T; the factor keeps the balance with the prior alike at every temperature.
        # Adam itself does not mind the scale. A term of the method's own has its weight beside the divergence.
        own = fit if term is None else fit + term.weight * term.value(features[-1])
        if distances:  # of all images together, each of which has its share; the weight is beside the divergence
            own = own + settings.batch_statistics * torch.stack(distances).sum()
        objective = (own * slots.temperatures[:, 0]).sum() / REFERENCE_TEMPERATURE
        if with_prior:
            objective = objective + (slots.prior * total_variation(images / value_range)).sum()
        (gradient,) = torch.autograd.grad(objective, images)
        if slots.free is not None:
            gradient = gradient * slots.free
        slots.images = images.detach()
        fit, logits = fit.detach(), logits.detach()

        leaving = slots.age >= slots.limits
        if settings.tolerance is not None:
            leaving |= fit <= settings.tolerance
        if settings.patience:
            better = fit < slots.best * _STANDSTILL
            slots.best = torch.where(better, fit, slots.best)
            slots.best_age = torch.where(better, slots.age, slots.best_age)
            leaving |= slots.age - slots.best_age >= settings.patience
        if together and not bool(slots.age[0] >= slots.limits[0]):
            rows = torch.empty(0, dtype=torch.long)
        else:
            rows = leaving.nonzero().flatten().cpu()

        if len(rows):
            done, on_device = slots.index[rows], rows.to(device)
            result_images[done] = slots.images[on_device].cpu()
            result_logits[done] = logits[on_device].float().cpu()
            result_fit[done] = fit[on_device].float().cpu()
            result_steps[done] = slots.age[on_device].to(torch.int32).cpu()
            if not torch.isfinite(result_fit[done]).all() or not torch.isfinite(result_images[done]).all():
                raise UserError(
                    f"Synthesis diverged: the teacher's answer is not finite after {int(result_steps[done].max())} "
                    f"steps. A smaller synthesis.learning_rate (now {settings.learning_rate}) usually mends it."
                )
            if on_finished is not None:
                on_finished(len(rows))

        if not (settings.warm_start and len(rows)):  # a warm start goes on from the images as they were kept
            _adam_step(slots, gradient, settings.learning_rate * value_range)
            if settings.range == "clamp":
                slots.images.clamp_(spec.low, spec.high)
        if len(rows):
            fresh = torch.arange(following, min(count, following + len(rows)))
            following += len(fresh)
            if len(fresh):
                slots.refill(rows[: len(fresh)], fresh, orders, settings.warm_start)
            if len(fresh) < len(rows):
                stay = torch.ones(len(slots.index), dtype=torch.bool)
                stay[rows[len(fresh) :]] = False
                slots.keep(stay.nonzero().flatten())
    return Impressions(result_images, targets, result_logits, result_fit, result_steps)


def _adam_step(slots: _Slots, gradient: Tensor, learning_rate: float) -> None:
    """Adam (Kingma & Ba 2015, algorithm 1) with a step count for each slot."""
    slots.age += 1
    slots.adam_step += 1
    slots.first.lerp_(gradient, 1 - BETA1)
    slots.second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    correction1 = (1 - BETA1**slots.adam_step).view(-1, 1, 1, 1)
    correction2 = (1 - BETA2**slots.adam_step).view(-1, 1, 1, 1)
    denominator = (slots.second / correction2).sqrt_().add_(EPSILON)
    slots.images.sub_(slots.first / denominator * (learning_rate / correction1))


def _rescaled(images: Tensor, age: Tensor, max_steps: int, low: float, high: float) -> Tensor:
    """The authors' whole-batch rescaling by the extremes, left out before the last step and the final answer."""
    if bool(age[0] >= max_steps - 1):
        return images
    smallest, largest = images.min(), images.max()
    return low + (images - smallest) / (largest - smallest).clamp_min(1e-12) * (high - low)
