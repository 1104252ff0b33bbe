"""Metrics of classifiers: functions of logits and labels, and the mean transition error of two networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from zskd_nni.models.hooks import evaluating
from zskd_nni.models.teacher import Teacher, first_tensor
from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError

Network = Callable[[Tensor], Tensor]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label, in percent: ``(N, K), (N,) -> [0, 100]``.

    Example:
        >>> accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0]))
        75.0
    """
    return 100.0 * (logits.argmax(1) == labels).double().mean().item()


def agreement(first: Tensor, second: Tensor) -> float:
    """Share of rows on which two networks choose the same class: ``(N, K), (N, K) -> [0, 1]``.

    Example:
        >>> agreement(torch.eye(4), 2 * torch.eye(4))
        1.0
    """
    return (first.argmax(1) == second.argmax(1)).double().mean().item()


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """How often each class (row) is taken for each (column): ``(N, K), (N,) -> (K, K)`` int64 counts.

    Example:
        >>> confusion(torch.eye(2)[[0, 0, 1]], torch.tensor([0, 1, 1]))
        tensor([[1, 0],
                [1, 1]])
    """
    classes = logits.shape[1]
    pairs = labels * classes + logits.argmax(1)
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean distance of confidence and accuracy, in [0, 1] (Guo et al. 2017, equation 3).

    Images are sorted into bins of equal width by the probability of the chosen class: bin ``b`` of ``B`` holds
    ``(b / B, (b + 1) / B]``. The distance of mean confidence and accuracy in each bin is weighted by its share.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)``.
        bins: their number.

    Raises:
        ValueError: no images or no bins.

    Example:
        >>> expected_calibration_error(torch.zeros(2, 2), torch.tensor([0, 0]))  # half sure, always right
        0.5
    """
    if bins < 1 or len(logits) == 0:
        raise ValueError("a calibration error needs at least one image and one bin")
    confidence, chosen = logits.double().softmax(1).max(1)
    right = (chosen == labels).double()
    index = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=logits.device).index_add_(0, index, confidence - right)
    return float(gap.abs().sum() / len(logits))


def _logits(network: Network | Teacher, images: Tensor) -> Tensor:
    """Logits of normalised images; of a copy, as a network may change its input in place."""
    images = images.clone()
    if isinstance(network, Teacher):  # called itself it would normalise once more
        return network.output(network.model(images))
    return first_tensor(network(images))


def transition_curves(
    followed: Network | Teacher,
    other: Network | Teacher,
    images: Tensor,
    targets: Tensor,
    steps: int = 100,
    step_size: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Probabilities of ``targets`` while images move towards them by steps along a gradient (ZSKT, algorithm 2).

    ``x_0 = x``; at every step ``p^A(x_k)`` and ``p^B(x_k)`` of the target are recorded, and then
    ``x_{k+1} = x_k - xi * d CE(A(x_k), target) / dx``: the raw gradient, without sign, norm, clipping or range. The
    loss is summed over the batch, so that every image takes the step it would take alone.

    Args:
        followed: A, the network whose gradient is followed (the student); takes what networks see, normalised
            images; tuples and mappings are understood, and so is a :class:`Teacher`. Both are run in ``eval()`` mode.
        other: B, the network beside it (the teacher).
        images: ``(N, C, H, W)``, normalised, on the networks' device.
        targets: ``(N,)`` the class that each image moves towards.
        steps: K.
        step_size: xi.

    Returns:
        ``(N, K)`` probabilities by A and by B, on the CPU.
    """
    at = images.detach().clone()
    rows, targets = torch.arange(len(at), device=at.device), targets.to(at.device)
    first, second = [], []
    with evaluating(followed, other), torch.enable_grad():
        for step in range(steps):
            signals.check()
            at.requires_grad_(True)
            logits = _logits(followed, at)
            with torch.no_grad():
                first.append(logits.softmax(1)[rows, targets])
                second.append(_logits(other, at).softmax(1)[rows, targets])
            if step + 1 < steps:
                (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, targets, reduction="sum"), at)
                at = at.detach() - step_size * gradient
    return torch.stack(first, 1).cpu(), torch.stack(second, 1).cpu()


@dataclass(frozen=True)
class TransitionResult:
    """The mean transition error and what it was measured on.

    Attributes:
        error: in [0, 1].
        images: how many images were used.
        steps: K.
        step_size: xi; the error's size depends on both.
        followed: ``(K,)`` mean probability of the target by the network whose gradient was followed.
        other: ``(K,)`` by the other.
    """

    error: float
    images: int
    steps: int
    step_size: float
    followed: Tensor
    other: Tensor


def mean_transition_error(
    followed: Network | Teacher,
    other: Network | Teacher,
    images: Tensor,
    *,
    steps: int = 100,
    step_size: float = 1.0,
    limit: int | None = 1000,
    labels: Tensor | None = None,
    batch: int = 1000,
) -> TransitionResult:
    """Mean distance of two networks' probabilities along all transitions (ZSKT, equation 4).

    ``MTE(A, B) = 1/N sum_n 1/(C-1) sum_{j != i} 1/K sum_k |p_j^A(x_k) - p_j^B(x_k)|`` over images on which A and B
    choose the same class i, right or wrong.

    Args:
        followed: A, the student; see :func:`transition_curves`.
        other: B, the teacher.
        images: ``(N, C, H, W)``, normalised, in the order in which agreed ones are taken.
        steps: K (the paper: 100).
        step_size: xi (the paper: 1).
        limit: at most so many images (the paper: 1,000); None takes all.
        labels: ``(N,)`` true labels; with them the targets of an image are the ``C - 1`` classes beside its true
            one, as in the released code. This differs where both networks make the same mistake.
        batch: transitions in a batch; an image has C - 1.

    Raises:
        UserError: the networks agree on no image.
    """
    with evaluating(followed, other), torch.no_grad():
        answers = [
            torch.cat([_logits(network, part).argmax(1) for part in images.split(batch)])
            for network in (followed, other)
        ]
        classes = _logits(followed, images[:1]).shape[1]
    agreed = (answers[0] == answers[1]).nonzero().flatten()[:limit]
    if len(agreed) == 0:
        raise UserError("The two networks agree on no image, so that there is no transition error to measure.")
    origin = (answers[0] if labels is None else labels.to(answers[0].device))[agreed]
    targets = ((origin[:, None] + torch.arange(1, classes, device=origin.device)) % classes).flatten()
    index = agreed.repeat_interleave(classes - 1)
    total, means = 0.0, torch.zeros(2, steps, dtype=torch.float64)
    for part, goal in zip(index.split(batch), targets.split(batch), strict=True):
        curves = transition_curves(followed, other, images[part], goal, steps, step_size)
        total += float((curves[0] - curves[1]).abs().double().sum())
        means += torch.stack([curve.double().sum(0) for curve in curves])
    means /= len(index)
    return TransitionResult(total / (len(index) * steps), len(agreed), steps, step_size, means[0], means[1])
