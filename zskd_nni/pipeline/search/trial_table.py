"""The table of a search's trials as text, with the remarks that its figures need."""

from __future__ import annotations

from typing import Any


def is_table(table: Any) -> bool:
    """Whether something read from ``trials.json`` is a whole table of trials."""
    rows = table.get("trials") if isinstance(table, dict) else None
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        return False
    best = table.get("best")
    return best is None or (isinstance(best, int) and 0 < best <= len(rows))


def _is_row(row: Any) -> bool:
    """Whether it is a row of the table, with figures if the trial is done."""
    if not isinstance(row, dict) or not row.keys() >= {"id", "status", "reason", "given", "value", "seconds"}:
        return False
    figures = [row.get("objective"), row.get("bytes")]
    return isinstance(row.get("parameters"), dict) and all(
        isinstance(figure, int | float) or (figure is None and row["status"] != "done") for figure in figures
    )


def render_trials(table: dict[str, Any]) -> str:
    """The table of all trials as plain text, the best first."""
    paths = list(dict.fromkeys(path for row in table["trials"] for path in row["parameters"]))

    def rank(row: dict[str, Any]) -> tuple[bool, bool, float]:
        return row["number"] != table["best"], row["status"] != "done", -(row["objective"] or 0)

    head = ["trial", *_short_names(paths), table["objective"], "bytes", "seconds", "status"]
    lines = [head]
    for row in sorted(table["trials"], key=rank):
        lines.append(
            [
                f"{row['number']}{' *' if row['number'] == table['best'] else ''}",
                *(_value(row["parameters"].get(path, "")) for path in paths),
                "" if row["objective"] is None else f"{row['objective']:.2f} %",
                "" if row["bytes"] is None else f"{row['bytes']:,}",
                "" if row["seconds"] is None else f"{row['seconds']:.1f}",
                "; ".join([row["status"] + (f": {row['reason']}" if row["reason"] else ""), *remarks(row)]),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "-" * min(max(map(len, text)), 160))
    text += ["", f"{table['objective']} is measured on {table['objective_on']}"]
    real = on_real_images(table["trials"])
    return "\n".join([*text, f"{subject_of(real)}: NOT data-free"] if real else text)


def on_real_images(rows: list[dict[str, Any]]) -> list[int]:
    """Numbers of the trials whose method reads real images; a trial that failed before it had a recipe reads none."""
    return [row["number"] for row in rows if row.get("data_free") is False]


def subject_of(numbers: list[int]) -> str:
    """The beginning of a sentence about the trials of :func:`on_real_images`."""
    if len(numbers) == 1:
        return f"trial {numbers[0]} reads real images"
    return f"trials {', '.join(map(str, numbers))} read real images"


def remarks(row: dict[str, Any]) -> list[str]:
    """What a reader of a row must know besides its figures."""
    return [*filter(None, [row.get("note")]), *(["reads real images"] if row.get("data_free") is False else [])]


def _short_names(paths: list[str]) -> list[str]:
    """The shortest ends of key paths that differ from each other."""

    def is_clear(end: str) -> bool:
        return not end.split(".")[0].isdigit() and sum(f".{path}".endswith(f".{end}") for path in paths) == 1

    splits = [path.split(".") for path in paths]
    ends = [[".".join(keys[first:]) for first in reversed(range(len(keys)))] for keys in splits]
    return [next(filter(is_clear, each), each[-1]) for each in ends]


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
