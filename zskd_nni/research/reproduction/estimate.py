"""The size of a run in words, and its estimated seconds, for listings."""

from __future__ import annotations

from zskd_nni.research.reproduction.cells import IMPRESSIONS, Plan


def estimate_seconds(plan: Plan) -> float:
    """Seconds that a run takes on one CPU core, very roughly: synthesis, student, transition error."""
    cell, speed, student = plan.cell, plan.pair.speed, plan.student
    if cell.method == "none":
        return 5.0
    seconds = student.steps * student.batch / 128 / speed.student_steps
    if cell.method == "zskt":
        game = plan.options
        per_round = max(0.6, (game.width / 32) ** 2) / 128 / speed.zskt_rounds
        if plan.zskt_trains_student:
            seconds = game.rounds * game.batch * per_round
        else:
            rounds = student.steps / game.student_steps + game.filling
            seconds += rounds * game.generator_steps * (game.new_images or game.batch) * per_round / 4
    elif cell.method in IMPRESSIONS and plan.size is not None:
        low, high = plan.options.synthesis.step_limits
        seconds += plan.size * (low * high) ** 0.5 / speed.image_steps
    if cell.transition:  # every image is moved towards each of nine other classes
        seconds += plan.scale.mte_images * plan.scale.mte_steps * 9 / speed.image_steps
    return seconds


def as_minutes(seconds: float) -> str:
    """``40 s``, ``3 min``, ``2.5 h``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"


def describe(plan: Plan) -> str:
    """Size and schedule in a few words."""
    if plan.cell.method == "none":
        return "untrained"
    if plan.zskt_trains_student:
        return f"{plan.options.rounds:,} rounds"
    images = "" if plan.size is None else f"{plan.size:,} images, "
    shots = "" if plan.cell.shots is None else f"{plan.cell.shots} a class, "
    return f"{images}{shots}{plan.student.steps:,} steps"
