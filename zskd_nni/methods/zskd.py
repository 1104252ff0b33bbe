"""ZSKD: Zero-Shot Knowledge Distillation in Deep Networks (Nayak et al., ICML 2019, PMLR 97:4743-4751).

Everything comes from the teacher T with the classifier weights w_1, ..., w_K:

    C(i, j) = <w_i, w_j> / (|w_i| |w_j|)                  class similarity                              (equation 2)
    alpha_k = beta minmax(c_k)                            concentration of class k, c_k a row of C      (equation 3)
    y ~ Dir(alpha_k)                                      soft target                                   (equation 4)
    x = argmin_x H(y, softmax(T(x) / tau))                data impression                               (equation 5)
    theta = argmin sum_x H(softmax(T(x) / tau), softmax(S(x; theta) / tau))    student                  (equation 6)

This file draws the targets y. :mod:`zskd_nni.synthesis.engine` optimises the images x, and
:mod:`zskd_nni.training.distillation` trains the student S.

What the paper fixes: cosine similarity without bias, min-max within each row, beta 1.0 for half of the impressions and
0.1 for the other half, temperature tau = 20 throughout, no image prior, and 24,000 / 48,000 / 40,000 impressions for
MNIST / Fashion-MNIST / CIFAR-10.

What its released code does instead (preset ``author-code``): the two matrices of beta 1 and 0.1 are min-max scaled by
row once more, which cancels beta, so that every target is drawn with beta 1. 1e-4 is added to every concentration. A
batch starts from the last batch's images and Adam state. It is rescaled by its extremes before every step.

What we chose is in the presets' comments.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from zskd_nni.data.sources import StoredSource
from zskd_nni.methods.from_targets import ImpressionMethod
from zskd_nni.methods.registry import TransferRequest
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.validation import Bounds, Settings

# Less is zero in single precision.
Floor = Annotated[float, Bounds("must be positive (at least 1e-30)", lambda value: 1e-30 <= value < inf)]


@dataclass(frozen=True)
class ZskdSettings(Settings):
    """Which soft targets are drawn.

    Attributes:
        betas: scales of the concentration; each is used for an equal share of the impressions.
        floor: added to every concentration, so that all are positive (authors' code: 1e-4).
        cancel_beta: min-max scale each row once more after the scaling by beta, as the authors' code does.
        order: ``interleaved`` takes classes and betas in turn; ``rows`` makes all impressions of a class and a beta
            one after the other, as the authors' code does.

    Raises:
        ValueError: no beta, or a beta or a floor that is not positive.
    """

    betas: tuple[float, ...] = (1.0, 0.1)
    floor: Floor = 1e-4
    cancel_beta: bool = False
    order: Annotated[str, Bounds("is interleaved or rows", ("interleaved", "rows").__contains__)] = "interleaved"

    def __post_init__(self) -> None:
        if not self.betas or not all(0 < beta < inf for beta in self.betas):
            raise ValueError(f"beta must be positive, not {list(self.betas)}")
        super().__post_init__()


def class_similarity(weights: Tensor) -> Tensor:
    """Cosine similarity of classes (equation 2): ``(K, D) -> (K, K)`` in [-1, 1].

    Args:
        weights: rows of the teacher's last layer, bias left out.

    Raises:
        UserError: a row is all zero, so that its class has no direction.

    Example:
        >>> class_similarity(torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
        tensor([[ 1.,  0., -1.],
                [ 0.,  1.,  0.],
                [-1.,  0.,  1.]])
    """
    norms = weights.norm(dim=1, keepdim=True)
    if bool((norms == 0).any()):
        empty = int((norms.flatten() == 0).nonzero()[0])
        raise UserError(f"Class {empty} of the teacher has an all-zero classifier row: it resembles no class.")
    unit = weights / norms
    return (unit @ unit.T).clamp(-1, 1)


def row_min_max(matrix: Tensor) -> Tensor:
    """Each row scaled to [0, 1] by its extremes: ``(K, K) -> (K, K)``; a constant row becomes 1 on the diagonal."""
    smallest = matrix.min(1, keepdim=True).values
    spread = matrix.max(1, keepdim=True).values - smallest
    scaled = (matrix - smallest) / spread.clamp_min(1e-12)
    return torch.where(spread > 1e-12, scaled, torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))


def concentrations(similarity: Tensor, beta: float, settings: ZskdSettings | None = None) -> Tensor:
    """Concentration vectors of all classes (equation 3): ``(K, K) -> (K, K)``, row k is ``beta minmax(c_k) + floor``.

    Args:
        similarity: rows c_k in [-1, 1].
        beta: scale, above 0.
        settings: the floor and the authors' variant; the defaults if absent.

    Example:
        >>> similarity = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])
        >>> concentrations(similarity, 0.1, ZskdSettings(floor=0.01))
        tensor([[0.1100, 0.0600, 0.0100],
                [0.0100, 0.1100, 0.0100],
                [0.0100, 0.0600, 0.1100]])
    """
    settings = settings or ZskdSettings()
    scaled = beta * row_min_max(similarity)
    if settings.cancel_beta:
        scaled = row_min_max(scaled)
    return scaled + settings.floor


def sample_targets(concentration: np.ndarray, seed: int) -> np.ndarray:
    """One Dirichlet draw (equation 4) for each row: ``(N, K) -> (N, K)``, rows of probabilities.

    Args:
        concentration: rows alpha, all above 0.
        seed: of the draws.

    Example:
        >>> targets = sample_targets(np.array([[5.0, 1.0, 1.0], [0.1, 0.1, 0.1]]), seed=0)
        >>> targets.shape, targets.sum(1).round(6)
        ((2, 3), array([1., 1.]))
    """
    random = np.random.default_rng(seed)
    # A Dirichlet draw is a normalised vector of gamma draws. With tiny concentrations all of these may underflow to
    # zero; their logarithms do not: G(a) = G(a + 1) * U^(1/a).
    logs = np.log(random.standard_gamma(concentration + 1)) + np.log(random.random(concentration.shape)) / concentration
    logs -= logs.max(1, keepdims=True)
    draws = np.exp(logs)
    draws /= draws.sum(1, keepdims=True)
    # Values that are denormal in float32 would depend on whether the CPU flushes denormals.
    return np.where(draws < 1e-30, 0.0, draws)


class ZskdTargets:
    """The soft targets of a set of impressions.

    Args:
        teacher: the similarity is that of its classifier's weights.
        settings: betas and variants.

    Attributes:
        similarity: ``(K, K)`` class similarity.
    """

    def __init__(self, teacher: Teacher, settings: ZskdSettings) -> None:
        self.settings = settings
        self.classes = teacher.num_classes
        self.similarity = class_similarity(teacher.class_weights().cpu())  # equation 2
        # Equation 3, (betas, K, K).
        self._concentrations = torch.stack([concentrations(self.similarity, beta, settings) for beta in settings.betas])
        self.identity: dict[str, Any] = {"method": "zskd", **asdict(settings)}

    def rows(self, first: int, count: int, total: int) -> tuple[Tensor, Tensor]:
        """Classes ``(count,)`` and indices of beta ``(count,)`` of impressions ``first`` to ``first + count``."""
        index = torch.arange(first, first + count)
        if self.settings.order == "rows":
            row = index * (len(self.settings.betas) * self.classes) // total
            return row % self.classes, row // self.classes
        return index % self.classes, index // self.classes % len(self.settings.betas)

    def targets(self, first: int, count: int, total: int, seed: int) -> Tensor:
        """``(count, K)`` float32 soft targets."""
        classes, betas = self.rows(first, count, total)
        drawn = sample_targets(self._concentrations[betas, classes].double().numpy(), seed)  # equation 4
        return torch.from_numpy(drawn).float()


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # The paper: no prior, temperature 20, noise start, new noise and a new optimiser for every image. It leaves the
    # learning rate, the number of steps and the pixel range of MNIST and Fashion-MNIST open. On the validation slice
    # students were four points better with a rate of 0.5 than with 0.05, five better than with 1.0, and as good with
    # 30 steps as with 100.
    "paper": {
        "targets": {"betas": (1.0, 0.1)},
        "synthesis": {"start": "uniform", "range": "clamp", "learning_rate": 0.5, "max_steps": 30},
    },
    # The released code for CIFAR-10: batches of 100, 1,500 steps of Adam at 1e-3, whole-batch rescaling, beta
    # cancelled, 20 rows of 2,000. A row is a shard here, so that each row starts with a new Adam state (theirs keeps
    # one throughout).
    "author-code": {
        "targets": {"betas": (1.0, 0.1), "cancel_beta": True, "order": "rows"},
        "synthesis": {
            "start": "uniform",
            "range": "rescale",
            "learning_rate": 1e-3,
            "max_steps": 1500,
            "warm_start": True,
            "slots": 100,
            "shard": 2000,
        },
    },
    # Chosen on the validation slice; docs/methods/zskd.md explains each part.
    "best": {
        "targets": {"betas": (1.0, 0.1)},
        "synthesis": {
            "temperature": (1.5, 8.0),
            "start": "mixed",
            "hold": 0.7,
            "range": "clamp",
            "learning_rate": 0.05,
            "max_steps": (10, 60),
            "total_variation": (3e-5, 3e-3),
            # Only for a teacher with BatchNorm; docs/methods/zskd-trials.md has the measurement.
            "batch_statistics": 0.1,
        },
    },
    # What `best` means with colour images: a few small steps from images that fill the frame, led by the teacher's
    # BatchNorm statistics where it has such layers. Larger steps lead away from what makes the starts good:
    # docs/methods/zskd-trials.md has the measurements, on CIFAR-10's validation slice.
    "best-colour": {
        "targets": {"betas": (1.0, 0.1)},
        "synthesis": {
            "temperature": (1.5, 6.0),
            "start": "leaves",
            "range": "clamp",
            "learning_rate": 0.0125,
            "max_steps": 16,
            "total_variation": (1e-4, 1e-3),
            "batch_statistics": 0.1,
        },
    },
}


class Zskd(ImpressionMethod):
    """ZSKD as a method of recipes."""

    def source(self, teacher: Teacher, request: TransferRequest) -> StoredSource:
        """As :meth:`ImpressionMethod.source`; with ``order: rows`` a row never shares a shard, nor Adam's state."""
        options = request.options
        if options.targets.order == "rows":
            rows = len(options.targets.betas) * teacher.num_classes
            if request.size % rows:
                raise UserError(
                    f"order: rows makes {rows} rows of impressions, a class and a beta each: the number of impressions "
                    f"must be a multiple of {rows}, not {request.size} (transfer.size, transfer.held_out)."
                )
            shard = request.size // rows
            request = replace(request, options=replace(options, synthesis=replace(options.synthesis, shard=shard)))
        return super().source(teacher, request)


METHOD = Zskd("zskd", ZskdSettings, PRESETS, ZskdTargets)
