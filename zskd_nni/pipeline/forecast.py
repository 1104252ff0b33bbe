"""How long a run takes and how much memory it needs, as forecast before it begins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zskd_nni.runtime.progress import span

_WORDS = {
    "synthesis": "images",
    "pruning": "pruning",
    "distillation": "distilling",
    "quantization": "quantizing",
    "pruning, quantization and distillation": "compressing",
    "export": "exporting",
    "evaluation": "measuring",
}


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to need.

    Attributes:
        seconds: of each stage, in order, named as in the report's ``seconds``.
        memory: peak bytes of the process: ``cpu``, and ``gpu`` where it computes on one.
        left_out: what could not be measured, in words.

    Example:
        >>> forecast = Forecast({"synthesis": 90.0, "distillation of student": 200.0}, {"cpu": 1_500_000_000})
        >>> forecast.line()
        'forecast: 5 min and 1.5 GB of memory (images 90 s, distilling 3 min)'
        >>> forecast.line({"synthesis": 95.0, "distillation of student": 150.0})
        'forecast: 50 s left (distilling 50 s)'
    """

    seconds: dict[str, float]
    memory: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())

    def left(self, spent: Mapping[str, float]) -> dict[str, float]:
        """The seconds that each stage still needs after ``spent``; a stage is finished where a later one has begun."""
        begun = [number for number, stage in enumerate(self.seconds) if spent.get(stage)]
        latest = max(begun, default=-1)
        return {
            stage: max(0.0, seconds - spent.get(stage, 0.0)) if number >= latest else 0.0
            for number, (stage, seconds) in enumerate(self.seconds.items())
        }

    def line(self, spent: Mapping[str, float] | None = None) -> str:
        """One line for the console.

        Args:
            spent: the seconds of earlier calls, by stage.
        """
        if spent:
            left = self.left(spent)
            return f"forecast: {span(sum(left.values()))} left{_in_brackets(left)}"
        line = f"forecast: {span(self.total)}{self._memory()}{_in_brackets(self.seconds)}"
        return f"{line}; not in it: {', '.join(self.left_out)}" if self.left_out else line

    def _memory(self) -> str:
        if "cpu" not in self.memory:
            return ""
        gpu = f", {gigabytes(self.memory['gpu'])} of the GPU's" if "gpu" in self.memory else ""
        return f" and {gigabytes(self.memory['cpu'])} of memory{gpu}"

    def described(self) -> dict[str, Any]:
        """JSON-able, for ``run.json`` and the report."""
        seconds = {stage: round(value, 2) for stage, value in self.seconds.items()}
        return {"seconds": {**seconds, "total": round(self.total, 2)}, "memory": self.memory, "left_out": self.left_out}

    @classmethod
    def read(cls, described: Any) -> Forecast | None:
        """What :meth:`described` gave; None where it is something else."""
        try:
            seconds, memory = dict(described["seconds"]), dict(described["memory"])
            seconds.pop("total")
            numbers = [*seconds.values(), *memory.values()]
            if all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
                return cls(seconds, memory, [str(what) for what in described["left_out"]])
        except (KeyError, TypeError, ValueError):
            pass
        return None


def gigabytes(count: float) -> str:
    """Bytes in words.

    Example:
        >>> gigabytes(1_500_000_000), gigabytes(40_000_000)
        ('1.5 GB', '0.04 GB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e9:.2g} GB"


def _in_brackets(seconds: Mapping[str, float]) -> str:
    """The kinds of work with the seconds of all students together."""
    works: dict[str, float] = {}
    for stage, value in seconds.items():
        word = _WORDS.get(stage.partition(" of ")[0], stage)
        works[word] = works.get(word, 0.0) + value
    said = [f"{word} {span(value)}" for word, value in works.items() if value >= 0.5]
    return f" ({', '.join(said)})" if said else ""


def compared(report: Mapping[str, Any]) -> str | None:
    """The forecast beside what the run needed, in words; None without a forecast."""
    forecast = Forecast.read(report.get("forecast"))
    if forecast is None:
        return None
    taken, needed = report["seconds"]["total"], (report.get("peak_memory") or {}).get("cpu")
    sentence = f"The forecast before the run was {span(forecast.total)}, and it took {span(taken)}"
    if needed is not None and "cpu" in forecast.memory:
        sentence += f"; {gigabytes(forecast.memory['cpu'])} of memory, and it needed {gigabytes(needed)}"
    return f"{sentence}."
