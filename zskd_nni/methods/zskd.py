"""ZSKD: Zero-Shot Knowledge Distillation in Deep Networks (Nayak et al., ICML 2019, PMLR 97:4743-4751).

From the teacher alone: the weights of its last layer say how alike it finds its classes (equation 2), Dirichlet
distributions shaped by that likeness give soft targets (equations 3 and 4), images are optimised until the teacher
answers with those targets (equation 5, :mod:`zskd_nni.synthesis`), and the student is distilled on them (equation 6,
:mod:`zskd_nni.training.distillation`).

What the paper fixes: cosine similarity without bias, min-max within each row, beta in {1.0, 0.1} half and half,
temperature 20 throughout, no image prior, 24,000 / 48,000 / 40,000 impressions for MNIST / Fashion-MNIST / CIFAR-10.
What its released code does instead (preset ``author-code``): the two matrices of beta 1 and 0.1 are min-max scaled
once more by row, which cancels beta, so that every target is drawn with beta 1; 1e-4 is added to every concentration;
images of a row start from the last batch's with Adam's state kept; the batch is rescaled by its extremes before every
step. What we chose is in the presets' comments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zskd_nni.data.sources import StoredSource
from zskd_nni.methods.from_targets import impressions_source
from zskd_nni.methods.registry import TransferRequest, preset_options
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError
from zskd_nni.synthesis import SynthesisSettings


@dataclass(frozen=True)
class ZskdSettings:
    """Which soft targets are drawn.

    Attributes:
        betas: scales of the concentration; impressions take them in turn, so that each gets an equal share.
        floor: added to every concentration, which must be positive (authors' code: 1e-4).
        cancel_beta: min-max scale each row once more behind the scaling by beta, as the authors' code does.
        order: ``interleaved`` deals classes and betas out in turn; ``rows`` makes all impressions of a class and a
            beta in one go, as the authors' code does.

    Raises:
        ValueError: no beta, or a beta or a floor that is not positive.
    """

    __pydantic_config__ = {"extra": "forbid"}

    betas: tuple[float, ...] = (1.0, 0.1)
    floor: float = 1e-4
    cancel_beta: bool = False
    order: str = "interleaved"

    def __post_init__(self) -> None:
        if not self.betas or not all(0 < beta < float("inf") for beta in self.betas):
            raise ValueError(f"beta must be positive, not {list(self.betas)}")
        if not 1e-30 <= self.floor < float("inf"):  # less is zero in single precision
            raise ValueError(f"floor must be positive (at least 1e-30), not {self.floor}")
        if self.order not in ("interleaved", "rows"):
            raise ValueError(f"order is interleaved or rows, not {self.order!r}")


def class_similarity(weights: Tensor) -> Tensor:
    """Cosine similarity of classes (equation 2): ``(K, D) -> (K, K)`` in [-1, 1].

    Args:
        weights: rows of the teacher's last layer, bias left out.

    Raises:
        UserError: a row is all zero, so that its class is like none.
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
    """Concentration vectors of all classes (equation 3): row k is ``beta * minmax(c_k) + floor``, ``(K, K)``."""
    settings = settings or ZskdSettings()
    scaled = beta * row_min_max(similarity)
    if settings.cancel_beta:
        scaled = row_min_max(scaled)
    return scaled + settings.floor


def sample_targets(concentration: np.ndarray, seed: int) -> np.ndarray:
    """One Dirichlet draw (equation 4) from each row: ``(N, K) -> (N, K)``, rows of probabilities."""
    random = np.random.default_rng(seed)
    # A Dirichlet draw is a normalised vector of gamma draws. Tiny concentrations underflow all of them to zero now
    # and then; in logarithms they do not: G(a) = G(a + 1) * U^(1/a).
    logs = np.log(random.standard_gamma(concentration + 1)) + np.log(random.random(concentration.shape)) / concentration
    logs -= logs.max(1, keepdims=True)
    draws = np.exp(logs)
    draws /= draws.sum(1, keepdims=True)
    # What float32 holds only as a denormal would depend on whether the CPU flushes denormals.
    return np.where(draws < 1e-30, 0.0, draws)


class ZskdTargets:
    """The plan of soft targets of a set of impressions.

    Args:
        teacher: whose classifier is read.
        settings: betas and variants.

    Attributes:
        similarity: ``(K, K)`` class similarity.
    """

    def __init__(self, teacher: Teacher, settings: ZskdSettings) -> None:
        self.settings = settings
        self.similarity = class_similarity(teacher.class_weights().cpu())
        self.classes = teacher.num_classes
        self._table = torch.stack([concentrations(self.similarity, beta, settings) for beta in settings.betas])
        self.identity: dict[str, Any] = {
            "method": "zskd",
            "betas": list(settings.betas),
            "floor": settings.floor,
            "cancel_beta": settings.cancel_beta,
            "order": settings.order,
        }

    def rows(self, first: int, count: int, total: int) -> tuple[Tensor, Tensor]:
        """Class and index of beta of impressions ``first`` to ``first + count`` out of ``total``: two ``(count,)``."""
        index = torch.arange(first, first + count)
        if self.settings.order == "rows":
            row = index * (len(self.settings.betas) * self.classes) // total
            return row % self.classes, row // self.classes
        return index % self.classes, index // self.classes % len(self.settings.betas)

    def targets(self, first: int, count: int, total: int, seed: int) -> Tensor:
        """``(count, K)`` float32 soft targets."""
        classes, betas = self.rows(first, count, total)
        drawn = sample_targets(self._table[betas, classes].double().numpy(), seed)
        return torch.from_numpy(drawn).float()


@dataclass(frozen=True)
class ZskdOptions:
    """ZSKD's keys in a recipe's ``transfer`` section.

    Attributes:
        targets: which soft targets are drawn.
        synthesis: how images are fitted to them.
    """

    __pydantic_config__ = {"extra": "forbid"}

    targets: ZskdSettings = field(default_factory=ZskdSettings)
    synthesis: SynthesisSettings = field(default_factory=SynthesisSettings)


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # The paper: no prior, temperature 20, noise start, fresh noise and a fresh optimiser for every image. It leaves
    # the learning rate, the number of steps and the pixel range of MNIST and Fashion-MNIST open; on the validation
    # slice a rate of 0.5 taught four points more than 0.05 and five more than 1.0, and 30 steps as much as 100.
    "paper": {
        "targets": {"betas": (1.0, 0.1)},
        "synthesis": {"start": "uniform", "range": "clamp", "learning_rate": 0.5, "max_steps": 30},
    },
    # The released code for CIFAR-10: batches of 100, 1,500 steps of Adam at 1e-3, whole-batch rescaling, beta
    # cancelled, 20 rows of 2,000. A row is a shard here, so that Adam starts anew with a row (theirs never does).
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
    # Chosen on the validation slice; docs/methods/zskd.md says what each part is for.
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
            # Of meaning to a teacher with BatchNorm; docs/methods/zskd.md has the measurement.
            "batch_statistics": 0.1,
        },
    },
}


class Zskd:
    """ZSKD as a method of recipes."""

    name = "zskd"
    presets = tuple(PRESETS)

    def options(self, preset: str, given: Mapping[str, Any]) -> ZskdOptions:
        """The preset with the recipe's own keys over it."""
        return preset_options(ZskdOptions, self.name, PRESETS, preset, given)

    def source(self, teacher: Teacher, request: TransferRequest) -> StoredSource:
        """Synthesise what is missing of the impressions and draw from them."""
        options: ZskdOptions = request.options
        synthesis = options.synthesis
        if options.targets.order == "rows":
            rows = len(options.targets.betas) * teacher.num_classes
            if request.size % rows:
                raise UserError(
                    f"order: rows makes {rows} rows of impressions, a class and a beta each: the number of impressions "
                    f"must be a multiple of {rows}, not {request.size} (transfer.size, transfer.held_out)."
                )
            synthesis = replace(synthesis, shard=request.size // rows)  # a row never shares a shard, nor Adam's state
        return impressions_source(teacher, ZskdTargets(teacher, options.targets), synthesis, request)


METHOD = Zskd()
