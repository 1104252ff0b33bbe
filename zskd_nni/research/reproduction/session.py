"""One call of ``zskd-nni reproduce``: which cells and seeds, in which order, and what is printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zskd_nni.research.reproduction.cells import resolve
from zskd_nni.research.reproduction.context import PairContext, Workspace
from zskd_nni.research.reproduction.estimate import as_minutes, describe, estimate_seconds
from zskd_nni.research.reproduction.pairs import PAIRS
from zskd_nni.research.reproduction.run import CellRun
from zskd_nni.research.reproduction.tables import TABLES, choose_cells, find_table
from zskd_nni.runtime.errors import UserError


@dataclass(frozen=True)
class Selection:
    """What to run.

    Attributes:
        table: name of a table, or ``all``.
        cells: names of its cells, or parts of names; none for all.
        seeds: none for those of the tables that a cell is in.
        scale: name of a scale.
    """

    table: str
    cells: Sequence[str] = ()
    seeds: Sequence[int] = ()
    scale: str = "full"

    def runs(self, workspace: Workspace) -> list[list[CellRun]]:
        """The runs of each cell, one per seed.

        Raises:
            UserError: unknown names.
        """
        table = find_table(self.table)
        cells = choose_cells(table, self.cells)
        if self.table == "all":  # the cells whose pairs have this scale
            cells = [cell for cell in cells if self.scale in PAIRS[cell.pair].scales] or cells
        tables = TABLES.values() if self.table == "all" else [table]
        contexts = {pair: PairContext(pair, workspace) for pair in {cell.pair for cell in cells}}
        result = []
        for cell in cells:
            own = {seed for one in tables for seed in one.seeds if any(cell.name == other.name for other in one.cells)}
            plan = resolve(cell, self.scale)
            seeds = list(dict.fromkeys(self.seeds)) or sorted(own)
            result.append([CellRun(plan, contexts[cell.pair], seed) for seed in seeds])
        return result


def list_tables() -> str:
    """The tables and their sizes."""
    width = max(map(len, TABLES))
    lines = [
        f"{name:<{width}}  {len(t.cells):>3} cells x {len(t.seeds)} seeds  {t.title}" for name, t in TABLES.items()
    ]
    return "\n".join([*lines, "", "zskd-nni reproduce TABLE --list shows the cells of one."])


def list_cells(selection: Selection, workspace: Workspace) -> str:
    """The selected cells: their size, the time they take, and their status."""
    runs = selection.runs(workspace)
    width = max(len(seeds[0].plan.name) for seeds in runs)
    lines, left = [], 0.0
    for seeds in runs:
        plan, states = seeds[0].plan, {run.seed: run.status() for run in seeds}
        seconds = estimate_seconds(plan)
        left += seconds * sum(state != "finished" for state in states.values())
        shown = ", ".join(f"{seed} {state}" for seed, state in states.items())
        if len(set(states.values())) == 1:
            shown = next(iter(states.values())) + (f" ({len(states)} seeds)" if len(states) > 1 else "")
        lines.append(f"{plan.name:<{width}}  {describe(plan):<28}  {as_minutes(seconds):>7}  {shown}")
    lines.append(f"\nabout {as_minutes(left)} on one core are left, without what cells share")
    return "\n".join(lines)


def run_table(selection: Selection, workspace: Workspace, say: Callable[[str], None]) -> None:
    """Run what is missing of the selected cells, seed by seed.

    A cell that fails (divergence, attention layers that do not match) does not keep the others from running.

    Raises:
        UserError: unknown names, no teacher, no test data; or, at the end, that cells failed.
    """
    runs = [run for seeds in selection.runs(workspace) for run in seeds]
    for context in {id(run.context): run.context for run in runs}.values():
        context.test  # noqa: B018 - a missing teacher or data set is reported now, not after hours
    failed, elsewhere = [], 0
    seeds = list(dict.fromkeys(run.seed for run in runs))
    for run in sorted(runs, key=lambda run: seeds.index(run.seed)):
        name = f"{run.plan.name} seed {run.seed}"
        try:
            if run.is_finished():
                continue
            record = run.run()
        except UserError as error:
            say(f"{name} failed: {error}")
            failed.append((name, str(error)))
            continue
        if record is None:
            elsewhere += 1
        else:
            say(f"{name}: {_result(record)}")
    if elsewhere:
        say(f"{elsewhere} runs were skipped: another process is running them")
    if failed:
        name, reason = failed[0]
        more = f" {len(failed) - 1} more failed." if len(failed) > 1 else ""
        raise UserError(f"{name} failed: {reason}{more}")
    say(f"records: {workspace.results}")


def _result(record: dict[str, Any]) -> str:
    student = record["accuracy"]["student"]
    if student is None:
        return record["outcome"]
    error = "" if record["mte"] is None else f", transition error {record['mte']:.3f}"
    return (
        f"{student:.2f} % (teacher {record['accuracy']['teacher']:.2f} %), agreement "
        f"{100 * record['agreement']:.2f} %{error}, {as_minutes(record['seconds']['total'])}"
    )
