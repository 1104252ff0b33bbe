"""Run packaged recipes over seeds and keep their figures: ``results/RECIPE.json``, one record a seed.

    python benchmarks/packaged_recipes.py mnist-half mnist-prune50 fashion-mnist-half digits-prune50 --seeds 0 1 2

Real test data is found as the command line finds it (``ZSKD_NNI_DATA``). Every run is a ``zskd-nni compress`` in its
own process and folder below ``--runs``; a finished one is not run again, a stopped one goes on.
With ``--table`` nothing is run: the table of what is in ``results/`` is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results"
KEPT = (
    "name",
    "accuracy",
    "agreement",
    "agreement_on",
    "agreement_held_out",
    "agreement_onnx",
    "latency_ms",
    "quantization",
    "parameters",
    "bytes",
    "controls",
    "impressions",
    "seconds",
    "onnx_difference",
    "recipe",
    "provenance",
)


def run(recipe: str, seed: int, runs: Path, threads: int | None) -> dict[str, Any]:
    """One recipe with one seed, in its own process."""
    out = runs / f"{recipe}-seed{seed}"
    if not (out / "report.json").exists():
        command = [sys.executable, "-m", "zskd_nni", "compress", recipe, "--out", str(out), "--seed", str(seed)]
        subprocess.run(command + (["--threads", str(threads)] if threads else []), check=True)
    report = json.loads((out / "report.json").read_text())
    return {key: report.get(key) for key in KEPT}


def table(names: list[str]) -> str:
    """A Markdown table, mean and standard deviation over the seeds of each recipe."""
    lines = [
        "| recipe | teacher | student | not distilled | on noise | parameters | ONNX bytes | impressions, a second "
        "| seconds a seed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        records = json.loads((RESULTS / f"{name}.json").read_text())
        first = records[0]

        def over_seeds(values: list[float]) -> str:
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            return f"{statistics.mean(values):.2f} +- {spread:.2f}"

        controls = {
            name: [record["controls"][name]["accuracy"] for record in records if name in record["controls"]]
            for name in ("none", "noise")
        }
        shown = {name: over_seeds(values) if values else "-" for name, values in controls.items()}
        before, after = first["parameters"]["teacher"], first["parameters"]["student"]
        seconds = [record["seconds"]["total"] for record in records]
        rates = [record["impressions"]["impressions_per_second"] for record in records]
        lines.append(
            f"| `{name}` | {first['accuracy']['teacher']:.2f} "
            f"| **{over_seeds([r['accuracy']['student'] for r in records])}** "
            f"| {shown['none']} "
            f"| {shown['noise']} "
            f"| {before:,} -> {after:,} "
            f"| {first['bytes']['teacher']['onnx']:,} -> {first['bytes']['student']['onnx']:,} "
            f"| {first['impressions']['impressions']:,}, {statistics.median(rates):.0f} "
            f"| {statistics.median(seconds):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.recipes or sorted(path.stem for path in RESULTS.glob("*.json"))))
        return
    RESULTS.mkdir(exist_ok=True)
    for recipe in arguments.recipes:
        path = RESULTS / f"{recipe}.json"
        records = []
        for seed in arguments.seeds:
            records.append(run(recipe, seed, arguments.runs, arguments.threads))
            path.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
