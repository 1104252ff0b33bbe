"""STS: Data-Free Knowledge Distillation with Soft Targeted Transfer Set Synthesis (Wang, AAAI 2021, arXiv 2104.04868).

From the teacher alone: the weights of a layer say how its units go together (equation 1), features of that layer are
drawn from a multivariate normal distribution of that correlation (equations 2 and 3), the rest of the teacher turns
them into soft targets (equation 4), images are optimised until the teacher answers with those targets and its units
are strongly active (equation 5, :mod:`zskd_nni.synthesis`), and the student is distilled on them. All classes are
drawn jointly: there is no target that contradicts the class it was drawn for.

The paper's full text was not obtained and no code of the author was found. What its abstract says: features of an
intermediate layer are modelled as multivariate normal, and soft targets made of them. What a summary of it says, not
checked against the text: the correlation comes from the weights, a scale sigma (1.5 for MNIST, 2.0 for CIFAR-10) makes
it a covariance, an activation term weighs 0.05 (LeNet-5) or 0.1 (AlexNet), and the layer is "FC-2". The numbers of the
equations here are ours.

Every open point is an option, and ``paper`` takes the reading named first:

- ``layer``: "FC-2" is read as the last hidden layer, the input of the classifier; any other by its path.
- ``weights``: which weights tell the correlation of the units, those that come in (rows) or those that go out (columns;
  a re-implementation of somebody else's reads the classifier's columns).
- ``sigma_is``: whether sigma is the standard deviation or the variance (the re-implementation's).
- ``mean``: 0 (the re-implementation's).
- ``clamp``: whether drawn features are cut at 0 as behind a ReLU, before they go on. A normal model has negative
  features; the input of a classifier behind a ReLU has none.
- ``temperature``: 1, in the targets and in the fit; the re-implementation takes 20. A draw's logits are those that the
  teacher's own features would have, and softened by 20 they say so little that the activation term drowns them.
- the activation term is the one of DAFL, minus the mean absolute feature of the modelled layer.
- ``spatial``: what a convolution's positions share; the paper's layer has none.
- optimiser and number of images are ZSKD's of the same preset; learning rate and steps 0.05 and 100.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zskd_nni.data.sources import StoredSource
from zskd_nni.methods import zskd
from zskd_nni.methods.from_targets import impressions_source
from zskd_nni.methods.registry import TransferRequest, preset_options
from zskd_nni.models.hooks import FeaturePoint, hooked, hooked_at, module_at, recording, replacing
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.rng import generator
from zskd_nni.synthesis import FeatureTerm, SynthesisSettings

_PROBES = 8


@dataclass(frozen=True)
class StsSettings:
    """The model of the features, and what becomes of a draw.

    Attributes:
        layer: path of the layer whose output is modelled; None is the input of the classifier.
        weights: ``incoming`` rows or ``outgoing`` columns tell the correlation of the units.
        sigma: scale of the features.
        sigma_is: ``deviation`` or ``variance``.
        mean: of every unit.
        clamp: ``none``; ``relu`` cuts draws at 0; ``auto`` does where the teacher's own features there are never
            negative on noise images.
        spatial: positions of a convolution are drawn ``independent`` of each other, or one draw is ``shared`` by all.
        temperature: of the soft targets.
        activation_weight: of the activation term beside the divergence; 0 for none.

    Raises:
        ValueError: a value outside its range.
    """

    __pydantic_config__ = {"extra": "forbid"}

    layer: str | None = None
    weights: str = "incoming"
    sigma: float = 1.5
    sigma_is: str = "deviation"
    mean: float = 0.0
    clamp: str = "none"
    spatial: str = "independent"
    temperature: float = 20.0
    activation_weight: float = 0.05

    def __post_init__(self) -> None:
        for name, known in (
            ("weights", ("incoming", "outgoing")),
            ("sigma_is", ("deviation", "variance")),
            ("clamp", ("none", "relu", "auto")),
            ("spatial", ("independent", "shared")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name in ("sigma", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.activation_weight < float("inf"):
            raise ValueError(f"activation_weight must not be negative, not {self.activation_weight}")
        if not -float("inf") < self.mean < float("inf"):
            raise ValueError(f"mean must be a number, not {self.mean}")

    @property
    def deviation(self) -> float:
        """Standard deviation of every unit."""
        return self.sigma if self.sigma_is == "deviation" else self.sigma**0.5


def unit_rows(weights: Tensor) -> Tensor:
    """Rows scaled to length 1: ``(n, d) -> (n, d)``; their inner products are R (equation 1).

    ``R_ij = <w_i, w_j> / (|w_i| |w_j|)``. A row of zeros stays one: a unit without weights does not vary.
    """
    return weights / weights.norm(dim=1, keepdim=True).clamp_min(1e-30)


def draw_features(rows: Tensor, count: int, settings: StsSettings, random: torch.Generator) -> Tensor:
    """Draws ``(count, n)`` from ``N(mean, s^2 R)`` (equations 2 and 3), ``R = rows rows^T``.

    With ``g ~ N(0, I_d)``, ``s rows g`` has covariance ``s^2 rows rows^T`` exactly, of whatever rank that is.

    Args:
        rows: ``(n, d)`` of length 1.
        count: how many.
        settings: sigma and mean.
        random: everything is drawn from it.
    """
    g = torch.randn((count, rows.shape[1]), generator=random)
    return settings.mean + settings.deviation * (g @ rows.T)


class StsTargets:
    """The plan of soft targets of a set of impressions.

    Args:
        teacher: whose layer is modelled, and whose rest makes the targets.
        settings: of the model.

    Attributes:
        point: where features are drawn and activations rewarded.
        shape: ``(n,)`` or ``(n, H, W)`` of the features of one image there.
        rows: ``(n, d)`` weights of the units, scaled to length 1.
        weights_path: the layer whose weights they are.
        clamped: whether draws are cut at 0.
        term: the activation term, or None.

    Raises:
        UserError: there is no such layer, no weights tell its correlation, or it does not decide the answer alone.
    """

    def __init__(self, teacher: Teacher, settings: StsSettings) -> None:
        self.teacher, self.settings = teacher, settings
        layer = settings.layer
        self.point = FeaturePoint(teacher.classifier_path, "input") if layer is None else FeaturePoint(layer)
        module_at(teacher.model, self.point.path, "The teacher")
        own = self._features_of_noise()
        self.shape = tuple(own.shape[1:])
        self.weights_path, weights = _weights_of_units(teacher, self.point, self.shape[0], settings.weights)
        self.rows = unit_rows(weights.cpu())
        self.clamped = settings.clamp == "relu" or (settings.clamp == "auto" and bool((own >= 0).all()))
        self._check_that_nothing_goes_around()
        self.term = None
        if settings.activation_weight:
            self.term = FeatureTerm(self.point, settings.activation_weight, activation_loss)
        self.identity: dict[str, Any] = {
            "method": "sts",
            **asdict(settings),
            "layer": self.point.path,
            "side": self.point.side,
            "weights_of": self.weights_path,
            "clamped": self.clamped,
        }

    def _noise(self, seed: int) -> Tensor:
        spec = self.teacher.spec
        noise = torch.rand((_PROBES, *spec.shape), generator=torch.Generator().manual_seed(seed))
        return (spec.low + (spec.high - spec.low) * noise).to(self.teacher.device)

    def _features_of_noise(self) -> Tensor:
        with recording(self.teacher.model, self.point) as seen, torch.no_grad():
            self.teacher(self._noise(0))
        if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].ndim not in (2, 4) or len(seen[0]) != _PROBES:
            raise UserError(
                f"STS cannot model {self.point}: it must be passed once by a tensor (N, units) or (N, channels, H, W)."
            )
        return seen[0]

    def _check_that_nothing_goes_around(self) -> None:
        features = self.features(_PROBES, torch.Generator().manual_seed(2)).to(self.teacher.device)
        with replacing(self.teacher.model, self.point, features), torch.no_grad():
            answers = self.teacher(self._noise(0))
            if not bool(torch.isfinite(answers).all()):
                raise UserError(
                    f"The teacher's answers to STS's features at {self.point} are not finite: the mean or sigma of the "
                    "features is too large."
                )
            if not torch.equal(answers, self.teacher(self._noise(1))):
                raise UserError(
                    f"STS cannot model {self.point}: the teacher's answer does not depend on it alone, something "
                    "(a shortcut) goes around it. Choose a layer that all paths lead through."
                )

    def features(self, count: int, random: torch.Generator) -> Tensor:
        """``(count, *shape)`` draws from the model, on the CPU."""
        units, *positions = self.shape
        places = 1
        for size in positions:
            places *= size
        if places == 1 or self.settings.spatial == "shared":
            drawn = draw_features(self.rows, count, self.settings, random)
            drawn = drawn.view(count, units, *(1 for _ in positions)).expand(count, *self.shape).contiguous()
        else:
            drawn = draw_features(self.rows, count * places, self.settings, random)
            drawn = drawn.view(count, places, units).transpose(1, 2).reshape(count, *self.shape)
        return drawn.clamp_min(0) if self.clamped else drawn

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """``g(h)``: what the rest of the teacher makes of features ``(N, *shape)``: ``(N, K)``, on the CPU."""
        parts = []
        for part in features.split(self.teacher.spec.measuring_batch):
            # The teacher runs on any images at all; its features at the point are replaced.
            images = self.teacher.spec.midpoint(len(part)).to(self.teacher.device)
            with replacing(self.teacher.model, self.point, part.to(self.teacher.device)):
                parts.append(self.teacher(images).cpu())
        return torch.cat(parts)

    def targets(self, first: int, count: int, total: int, seed: int) -> Tensor:
        """``(count, K)`` soft targets ``softmax(g(h) / T)`` (equation 4)."""
        features = self.features(count, generator(seed, "features"))
        targets = torch.softmax(self.logits(features) / self.settings.temperature, 1)
        # What float32 holds only as a denormal would depend on whether the CPU flushes denormals.
        return torch.where(targets < 1e-30, 0.0, targets)


def activation_loss(features: Tensor) -> Tensor:
    """``L_a = -mean |f_T(x)|`` of each image (in equation 5): ``(N, ...) -> (N,)``."""
    return -features.flatten(1).abs().mean(1)


def _weights_of_units(teacher: Teacher, point: FeaturePoint, units: int, which: str) -> tuple[str, Tensor]:
    """Path and weights ``(units, d)`` of the layer that makes the units, or of the one that takes them."""
    layers = {path: m for path, m in teacher.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    order: list[tuple[str, str]] = []  # what happens in a forward pass
    here = ("point", "")

    around_point = hooked_at(teacher.model, point, lambda *_: order.append(here))
    around_layers = hooked(
        teacher.model,
        layers,
        before=lambda path, _: order.append(("enters", path)),
        after=lambda path, _: order.append(("leaves", path)),
    )
    # If the point is a layer, its input comes before the layer is entered, its output after the layer is left.
    outer, inner = (around_point, around_layers) if point.side == "input" else (around_layers, around_point)
    with torch.no_grad(), outer, inner:
        teacher(teacher.spec.midpoint(2).to(teacher.device))
    place = order.index(here)
    if which == "incoming":
        found = [path for what, path in order[:place] if what == "leaves"][-1:]
        weights = layers[found[0]].weight.detach().float().flatten(1) if found else None
        if weights is not None and len(weights) == units:
            return found[0], weights
        other, verb = "outgoing", "make"
    else:
        found = [path for what, path in order[place:] if what == "enters"][:1]
        if found:
            weight = layers[found[0]].weight.detach().float()
            # A flattened channel has a column of a linear layer for each position. A convolution of more channels
            # than these takes others too.
            whole = weight.shape[1] == units if weight.ndim == 4 else weight.shape[1] % units == 0
            if whole:
                return found[0], weight.reshape(len(weight), units, -1).transpose(0, 1).flatten(1)
        other, verb = "incoming", "take"
    nearest = f"the nearest, {found[0]!r}, has other units" if found else "there is none"
    raise UserError(
        f"No linear layer or convolution was found to {verb} the {units} units of {point} ({nearest}); "
        f"set targets.weights: {other}, or choose another layer."
    )


@dataclass(frozen=True)
class StsOptions:
    """STS's keys in a recipe's ``transfer`` section.

    Attributes:
        targets: the model of the features.
        synthesis: how images are fitted to the targets.
    """

    __pydantic_config__ = {"extra": "forbid"}

    targets: StsSettings = field(default_factory=StsSettings)
    synthesis: SynthesisSettings = field(default_factory=SynthesisSettings)


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
    # Images are fitted as by ZSKD's best. Its temperatures lie about 4, and so does the targets', so that an image's
    # logits come out near those of the drawn features.
    "best": {
        "targets": {"sigma": 1.5, "activation_weight": 0.05, "temperature": 4.0, "clamp": "auto"},
        "synthesis": zskd.PRESETS["best"]["synthesis"],
    },
}


class Sts:
    """STS as a method of recipes."""

    name = "sts"
    presets = tuple(PRESETS)

    def options(self, preset: str, given: Mapping[str, Any]) -> StsOptions:
        """The preset with the recipe's own keys over it."""
        return preset_options(StsOptions, self.name, PRESETS, preset, given)

    def source(self, teacher: Teacher, request: TransferRequest) -> StoredSource:
        """Synthesise what is missing of the impressions and draw from them."""
        options: StsOptions = request.options
        return impressions_source(teacher, StsTargets(teacher, options.targets), options.synthesis, request)


METHOD = Sts()
