"""Losses of distillation and synthesis: pure functions of tensors."""

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

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
        >>> distillation_loss(logits, logits, 20).item()
        0.0
        >>> distillation_loss(torch.zeros(1, 3), logits, 20) > 0
        tensor(True)
    """
    return temperature**2 * _mean_divergence(student, teacher, temperature)


def _mean_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``KL(softmax(teacher / T) || softmax(student / T))``, mean over the batch."""
    log_student = functional.log_softmax(student / temperature, 1)
    log_teacher = functional.log_softmax(teacher / temperature, 1)
    return functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def soft_target_divergence(logits: Tensor, targets: Tensor, temperature: float | Tensor) -> Tensor:
    """``KL(targets || softmax(logits / T))`` of each row: ``(N, K), (N, K), scalar or (N, 1) -> (N,)``.

    It differs from the cross-entropy of ZSKD's equation 5 by the entropy of the targets. Its gradient is the same, and
    it is 0 where the prediction equals the target.

    Example:
        >>> logits = torch.tensor([[1.0, 3.0]])
        >>> soft_target_divergence(logits, (logits / 2).softmax(1), 2)
        tensor([0.])
    """
    log_probabilities = functional.log_softmax(logits / temperature, 1)
    return functional.kl_div(log_probabilities, targets, reduction="none").sum(1)


def total_variation(images: Tensor, knee: float = 0.05) -> Tensor:
    """Sum of Huber's loss of the differences of neighbouring pixels: ``(N, C, H, W) -> (N,)``.

    Quadratic below ``knee`` (``d^2 / 2 knee``), linear above it (``|d| - knee / 2``), so that a sharp edge costs no
    more than a smooth one of the same height.

    Example:
        >>> edge = torch.tensor([[[[0.0, 1.0]]]])
        >>> total_variation(edge)
        tensor([0.9750])
    """

    def huber(difference: Tensor) -> Tensor:
        losses = functional.huber_loss(difference, torch.zeros_like(difference), reduction="none", delta=knee)
        return losses.sum((1, 2, 3))

    down, right = images[:, :, 1:] - images[:, :, :-1], images[:, :, :, 1:] - images[:, :, :, :-1]
    return (huber(down) + huber(right)) / knee


def channel_moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, over images and positions: ``(N, C, ...) -> (C,), (C,)`` float32.

    Example:
        >>> channel_moments(torch.tensor([[[1.0, 3.0]]]))
        (tensor([2.]), tensor([1.]))
    """
    features, over = features.float(), [0, *range(2, features.ndim)]
    mean = features.mean(over, keepdim=True)
    variance = (features - mean).square().mean(over)  # with its gradient, on a CPU, 2/3 of the time of var()
    return mean.flatten(), variance


def statistics_distance(found_mean: Tensor, found_variance: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Distance of the channels' means and variances from given ones: ``(C,)`` each ``-> scalar``.

    ``|found_mean - mean|_2 + |found_variance - variance|_2`` (DeepInversion, equation 4).
    The variances are the biased ones.
    """
    return (found_mean - mean).norm() + (found_variance - variance).norm()


def belief_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, over: str = "elements") -> Tensor:
    """``KL(softmax(teacher / T) || softmax(student / T))``, teacher first (ZSKT, equation 1), as a scalar.

    Args:
        student: logits ``(N, K)``.
        teacher: logits ``(N, K)``.
        temperature: T > 0; there is no factor T^2.
        over: the mean is taken over all N * K ``elements``, as ZSKT's released code does, or over ``images``.

    Example:
        >>> student, teacher = torch.zeros(2, 4), torch.eye(2, 4)
        >>> belief_divergence(student, teacher) * 4 == belief_divergence(student, teacher, over="images")
        tensor(True)
    """
    divergence = _mean_divergence(student, teacher, temperature)
    return divergence / student.shape[1] if over == "elements" else divergence


def feature_loss(student: Tensor, teacher: Tensor, variance: Tensor | None = None) -> Tensor:
    """Mean squared difference of two layers' outputs over the teacher's variance: ``(N, ...), (N, ...) -> scalar``.

    A student that gives the teacher's mean output for every image has a loss of 1. The variance over the batch is
    computed for each element of the output and then averaged.

    Args:
        student: outputs of a layer.
        teacher: outputs of the same shape, for the same images.
        variance: of the whole batch, a scalar, if these images are only a part of it.

    Example:
        >>> teacher = torch.tensor([[1.0], [3.0]])
        >>> feature_loss(torch.full((2, 1), 2.0), teacher)
        tensor(1.)
    """
    if variance is None:
        variance = (teacher - teacher.mean(0)).square().mean()  # four times as fast as Tensor.var over the images
    return functional.mse_loss(student, teacher) / variance.clamp_min(1e-12)


def attention_map(features: Tensor) -> Tensor:
    """Mean of the squared channels, flattened, of length 1: ``(N, C, H, W) -> (N, H * W)`` (ZSKT, section 3.2).

    Example:
        >>> attention_map(torch.tensor([[[[2.0, 0.0]], [[2.0, 0.0]]]]))
        tensor([[1., 0.]])
    """
    return functional.normalize(_with_gradient_in_same_layout(features).square().mean(1).flatten(1), dim=1)


def _with_gradient_in_same_layout(features: Tensor) -> Tensor:
    # The gradient of a mean over channels is channels-first. Added to the gradient of a channels-last network, it makes
    # the whole residual path before it run in two memory layouts, which is slow.
    if not features.requires_grad or not features.is_contiguous(memory_format=torch.channels_last):
        return features
    seen = features.view_as(features)
    seen.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
    return seen


def attention_loss(student: Tensor, teacher: Tensor, distance: str = "squared-mean") -> Tensor:
    """Distance of two attention maps of the same spatial size: ``(N, C, H, W), (N, C', H, W) -> scalar``.

    Args:
        student: features.
        teacher: features; any number of channels.
        distance: ``squared-mean`` over images and positions, as ZSKT's released code has it, or ``norm``, the L2
            norm of each image's difference as in the paper, mean over the images.
    """
    return attention_distance(attention_map(student), attention_map(teacher), distance)


def attention_distance(student: Tensor, teacher: Tensor, distance: str = "squared-mean") -> Tensor:
    """:func:`attention_loss` of given maps: ``(N, H * W), (N, H * W) -> scalar``."""
    difference = student - teacher
    if distance == "squared-mean":
        return difference.square().mean()
    return difference.norm(dim=1).mean()
