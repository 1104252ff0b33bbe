"""The tables of the page on rivals, made from ``results/rivals-*.json`` when the site is built."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Rows = list[dict[str, Any]]
RESULTS = Path(__file__).resolve().parents[2] / "results"
_MARK = "<!-- rivals -->"
TITLES = {
    "alexnet": "AlexNet, CIFAR-10",
    "resnet20": "ResNet-20, CIFAR-10",
    "lenet5": "LeNet-5, Fashion-MNIST",
}
_OURS = {"ours": "ours", "ours-options": "ours with the options"}
OURS = tuple(_OURS)
NAMES = {
    "nni": ("magnitude (L1), no recovery", "NNI 3.0"),
    "torch-pruning": ("magnitude of groups, no recovery", "Torch-Pruning 1.6.1"),
    "bn-noise": ("L1, BatchNorm re-estimated on noise", "NNI 3.0, then written here"),
    "folding": ("Model Folding", "written here from the paper"),
    "equalisation": ("equalisation and bias correction", "written here from the paper"),
    "squant": ("SQuant's rounding", "written here from the paper"),
    "onnxruntime": ("static quantization, calibrated on noise", "onnxruntime"),
    "nni-noise": ("post-training quantization, calibrated on noise", "NNI 3.0"),
    "ours": ("**ours**", "a packaged recipe without options"),
    "ours-options": (
        "**ours, with narrower ranges, joint rounding, corrected biases**",
        "a packaged recipe, options set",
    ),
    "real": ("*ours on real images: the upper limit*", "the same recipe"),
    "real-options": ("*the same with the options*", "the same recipe"),
}
_FOR_HALF = ("nni", "torch-pruning", "bn-noise", "folding", "ours", "real")
_FOR_BITS = tuple(key for key in NAMES if key in (*OURS, "real") or key not in _FOR_HALF)
COLUMNS = {"half": "half of the channels", "W8A8": "W8A8", "W4A8": "W4A8", "W4A4": "W4A4"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables in."""
    return markdown.replace(_MARK, rivals()) if _MARK in markdown else markdown


def rivals() -> str:
    """All tables: one a network for half of the channels, one for bits, and how each row was made."""
    parts = []
    for network in TITLES:
        path = RESULTS / f"rivals-{network}.json"
        if not path.exists():
            continue
        rows = json.loads(path.read_text())
        parts += [f"## {TITLES[network]}", table(rows, ["half"]), table(rows, ["W8A8", "W4A8", "W4A4"])]
        parts += [standing(rows), made_by(rows)]
    return "\n\n".join(parts) if parts else "No row is recorded yet; `make rivals` makes them."


def table(rows: Rows, tasks: list[str]) -> str:
    """Accuracy and seconds of each rival at some tasks."""
    lines = [
        f"| what | from | {' | '.join(f'{COLUMNS[task]} | seconds' for task in tasks)} |",
        f"| --- | --- |{' --- | --- |' * len(tasks)}",
    ]
    for key, (name, source) in NAMES.items():
        if key in (_FOR_HALF if tasks == ["half"] else _FOR_BITS):
            cells = [cell for task in tasks for cell in _figures(_of(rows, key, task))]
            lines.append(f"| {name} | {source} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _of(rows: Rows, key: str, task: str) -> Rows:
    return [row for row in rows if (row["rival"], row["task"]) == (key, task)]


def _figures(rows: Rows) -> list[str]:
    measured = [row["accuracy"] for row in rows if "accuracy" in row]
    if not measured:
        return ["does not run" if rows else "not measured", ""]
    spread = f"\u00a0±\u00a0{stdev(measured):.2f}" if len(measured) > 1 else ""
    return [f"{mean(measured):.2f}{spread}", f"{mean(row['seconds'] for row in rows if 'accuracy' in row):.3g}"]


def standing(rows: Rows) -> str:
    """One sentence a task: our recipe, without options and with them, against the most accurate data-free rival."""
    said = []
    for task, column in COLUMNS.items():
        means = {}
        for key in NAMES:
            values = [row["accuracy"] for row in _of(rows, key, task) if "accuracy" in row]
            if values and not key.startswith("real"):
                means[key] = mean(values)
        rivals = [key for key in means if key not in OURS]
        if not rivals or "ours" not in means:
            continue
        best = max(rivals, key=means.__getitem__)
        told = [f"the best rival is {NAMES[best][0]} ({NAMES[best][1]}), {means[best]:.2f}"]
        for key in (key for key in OURS if key in means):
            ahead = means[key] - means[best]
            how = "ahead of it" if ahead > 0 else "**behind it**" if ahead < 0 else "level with it"
            told.append(f"{_OURS[key]} is {how} by {abs(ahead):.2f}")
        said.append(f"- **{column}**: {'; '.join(told)}.")
    return "\n".join(said)


def made_by(rows: Rows) -> str:
    """A folded table of commands, commits and machines, and what did not run."""
    lines = ['??? note "How each row was made"', "", "    | row | seed | command | commit | machine |"]
    lines.append("    | --- | --- | --- | --- | --- |")
    for row in rows:
        source = row["provenance"]
        machine = f"{source['device']}, {source['threads']} thread, torch {source['versions']['torch']}"
        commit = (source["commit"] or "none")[:7] + ("+changes" if "+" in (source["commit"] or "") else "")
        name = f"{row['rival']}, {row['task']}"
        lines.append(f"    | {name} | {row['seed']} | `{row['command']}` | {commit} | {machine} |")
    lines += [f"\n    {row['rival']}, {row['task']} does not run: {row['why_not']}" for row in rows if "why_not" in row]
    return "\n".join(lines)
