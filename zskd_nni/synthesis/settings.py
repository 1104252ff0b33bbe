"""How impressions are optimised."""

from __future__ import annotations

from dataclasses import dataclass, field

from zskd_nni.runtime.run_identity import LATER, MEANING

STARTS = ("uniform", "black", "smooth", "shapes", "mixed")
RANGES = ("clamp", "rescale", "free")

_SMALLEST, _LARGEST = 1e-6, 1e6
_MOST_STEPS = 10_000_000


@dataclass(frozen=True)
class SynthesisSettings:
    """The optimisation of an image towards its soft target.

    Attributes:
        temperature: the teacher's temperature while images are fitted (ZSKD: 20); two numbers draw it for each image
            log-uniformly between them.
        learning_rate: of Adam, in units of the value range.
        max_steps: an image leaves after that many steps, fitted or not; two numbers draw the limit for each image
            log-uniformly between them, so that a set holds images from early and late on their way.
        tolerance: an image leaves as soon as ``KL(target || teacher)`` is below this; None runs every image for
            ``max_steps``, as published.
        patience: an image also leaves when its divergence has not fallen by a hundredth of itself in that many
            steps; 0 never gives up.
        start: ``uniform`` noise over the value range (ZSKD's paper), ``black``, ``smooth`` noise, ``shapes`` or
            ``mixed``; see :mod:`zskd_nni.data.procedural`.
        hold: probability that the empty background of a shape is held, in [0, 1].
        total_variation: weight of the smoothness prior beside the divergence times temperature / 20, drawn for each
            image log-uniformly between the two; (0, 0) for none.
        batch_statistics: weight, beside the divergence, of how far a crowd of images is from what the teacher's
            BatchNorm layers remember of its training (:mod:`zskd_nni.synthesis.batch_norm_statistics`); of no
            meaning to a teacher without such layers, 0 for none. The crowd are the images in flight, ``slots`` of them,
            and those that left without a successor in their shard.
        range: ``clamp`` to the value range after every step; ``rescale`` the whole batch to it by its extremes
            before every step but the last, as the authors' code does; ``free``.
        warm_start: the next batch starts from the last one's images, and Adam goes on (authors' code).
        slots: images in flight.
        shard: images in a shard, the unit that is written, resumed and re-made.

    Raises:
        ValueError: a value outside its range.
    """

    __pydantic_config__ = {"extra": "forbid"}

    temperature: float | tuple[float, float] = 20.0
    learning_rate: float = 0.05
    max_steps: int | tuple[int, int] = 100
    tolerance: float | None = None
    patience: int = 0
    start: str = "uniform"
    hold: float = 0.7
    total_variation: tuple[float, float] = (0.0, 0.0)
    range: str = "clamp"
    warm_start: bool = False
    slots: int = 250
    shard: int = 1000
    # In meaning 1 images that had left were forgotten, so that the crowd shrank to the last of them.
    batch_statistics: float = field(default=0.0, metadata={**LATER, MEANING: 2})

    def __post_init__(self) -> None:
        coldest, hottest = self.temperatures
        if not _SMALLEST <= coldest <= hottest <= _LARGEST:
            raise ValueError(
                f"temperature must be positive (from {_SMALLEST:g} to {_LARGEST:g}), or two such numbers in order, not "
                f"{self.temperature}"
            )
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}")
        if not 0 <= self.hold <= 1:
            raise ValueError(f"hold must lie in [0, 1], not {self.hold}")
        if not 1 <= self.step_limits[0] <= self.step_limits[1] <= _MOST_STEPS:
            raise ValueError(
                f"max_steps must be at least 1 and at most {_MOST_STEPS:,}, or two such numbers in order, not "
                f"{self.max_steps}"
            )
        for name in ("slots", "shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.tolerance is not None and not 0 < self.tolerance < float("inf"):
            raise ValueError(f"tolerance must be positive, or null to run all steps, not {self.tolerance}")
        if not 0 <= self.batch_statistics < float("inf"):
            raise ValueError(f"batch_statistics must not be negative, not {self.batch_statistics}")
        if self.patience < 0:
            raise ValueError(f"patience must not be negative, not {self.patience}")
        if self.start not in STARTS:
            raise ValueError(f"start is one of {', '.join(STARTS)}, not {self.start!r}")
        if self.range not in RANGES:
            raise ValueError(f"range is one of {', '.join(RANGES)}, not {self.range!r}")
        low, high = self.total_variation
        if not 0 <= low <= high < float("inf") or (low == 0) != (high == 0):
            raise ValueError(f"total_variation is two weights, both 0 or 0 < low <= high, not [{low}, {high}]")
        early = self.tolerance is not None or self.patience or self.step_limits[0] != self.step_limits[1]
        if (self.range == "rescale" or self.warm_start) and early:
            raise ValueError(
                "range: rescale and warm_start tie the images of a batch together, so that none may leave early; "
                "set tolerance: null, patience: 0 and one number of max_steps"
            )

    @property
    def temperatures(self) -> tuple[float, float]:
        """The coldest and the hottest temperature an image is fitted at."""
        return self.temperature if isinstance(self.temperature, tuple) else (self.temperature, self.temperature)

    @property
    def step_limits(self) -> tuple[int, int]:
        """The smallest and the largest step limit of an image."""
        return self.max_steps if isinstance(self.max_steps, tuple) else (self.max_steps, self.max_steps)
