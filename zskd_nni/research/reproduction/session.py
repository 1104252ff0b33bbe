"""A whole call of ``zskd-nni reproduce``: which cells, in which order, and what is said about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from zskd_nni.research.reproduction.cells import Plan, resolve
from zskd_nni.research.reproduction.pairs import PAIRS
from zskd_nni.research.reproduction.run import Bench, Place, as_minutes, describe, estimate, run_cell, status
from zskd_nni.research.reproduction.tables import TABLES, choose_cells, find_table
from zskd_nni.runtime.errors import UserError


def list_tables() -> str:
    """The tables and their sizes."""
    width = max(map(len, TABLES))
    lines = [
        f"{name:<{width}}  {len(t.cells):>3} cells x {len(t.seeds)} seeds  {t.title}" for name, t in TABLES.items()
    ]
    return "\n".join([*lines, "", "zskd-nni reproduce TABLE --list shows the cells of one."])


def _chosen(
    table: str, cells: Sequence[str], seeds: Sequence[int], scale: str
) -> tuple[list[Plan], dict[str, list[int]]]:
    """The plans, and by name of the cell the seeds: those named, or all of the tables that a cell is in."""
    found = find_table(table)
    chosen = choose_cells(found, cells)
    if table == "all":  # of every table those cells that there are at this scale
        chosen = [cell for cell in chosen if scale in PAIRS[cell.pair].scales] or chosen
    plans = [resolve(cell, scale) for cell in chosen]
    tables = TABLES.values() if table == "all" else [found]
    own = {
        cell.name: list(dict.fromkeys(seeds))
        or sorted({seed for one in tables for seed in one.seeds if any(cell.name == other.name for other in one.cells)})
        for cell in chosen
    }
    return plans, own


def _benches(plans: Sequence[Plan], place: Place) -> dict[str, Bench]:
    return {pair: Bench(pair, place) for pair in dict.fromkeys(plan.cell.pair for plan in plans)}


def list_cells(table: str, cells: Sequence[str], seeds: Sequence[int], scale: str, place: Place) -> str:
    """The chosen cells, what they come to, and where they are."""
    plans, numbers = _chosen(table, cells, seeds, scale)
    benches = _benches(plans, place)
    width = max(len(plan.name) for plan in plans)
    lines, left = [], 0.0
    for plan in plans:
        states = {seed: status(plan, benches[plan.cell.pair], seed) for seed in numbers[plan.cell.name]}
        left += sum(estimate(plan) for state in states.values() if state != "finished")
        shown = ", ".join(f"{seed} {state}" for seed, state in states.items())
        if len(set(states.values())) == 1:
            shown = next(iter(states.values())) + (f" ({len(states)} seeds)" if len(states) > 1 else "")
        lines.append(f"{plan.name:<{width}}  {describe(plan):<28}  {as_minutes(estimate(plan)):>7}  {shown}")
    lines.append(f"\nabout {as_minutes(left)} on one core are left, without what cells share")
    return "\n".join(lines)


def run_table(
    table: str, cells: Sequence[str], seeds: Sequence[int], scale: str, place: Place, say: Callable[[str], None]
) -> None:
    """Run what is missing of the chosen cells, seed by seed.

    A cell that fails (divergence, attention layers that do not match) does not keep the others from being run.

    Raises:
        UserError: unknown names, no teacher, no test data; or, at the end, that cells failed.
    """
    plans, numbers = _chosen(table, cells, seeds, scale)
    benches = _benches(plans, place)
    for bench in benches.values():
        bench.test  # noqa: B018 - a missing teacher or data set is said now, not after hours
    failed, elsewhere = [], 0
    for seed in list(dict.fromkeys(seed for named in numbers.values() for seed in named)):
        for plan in (plan for plan in plans if seed in numbers[plan.cell.name]):
            bench = benches[plan.cell.pair]
            try:
                if status(plan, bench, seed) == "finished":
                    continue
                record = run_cell(plan, bench, seed)
            except UserError as error:
                say(f"{plan.name} seed {seed} failed: {error}")
                failed.append((f"{plan.name} seed {seed}", str(error)))
                continue
            if record is None:
                elsewhere += 1
            else:
                say(_line(plan, seed, record))
    if elsewhere:
        say(f"{elsewhere} runs were left to another process that is at them")
    if failed:
        name, reason = failed[0]
        more = f" {len(failed) - 1} more failed." if len(failed) > 1 else ""
        raise UserError(f"{name} failed: {reason}{more}")
    say(f"records: {place.results}")


def _line(plan: Plan, seed: int, record: dict[str, Any]) -> str:
    student = record["accuracy"]["student"]
    if student is None:
        return f"{plan.name} seed {seed}: {record['outcome']}"
    error = "" if record["mte"] is None else f", transition error {record['mte']:.3f}"
    return (
        f"{plan.name} seed {seed}: {student:.2f} % (teacher {record['accuracy']['teacher']:.2f} %), agreement "
        f"{100 * record['agreement']:.2f} %{error}, {as_minutes(record['seconds']['total'])}"
    )
