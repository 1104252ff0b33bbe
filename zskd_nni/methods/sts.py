"""STS: Data-Free Knowledge Distillation with Soft Targeted Transfer Set Synthesis (Wang, AAAI 2021, arXiv 2104.04868).

Features h of one layer of the teacher T are modelled as multivariate normal. The weights w_i of the layer's units give
the correlation. The rest g of the teacher turns drawn features into soft targets:

    R(i, j) = <w_i, w_j> / (|w_i| |w_j|)                  correlation of units i and j                  (equation 1)
    Sigma = s^2 R                                         covariance, s from sigma                      (equation 2)
    h ~ N(mean, Sigma)                                    features                                      (equation 3)
    y = softmax(g(h) / tau)                               soft target                                   (equation 4)
    x = argmin_x KL(y, softmax(T(x) / tau)) + lambda L_a(x),   L_a(x) = -mean |f_T(x)|                  (equation 5)

f_T are the teacher's features of the layer. This file draws the targets y, :mod:`zskd_nni.synthesis.engine` optimises
the images x, and the student is distilled on them. All classes are drawn jointly: no target contradicts the class it
was drawn for.

We had neither the paper's full text nor code of the author. Its abstract says that features of an intermediate layer
are modelled as multivariate normal, and that soft targets are made of them. A summary, not checked against the text,
says: the correlation comes from the weights; a scale sigma (1.5 for MNIST, 2.0 for CIFAR-10) makes it a covariance; an
activation term weighs 0.05 (LeNet-5) or 0.1 (AlexNet); the layer is "FC-2". The numbers of the equations here are ours.

Every open point is an option. ``paper`` takes the first reading:

- ``layer``: "FC-2" is the last hidden layer, the input of the classifier. Or any other layer by its path.
- ``weights``: the correlation is that of the weights into the units (rows). Or of the weights out of them (columns): a
  third party's re-implementation reads the classifier's columns.
- ``sigma_is``: sigma is the standard deviation. Or the variance (the re-implementation's reading).
- ``mean``: 0 (also the re-implementation's).
- ``clamp``: drawn features stay as they are. Or they are cut at 0, as after a ReLU: a normal model has negative
  features, and the input of a classifier after a ReLU has none.
- ``temperature``: 1, in the targets and in the optimisation. The re-implementation takes 20, but a draw's logits are as
  large as those of the teacher's own features, and softened by 20 they are so flat that the activation term dominates.
- the activation term is the one of DAFL, minus the mean absolute feature of the modelled layer.
- ``spatial``: how the positions of a convolution are drawn; the paper's layer has none.
- optimiser and number of images are ZSKD's of the same preset, with a learning rate of 0.05 and 100 steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import inf, prod
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from zskd_nni.methods import zskd
from zskd_nni.methods.from_targets import ImpressionMethod
from zskd_nni.models.hooks import FeaturePoint, hooked, hooked_at, module_at, recording_features, replacing
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.rng import generator
from zskd_nni.runtime.validation import Bounds, NotNegative, Positive, Settings, one_of
from zskd_nni.synthesis import FeatureTerm

_PROBES = 8  # noise images

Finite = Annotated[float, Bounds("must be a number", lambda value: -inf < value < inf)]


@dataclass(frozen=True)
class StsSettings(Settings):
    """The model of the features, and how soft targets are made of draws.

    Attributes:
        layer: path of the layer whose output is modelled; None is the input of the classifier.
        weights: the correlation of the units is that of their ``incoming`` rows or their ``outgoing`` columns.
        sigma: scale of the features.
        sigma_is: ``deviation`` or ``variance``.
        mean: of every unit.
        clamp: ``none``; ``relu`` cuts draws at 0; ``auto`` does so if the teacher's own features of noise images are
            never negative there.
        spatial: positions of a convolution are drawn ``independent`` of each other, or one draw is ``shared`` by all.
        temperature: of the soft targets.
        activation_weight: of the activation term beside the divergence; 0 for none.

    Raises:
        ValueError: a value outside its range.
    """

    layer: str | None = None
    weights: Annotated[str, one_of("incoming", "outgoing")] = "incoming"
    sigma: Positive = 1.5
    sigma_is: Annotated[str, one_of("deviation", "variance")] = "deviation"
    mean: Finite = 0.0
    clamp: Annotated[str, one_of("none", "relu", "auto")] = "none"
    spatial: Annotated[str, one_of("independent", "shared")] = "independent"
    temperature: Positive = 20.0
    activation_weight: NotNegative = 0.05

    @property
    def deviation(self) -> float:
        """Standard deviation of every unit."""
        return self.sigma if self.sigma_is == "deviation" else self.sigma**0.5


def unit_rows(weights: Tensor) -> Tensor:
    """Rows scaled to length 1: ``(n, d) -> (n, d)``; their inner products are R (equation 1).

    A row of zeros stays one: a unit without weights does not vary.

    Example:
        >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    return weights / weights.norm(dim=1, keepdim=True).clamp_min(1e-30)


def draw_features(rows: Tensor, count: int, settings: StsSettings, random: torch.Generator) -> Tensor:
    """Draws ``(count, n)`` from ``N(mean, s^2 R)`` (equations 2 and 3), ``R = rows rows^T``.

    With ``g ~ N(0, I_d)``, ``s rows g`` has exactly the covariance ``s^2 rows rows^T``, of any rank.

    Args:
        rows: ``(n, d)`` of length 1.
        count: how many.
        settings: sigma and mean.
        random: source of all draws.
    """
    g = torch.randn((count, rows.shape[1]), generator=random)
    return settings.mean + settings.deviation * (g @ rows.T)


class StsTargets:
    """The soft targets of a set of impressions.

    Args:
        teacher: one of its layers is modelled, the layers after it make the targets.
        settings: of the model.

    Attributes:
        point: where features are drawn and activations rewarded.
        shape: ``(n,)`` or ``(n, H, W)`` of the features of one image there.
        rows: ``(n, d)`` weights of the units, scaled to length 1.
        weights_path: of the layer that has these weights.
        clamped: whether draws are cut at 0.
        term: the activation term, or None.

    Raises:
        UserError: there is no such layer, its units have no weights to read, or a shortcut goes around it.
    """

    def __init__(self, teacher: Teacher, settings: StsSettings) -> None:
        self.teacher, self.settings = teacher, settings
        layer = settings.layer
        self.point = FeaturePoint(teacher.classifier_path, "input") if layer is None else FeaturePoint(layer)
        module_at(teacher.model, self.point.path, "The teacher")
        features = self._features_of_noise()
        self.shape = tuple(features.shape[1:])
        self.weights_path, weights = _weights_of_units(teacher, self.point, self.shape[0], settings.weights)
        self.rows = unit_rows(weights.cpu())  # equation 1
        self.clamped = settings.clamp == "relu" or (settings.clamp == "auto" and bool((features >= 0).all()))
        self._check_no_shortcut()
        weight = settings.activation_weight
        self.term = FeatureTerm(self.point, weight, activation_loss) if weight else None
        self.identity: dict[str, Any] = {
            "method": "sts",
            **asdict(settings),
            "layer": self.point.path,
            "side": self.point.side,
            "weights_of": self.weights_path,
            "clamped": self.clamped,
        }

    def _noise(self, seed: int) -> Tensor:
        return self.teacher.spec.uniform_noise(_PROBES, seed).to(self.teacher.device)

    def _features_of_noise(self) -> Tensor:
        with recording_features(self.teacher.model, self.point) as seen, torch.no_grad():
            self.teacher(self._noise(0))
        if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].ndim not in (2, 4) or len(seen[0]) != _PROBES:
            raise UserError(
                f"STS cannot model {self.point}: it must be passed once by a tensor (N, units) or (N, channels, H, W)."
            )
        return seen[0]

    def _check_no_shortcut(self) -> None:
        features = self.features(_PROBES, torch.Generator().manual_seed(2)).to(self.teacher.device)
        with replacing(self.teacher.model, self.point, features), torch.no_grad():
            answers = self.teacher(self._noise(0))
            if not bool(torch.isfinite(answers).all()):
                raise UserError(
                    f"The teacher's logits of STS's features at {self.point} are not finite: the mean or sigma of the "
                    "features is too large."
                )
            if not torch.equal(answers, self.teacher(self._noise(1))):
                raise UserError(
                    f"STS cannot model {self.point}: the teacher's logits do not depend on it alone, something "
                    "(a shortcut) goes around it. Choose a layer that all paths lead through."
                )

    def features(self, count: int, random: torch.Generator) -> Tensor:
        """``(count, *shape)`` draws from the model, on the CPU."""
        units, *sides = self.shape
        positions = prod(sides)
        if self.settings.spatial == "shared":
            drawn = draw_features(self.rows, count, self.settings, random)
            drawn = drawn.view(count, units, *(1 for _ in sides)).expand(count, *self.shape).contiguous()
        else:
            drawn = draw_features(self.rows, count * positions, self.settings, random)
            drawn = drawn.view(count, positions, units).transpose(1, 2).reshape(count, *self.shape)
        return drawn.clamp_min(0) if self.clamped else drawn

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """``g(h)``: the teacher's logits with features ``(N, *shape)`` at the point: ``(N, K)``, on the CPU."""
        parts = []
        for part in features.split(self.teacher.spec.inference_batch):
            # The images do not matter: the features at the point are replaced.
            images = self.teacher.spec.midpoint(len(part)).to(self.teacher.device)
            with replacing(self.teacher.model, self.point, part.to(self.teacher.device)):
                parts.append(self.teacher(images).cpu())
        return torch.cat(parts)

    def targets(self, first: int, count: int, total: int, seed: int) -> Tensor:
        """``(count, K)`` soft targets ``softmax(g(h) / T)`` (equation 4)."""
        features = self.features(count, generator(seed, "features"))
        targets = torch.softmax(self.logits(features) / self.settings.temperature, 1)
        # Values that are denormal in float32 would depend on whether the CPU flushes denormals.
        return torch.where(targets < 1e-30, 0.0, targets)


def activation_loss(features: Tensor) -> Tensor:
    """``L_a = -mean |f_T(x)|`` of each image (in equation 5): ``(N, ...) -> (N,)``."""
    return -features.flatten(1).abs().mean(1)


def _weights_of_units(teacher: Teacher, point: FeaturePoint, units: int, which: str) -> tuple[str, Tensor]:
    """Path and weights ``(units, d)`` of the layer that computes the units, or of the one that takes them in.

    Args:
        teacher: whose layers are searched.
        point: where the units are.
        units: how many.
        which: ``incoming`` or ``outgoing`` weights.

    Raises:
        UserError: the nearest layer has another number of units, or there is none.
    """
    layers = {path: m for path, m in teacher.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    before, after = _layers_around(teacher, point, layers)
    if which == "incoming":
        nearest, other, verb = before[-1:], "outgoing", "make"
        weights = layers[nearest[0]].weight.detach().float().flatten(1) if nearest else torch.empty(0)
        if len(weights) == units:
            return nearest[0], weights
    else:
        nearest, other, verb = after[:1], "incoming", "take"
        if nearest:
            weights = layers[nearest[0]].weight.detach().float()
            # A linear layer after a flattened convolution has a column for each position of a channel. A convolution
            # with more input channels than these also takes others in.
            if weights.shape[1] == units if weights.ndim == 4 else weights.shape[1] % units == 0:
                return nearest[0], weights.reshape(len(weights), units, -1).transpose(0, 1).flatten(1)
    reason = f"the nearest, {nearest[0]!r}, has other units" if nearest else "there is none"
    raise UserError(
        f"No linear layer or convolution was found to {verb} the {units} units of {point} ({reason}); "
        f"set targets.weights: {other}, or choose another layer."
    )


def _layers_around(teacher: Teacher, point: FeaturePoint, paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those of the layers that have run when a forward pass reaches the point, and those that start after it."""
    calls: list[tuple[str, str]] = []
    around_point = hooked_at(teacher.model, point, lambda *_: calls.append(("point", "")))
    around_layers = hooked(
        teacher.model,
        paths,
        before=lambda path, _: calls.append(("starts", path)),
        after=lambda path, _: calls.append(("has run", path)),
    )
    # If the point is a layer, its input comes before the layer starts, its output after the layer has run.
    outer, inner = (around_point, around_layers) if point.side == "input" else (around_layers, around_point)
    with torch.no_grad(), outer, inner:
        teacher(teacher.spec.midpoint(2).to(teacher.device))
    place = calls.index(("point", ""))
    before = [path for event, path in calls[:place] if event == "has run"]
    return before, [path for event, path in calls[place:] if event == "starts"]


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # sigma and the activation's weight are those of MNIST and LeNet-5; for CIFAR-10 and AlexNet set 2.0 and 0.1.
    "paper": {
        "targets": {"sigma": 1.5, "activation_weight": 0.05, "temperature": 1.0, "clamp": "none"},
        "synthesis": {
            **zskd.PRESETS["paper"]["synthesis"],
            "start": "black",
            "temperature": 1.0,
            "learning_rate": 0.05,
            "max_steps": 100,
        },
    },
    # Images are optimised as by ZSKD's best. Its temperatures lie around 4, and so does the targets', so that an
    # image's logits come out near those of the drawn features.
    "best": {
        "targets": {"sigma": 1.5, "activation_weight": 0.05, "temperature": 4.0, "clamp": "auto"},
        "synthesis": zskd.PRESETS["best"]["synthesis"],
    },
}

METHOD = ImpressionMethod("sts", StsSettings, PRESETS, StsTargets)
