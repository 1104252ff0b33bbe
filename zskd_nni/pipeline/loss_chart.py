"""A chart of a loss over the steps of a training, as SVG."""

from __future__ import annotations

import math
from typing import Any

_WIDTH, _HEIGHT = 480, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 44


def loss_chart(history: dict[str, Any] | None, unit: str = "nats x T²") -> str | None:
    """A line on a logarithmic axis, with ticks and titles; None if there are fewer than two losses.

    Args:
        history: ``steps`` and ``losses``, of equal length.
        unit: of the loss.
    """
    if not history or len(history["losses"]) < 2:
        return None
    losses = [max(float(loss), 1e-12) for loss in history["losses"]]
    last = history["steps"][-1]
    low, high = _bounds(min(losses), max(losses))

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last

    def y(loss: float) -> float:
        share = (math.log10(high) - math.log10(loss)) / (math.log10(high) - math.log10(low))
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * share

    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Loss over the steps, logarithmic">',
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="currentColor" stroke-opacity=".5"/>',
    ]
    for tick in log_ticks(low, high):
        parts.append(f'<path d="M{_LEFT} {y(tick):.1f}H{right}" stroke="currentColor" stroke-opacity=".15"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for step in linear_ticks(last):
        anchor = "end" if x(step) > right - 20 else "middle"
        parts.append(f'<text x="{x(step):.1f}" y="{bottom + 16}" text-anchor="{anchor}">{step:,}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">training step</text>')
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text x="13" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 13 {middle:.0f})">'
        f"loss, {unit}</text>"
    )
    points = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in zip(history["steps"], losses, strict=True))
    parts.append(f'<polyline points="{points}" fill="none" class="line"/></svg>')
    return "\n".join(parts)


def _bounds(low: float, high: float) -> tuple[float, float]:
    """A range with some room around it, and at least a factor of 1.5 wide."""
    if high / low < 1.5:
        middle = math.sqrt(low * high)
        low, high = middle / 1.25, middle * 1.25
    return low / 1.05, high * 1.05


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers in a range, at most eight.

    Example:
        >>> log_ticks(2.1, 11)
        [3.0, 5.0, 7.0, 10.0]
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 3.0, 5.0), (1.0, 3.0), (1.0,)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        inside = [float(f"{tick:.3g}") for tick in ticks if low <= tick <= high]
        if len(inside) <= 5 or digits == (1.0,):
            return inside[:: -(-len(inside) // 8)] if inside else inside
    raise AssertionError  # the last digits return


def linear_ticks(last: int) -> list[int]:
    """Round numbers from 0 to at most ``last``.

    Example:
        >>> linear_ticks(1600), linear_ticks(3)
        ([0, 500, 1000, 1500], [0, 1, 2, 3])
    """
    wide = [step for power in range(12) for digit in (1, 2, 5) if last / (step := digit * 10**power) >= 3]
    return list(range(0, last + 1, max(wide, default=1)))
