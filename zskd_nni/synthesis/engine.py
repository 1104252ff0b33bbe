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

from zskd_nni.models.hooks import FeaturePoint, watched
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime import signals
from zskd_nni.runtime.device import to_device
from zskd_nni.runtime.errors import UserError
from zskd_nni.synthesis.batch_norm_statistics import Crowd, batch_norms
from zskd_nni.synthesis.settings import SynthesisSettings
from zskd_nni.training.losses import soft_target_divergence, total_variation

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
    """The state of the images in flight; every tensor has one row a slot, on the device but for ``index`` and ``due``.

    Which images leave by their step limit is known beforehand, so that no step has to wait for the device to tell.
    """

    _ORDERED = ("targets", "temperatures", "prior")
    _ROWS = ("images", *_ORDERED, "first", "second", "age", "adam_step", "best", "best_age")

    def __init__(self, count: int, device: torch.device, orders: Orders) -> None:
        self.device, self.orders = device, orders  # which lie on the device but for the limits
        self.index = torch.arange(count)  # which image of the shard
        self.due = orders.limits[:count].long()  # at which turn of the engine each leaves at the latest
        self.images = orders.starts[:count].clone()  # the caller's stay as they are
        self.targets = orders.targets[:count].clone()
        self.temperatures = orders.temperatures[:count].clone()
        self.prior = orders.prior[:count].clone()
        self.free = None if orders.free is None else orders.free[:count].clone()
        self.first = torch.zeros_like(self.images)  # Adam's moments
        self.second = torch.zeros_like(self.images)
        self.age = torch.zeros(count, device=device)  # steps of this image
        self.adam_step = torch.zeros(count, device=device)  # steps of this Adam state
        self.best = torch.full((count,), float("inf"), device=device)
        self.best_age = torch.zeros(count, device=device)

    def refill(self, rows: Tensor, index: Tensor, warm: bool, turn: int) -> None:
        """Put images ``index`` of the shard into these rows; ``turn`` is that of their first step."""
        orders = self.orders
        self.index[rows] = index
        self.due[rows] = turn + orders.limits[index].long()
        rows, index = to_device(rows, self.device), to_device(index, self.device)
        for name in self._ORDERED:
            getattr(self, name)[rows] = getattr(orders, name)[index]
        if self.free is not None and orders.free is not None:
            self.free[rows] = orders.free[index]
        self.age[rows] = 0
        self.best[rows] = float("inf")
        self.best_age[rows] = 0
        if not warm:
            self.images[rows] = orders.starts[index]
            self.first[rows] = 0
            self.second[rows] = 0
            self.adam_step[rows] = 0

    def keep(self, rows: Tensor) -> None:
        self.index, self.due = self.index[rows], self.due[rows]
        rows = to_device(rows, self.device)
        for name in self._ROWS:
            setattr(self, name, getattr(self, name)[rows])
        if self.free is not None:
            self.free = self.free[rows]


class _Results:
    """What has left, in the order of the shard, on the device: nothing waits for it to be copied."""

    def __init__(self, orders: Orders, device: torch.device) -> None:
        count = len(orders.targets)
        self.images, self.logits = torch.zeros_like(orders.starts), torch.zeros_like(orders.targets)
        self.fit, self.steps = torch.zeros(count, device=device), torch.zeros(count, dtype=torch.int32, device=device)

    def require_finite(self, learning_rate: float) -> None:
        """Refuse what has diverged; waits for the device."""
        if not torch.isfinite(self.fit).all() or not torch.isfinite(self.images).all():
            raise UserError(
                f"Synthesis diverged: the teacher's answer is not finite after {int(self.steps.max())} steps. A "
                f"smaller synthesis.learning_rate (now {learning_rate}) usually mends it."
            )


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
    spec, device, count, asked = teacher.spec, teacher.device, len(orders.targets), orders.targets
    orders = Orders(
        targets=asked.to(device),
        starts=orders.starts.to(device),
        temperatures=orders.temperatures.to(device),
        prior=orders.prior.to(device),
        limits=orders.limits,
        free=None if orders.free is None else orders.free.to(device),
    )
    results = _Results(orders, device)
    slots = _Slots(min(settings.slots, count), device, orders)
    following = len(slots.index)  # the next image of the shard that waits for a slot
    early = settings.tolerance is not None or bool(settings.patience)
    turn = 0
    with_prior = settings.total_variation != (0.0, 0.0)
    value_range = spec.high - spec.low
    crowd = Crowd(teacher.model) if settings.batch_statistics and batch_norms(teacher.model) else None

    while len(slots.index):
        signals.check()
        # The authors' code leaves the rescaling out before the last step and the final answer.
        if settings.range == "rescale" and int(slots.due[0]) - turn > 1:
            slots.images = _rescaled(slots.images, spec.low, spec.high)
        images = slots.images.requires_grad_(True)
        seen: AbstractContextManager[list[Tensor]] = nullcontext([])
        if term is not None:
            seen = watched(teacher.model, term.point)
        watching: AbstractContextManager[list[Tensor]] = nullcontext([])
        if crowd is not None:
            watching = crowd.watching()
        with seen as features, watching as distances:
            logits = teacher(images)
        fit = soft_target_divergence(logits, slots.targets, slots.temperatures)
        # A logit's pull falls with 1 / T; the factor keeps the balance with the prior alike at every temperature.
        # Adam itself does not mind the scale. A term of the method's own has its weight beside the divergence.
        own = fit if term is None else fit + term.weight * term.value(features[-1])
        if crowd is not None:  # of all images together, each of which has its share, whoever else is in flight
            share = (len(own) + crowd.left) / len(own)
            own = own + settings.batch_statistics * share * torch.stack(distances).sum()
        objective = (own * slots.temperatures[:, 0]).sum() / REFERENCE_TEMPERATURE
        if with_prior:
            objective = objective + (slots.prior * total_variation(images / value_range)).sum()
        (gradient,) = torch.autograd.grad(objective, images)
        if slots.free is not None:
            gradient = gradient * slots.free
        slots.images = images.detach()
        fit, logits = fit.detach(), logits.detach()

        leaving = slots.due <= turn
        if early:
            leaving |= _satisfied(slots, fit, settings).cpu()
        rows = leaving.nonzero().flatten()

        if len(rows):
            done, on_device = to_device(slots.index[rows], device), to_device(rows, device)
            results.images[done] = slots.images[on_device]
            results.logits[done] = logits[on_device].float()
            results.fit[done] = fit[on_device].float()
            results.steps[done] = slots.age[on_device].to(torch.int32)
            if device.type == "cpu":  # elsewhere at the end of the shard
                results.require_finite(settings.learning_rate)
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
                slots.refill(rows[: len(fresh)], fresh, settings.warm_start, turn + 1)
            if len(fresh) < len(rows):
                stay = torch.ones(len(slots.index), dtype=torch.bool)
                stay[rows[len(fresh) :]] = False
                if crowd is not None:
                    crowd.leave(to_device(rows[len(fresh) :], device))
                slots.keep(stay.nonzero().flatten())
        turn += 1
    results.require_finite(settings.learning_rate)
    made = (values.cpu() for values in (results.logits, results.fit, results.steps))
    return Impressions(results.images.cpu(), asked, *made)


def _satisfied(slots: _Slots, fit: Tensor, settings: SynthesisSettings) -> Tensor:
    """``(slots,)`` which images have reached their target, or have come to a standstill."""
    leaving = torch.zeros_like(fit, dtype=torch.bool)
    if settings.tolerance is not None:
        leaving |= fit <= settings.tolerance
    if settings.patience:
        better = fit < slots.best * _STANDSTILL
        slots.best = torch.where(better, fit, slots.best)
        slots.best_age = torch.where(better, slots.age, slots.best_age)
        leaving |= slots.age - slots.best_age >= settings.patience
    return leaving


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


def _rescaled(images: Tensor, low: float, high: float) -> Tensor:
    """The authors' rescaling of a whole batch by its extremes."""
    smallest, largest = images.min(), images.max()
    return low + (images - smallest) / (largest - smallest).clamp_min(1e-12) * (high - low)
