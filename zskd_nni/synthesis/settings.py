"""How impressions are optimised."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from zskd_nni.data.procedural import KINDS
from zskd_nni.runtime.validation import Bounds, Count, CountOrZero, Fraction, NotNegative, Positive, Settings, one_of

RANGES = ("clamp", "rescale", "free")


def _pair(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) else (value, value)


def _in_order(low: float, high: float) -> Callable[[Any], bool]:
    """Whether a number lies between the two, or a pair of numbers in order does."""
    return lambda value: low <= _pair(value)[0] <= _pair(value)[1] <= high


Temperature = Annotated[
    float | tuple[float, float],
    Bounds("must be positive (from 1e-06 to 1e+06), or two such numbers in order", _in_order(1e-6, 1e6)),
]
MaxSteps = Annotated[
    int | tuple[int, int],
    Bounds("must be at least 1 and at most 10,000,000, or two such numbers in order", _in_order(1, 10_000_000)),
]
Weights = Annotated[
    tuple[float, float],
    Bounds(
        "is two weights, both 0 or 0 < low <= high",
        lambda value: value == (0, 0) or (value[0] > 0 and _in_order(0, sys.float_info.max)(value)),
    ),
]
Tolerance = Annotated[
    float | None,
    Bounds("must be positive, or null to run all steps", lambda value: value is None or 0 < value < math.inf),
]


@dataclass(frozen=True)
class SynthesisSettings(Settings):
    """The optimisation of an image towards its soft target.

    Attributes:
        temperature: the teacher's temperature while images are optimised (ZSKD: 20). Two numbers: each image draws its
            own log-uniformly between them.
        learning_rate: of Adam, in units of the value range.
        max_steps: step limit of an image. Two numbers: each image draws its own log-uniformly between them, so that a
            set holds images from early and late in their optimisation.
        tolerance: an image is finished as soon as ``KL(target || teacher)`` is below this; None runs every image for
            ``max_steps``, as published.
        patience: an image is also finished when its divergence has not fallen by a hundredth of itself in that many
            steps; 0 switches this off.
        start: ``uniform`` noise over the value range (ZSKD's paper), ``black``, ``smooth`` noise, ``shapes``,
            ``mixed``, ``leaves`` or ``cutouts``; see :mod:`zskd_nni.data.procedural`.
        hold: probability that the empty background of a shape is held fixed, in [0, 1].
        total_variation: weight of the smoothness prior beside the divergence times temperature / 20. Each image draws
            its own log-uniformly between the two numbers; (0, 0) for none.
        range: ``clamp`` to the value range after every step; ``rescale`` the whole batch to it by its extremes
            before every step but the last, as the authors' code does; ``free``.
        warm_start: the next batch starts from the last one's images and Adam state (authors' code).
        slots: images optimised at the same time.
        shard: images in a shard, the unit that is written, resumed and made again.
        batch_statistics: weight, beside the divergence, of the distance between the images' BatchNorm statistics and
            the teacher's running ones (:mod:`zskd_nni.synthesis.batch_norm_statistics`). The images are those in
            ``slots`` and the finished ones that no new image replaced. Ignored for a teacher without BatchNorm; 0 for
            none.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> SynthesisSettings(max_steps=(30, 120), start="mixed").step_limits
        (30, 120)
    """

    temperature: Temperature = 20.0
    learning_rate: Positive = 0.05
    max_steps: MaxSteps = 100
    tolerance: Tolerance = None
    patience: CountOrZero = 0
    start: Annotated[str, one_of(*KINDS)] = "uniform"
    hold: Fraction = 0.7
    total_variation: Weights = (0.0, 0.0)
    range: Annotated[str, one_of(*RANGES)] = "clamp"
    warm_start: bool = False
    slots: Count = 250
    shard: Count = 1000
    batch_statistics: NotNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        together = self.range == "rescale" or self.warm_start
        if together and (self.stops_early or self.step_limits[0] < self.step_limits[1]):
            raise ValueError(
                "range: rescale and warm_start treat the images of a batch as a whole, so that none may leave early; "
                "set tolerance: null, patience: 0 and one number of max_steps"
            )

    @property
    def stops_early(self) -> bool:
        """Whether an image may be finished before its step limit."""
        return self.tolerance is not None or self.patience > 0

    @property
    def temperatures(self) -> tuple[float, float]:
        """The lowest and the highest temperature of an image."""
        return _pair(self.temperature)

    @property
    def step_limits(self) -> tuple[int, int]:
        """The smallest and the largest step limit of an image."""
        return _pair(self.max_steps)
