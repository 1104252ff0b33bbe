"""Losses of distillation: pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, mean over the batch.

    Hinton et al. 2015, section 2; the student's loss of ZSKD (equation 6) without the label term.

    Args:
        student: logits ``(N, K)``.
        teacher: logits ``(N, K)``.
        temperature: T > 0.
    """
    log_student = functional.log_softmax(student / temperature, 1)
    log_teacher = functional.log_softmax(teacher / temperature, 1)
    return temperature**2 * functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def soft_target_divergence(logits: Tensor, targets: Tensor, temperature: float | Tensor) -> Tensor:
    """``KL(targets || softmax(logits / T))`` of each row: ``(N, K), (N, K), scalar or (N, 1) -> (N,)``.

    It differs from the cross-entropy of ZSKD's equation 5 by the targets' entropy alone, so that its gradient is
    the same and its value is 0 where the fit is perfect.
    """
    log_probabilities = functional.log_softmax(logits / temperature, 1)
    return functional.kl_div(log_probabilities, targets, reduction="none").sum(1)


def total_variation(images: Tensor, knee: float = 0.05) -> Tensor:
    """Sum of Huber's loss of the differences of neighbouring pixels: ``(N, C, H, W) -> (N,)``.

    Quadratic below ``knee`` (``d^2 / 2 knee``), linear above it (``|d| - knee / 2``), so that edges are not punished
    for being sharp.
    """

    def huber(difference: Tensor) -> Tensor:
        return functional.huber_loss(difference, torch.zeros_like(difference), reduction="none", delta=knee).sum(
            (1, 2, 3)
        )

    down, right = images[:, :, 1:] - images[:, :, :-1], images[:, :, :, 1:] - images[:, :, :, :-1]
    return (huber(down) + huber(right)) / knee


def channel_moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, over images and positions: ``(N, C, ...) -> (C,), (C,)`` float32."""
    features, over = features.float(), [0, *range(2, features.ndim)]
    mean = features.mean(over, keepdim=True)
    variance = (features - mean).square().mean(over)  # on a CPU in two thirds of what var() takes with its gradient
    return mean.flatten(), variance


def statistics_distance(found: Tensor, spread: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """How far the channels' means and variances of some images are from others: ``(C,)`` each ``-> scalar``.

    ``|found - mean|_2 + |spread - variance|_2`` (DeepInversion, equation 4); the variances are the biased ones.
    """
    return (found - mean).norm() + (spread - variance).norm()


def belief_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, over: str = "elements") -> Tensor:
    """``KL(softmax(teacher / T) || softmax(student / T))``, teacher first (ZSKT, equation 1), as a scalar.

    Args:
        student: logits ``(N, K)``.
        teacher: logits ``(N, K)``.
        temperature: T > 0; there is no factor T^2.
        over: the mean is taken over all N * K ``elements``, as ZSKT's released code does, or over ``images``.
    """
    log_student = functional.log_softmax(student / temperature, 1)
    log_teacher = functional.log_softmax(teacher / temperature, 1)
    divergence = functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return divergence / student.shape[1] if over == "elements" else divergence


def feature_loss(student: Tensor, teacher: Tensor, variance: Tensor | None = None) -> Tensor:
    """Mean squared difference of two layers' outputs over the teacher's variance: ``(N, ...), (N, ...) -> scalar``.

    1 is as bad as answering every image with the teacher's mean. The variance is taken over the batch, for each number
    by itself, and then averaged.

    Args:
        student: outputs of a layer.
        teacher: outputs of the same shape, for the same images.
        variance: that of a larger batch, a scalar, where these images are a part of one.
    """
    if variance is None:
        variance = teacher.var(0, unbiased=False).mean()
    return functional.mse_loss(student, teacher) / variance.clamp_min(1e-12)


def attention_map(features: Tensor) -> Tensor:
    """Mean of the squared channels, flattened, of length 1: ``(N, C, H, W) -> (N, H * W)`` (ZSKT, section 3.2)."""
    return functional.normalize(_with_gradient_laid_out_alike(features).square().mean(1).flatten(1), dim=1)


def _with_gradient_laid_out_alike(features: Tensor) -> Tensor:
    # A mean over channels sends back a gradient with the channels first. Added to that of a network whose channels lie
    # last, it makes the whole residual path behind it run in two layouts at once, which is slow.
    if not features.requires_grad or not features.is_contiguous(memory_format=torch.channels_last):
        return features
    seen = features.view_as(features)
    seen.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
    return seen


def attention_loss(student: Tensor, teacher: Tensor, distance: str = "squared-mean") -> Tensor:
    """How far two attention maps of the same spatial size are apart: ``(N, C, H, W), (N, C', H, W) -> scalar``.

    Args:
        student: features.
        teacher: features; any number of channels.
        distance: ``squared-mean`` over images and positions, as ZSKT's released code has it, or ``norm``, the L2
            norm of each image's difference as in the paper, mean over the images.
    """
    return attention_distance(attention_map(student), attention_map(teacher), distance)


def attention_distance(student: Tensor, teacher: Tensor, distance: str = "squared-mean") -> Tensor:
    """:func:`attention_loss` of maps that are there already: ``(N, H * W), (N, H * W) -> scalar``."""
    difference = student - teacher
    if distance == "squared-mean":
        return difference.square().mean()
    return difference.norm(dim=1).mean()
