"""Run packaged recipes over seeds and keep their figures: ``results/RECIPE.json``, one record per seed.

    python benchmarks/packaged_recipes.py mnist-half mnist-prune50 fashion-mnist-half digits-prune50 --seeds 0 1 2

Real test data is found as the command line finds it (``ZSKD_NNI_DATA``). Every run is a ``zskd-nni compress`` in its
own process and folder below ``--runs``; a finished one is not run again, a stopped one continues. Seeds that were run
before stay in the file if their recipe was the same. With ``--images-of`` recipes for one teacher share their images.

With ``--real-data`` each run is followed by the same recipe on real training images. Its figures are kept in the
record as ``real_data``: the upper limit. If the recipe trains, it gets the whole training split. If it only
calibrates, it gets as many images as the recipe has impressions.

With ``--also N`` a quarter of each batch is drawn from N images of the training split, as if they were a user's own.
Such a student is not data-free; its row is ``RECIPE-SCALE-alsoN``.

With ``--table`` nothing is run: the table of what is in ``results/`` is printed. With ``--readme`` it is written into
README.md: the rows that the comment above README's table names (``cifar10-*`` for all of a kind), and its columns.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zskd_nni.data.datasets import load_images
from zskd_nni.pipeline.comparison import bits_of
from zskd_nni.recipes.load import load_recipe
from zskd_nni.recipes.schema import completed
from zskd_nni.runtime.files import make_folder, write_atomic, write_json

RESULTS = Path(__file__).resolve().parent.parent / "results"
README = RESULTS.parent / "README.md"
TRAINING_IMAGES = {"digits": 1437, "mnist": 60000, "fashion-mnist": 60000, "cifar10": 50000}
# What results of other benchmarks begin with.
OTHERS = ("shrinking", "bench-", "colour-parts", "rivals-", "time-to-accuracy")
ORDER = ("cifar10-", "fashion-mnist-", "mnist-", "digits-")  # of a table's rows; others come after them
KEPT = (
    "name",
    "accuracy",
    "agreement",
    "agreement_on",
    "agreement_held_out",
    "agreement_neutral",
    "agreements",
    "agreement_onnx",
    "latency_ms",
    "quantization",
    "parameters",
    "bytes",
    "controls",
    "pruning",
    "impressions",
    "seconds",
    "onnx_difference",
    "recipe",
    "provenance",
)
KEPT_OF_REAL_DATA = (
    "accuracy",
    "agreement",
    "agreement_held_out",
    "agreement_neutral",
    "agreement_int8",
    "seconds",
)


def run(
    recipe: str, seed: int, folder: Path, options: list[str], real_data: bool, images: Path | None = None
) -> dict[str, Any]:
    """Run a recipe with one seed, and if ``real_data`` says so also on real images; each in its own process.

    ``images`` is a finished store to train on. The record's seconds then include those of making it.
    """
    given = ["--impressions", str(images)] if images else []
    report = compress(recipe, folder, ["--seed", str(seed), *options, *given])
    if images:
        check_same_transfer(report, folder)
        report["seconds"]["total"] = round(report["seconds"]["total"] + report["impressions"]["seconds"], 2)
    record = {key: report.get(key) for key in KEPT}
    if real_data:
        data = report["evaluation"]
        changes = ["transfer.method=real", f"transfer.data={data}", "transfer.fresh=null", "controls=[]"]
        if not only_calibrates(report):
            changes.append(f"transfer.size={TRAINING_IMAGES[data] - report['recipe']['transfer']['held_out']}")
        settings = [word for change in changes for word in ("--set", change)]
        real = compress(recipe, folder.with_name(f"{folder.name}-real"), ["--seed", str(seed), *options, *settings])
        record["real_data"] = {key: real.get(key) for key in KEPT_OF_REAL_DATA}
        record["real_data"]["images"] = real["recipe"]["transfer"]["size"]
        if report["pruning"]:
            record["real_data"]["channels_in_common"] = in_common(
                report["pruning"]["removed_channels"], real["pruning"]["removed_channels"]
            )
    return record


def compress(recipe: str, out: Path, options: list[str]) -> dict[str, Any]:
    """Run a recipe, or resume it, and return its report."""
    subprocess.run([sys.executable, "-m", "zskd_nni", "compress", recipe, "--out", str(out), *options], check=True)
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def own_images(data: str, count: int, seed: int, folder: Path) -> Path:
    """A file of ``count`` images of the training split, drawn by the seed, without labels: a user's own images."""
    images = load_images(data, "train").images
    chosen = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]]
    path = folder / f"{data}-{count}-own-images-seed{seed}.npz"
    np.savez(path, images=(chosen[:, 0] if chosen.shape[1] == 1 else chosen.permute(0, 2, 3, 1)).numpy())
    return path


def check_same_transfer(report: dict[str, Any], folder: Path) -> None:
    """Stop where given images are not those that the recipe would have made.

    Its held-out impressions are made by the recipe itself, with another seed and size.
    """
    given, recipe = report["impressions"]["given"], report["recipe"]
    own = json.loads((folder / "impressions-held-out" / "manifest.json").read_text())["identity"]
    wanted = {**own, "size": recipe["transfer"]["size"], "seed": recipe["seed"]}
    other = [key for key, value in wanted.items() if given.get(key) != value]
    if other:
        raise SystemExit(f"--images-of: the given images differ in {', '.join(other)} from those of {report['name']}.")


def in_common(one: dict[str, list[int]], other: dict[str, list[int]]) -> dict[str, list[int]]:
    """For each layer: how many channels both runs removed, and how many the first did."""
    return {name: [len(set(gone) & set(other.get(name, []))), len(gone)] for name, gone in one.items()}


def with_record(records: list[dict[str, Any]], record: dict[str, Any]) -> list[dict[str, Any]]:
    """The records with this one added, by seed. It replaces that of its seed; those of another recipe are dropped."""

    def but_for_the_seed(one: dict[str, Any]) -> dict[str, Any]:
        return {**completed(one["recipe"]), "seed": None}  # a key that is newer than a record has its default there

    seeds = {one["recipe"]["seed"]: one for one in records if but_for_the_seed(one) == but_for_the_seed(record)}
    before = seeds.get(record["recipe"]["seed"], {})
    if "real_data" in before and "real_data" not in record:  # measured by an earlier call with --real-data
        record = {**record, "real_data": before["real_data"]}
    seeds[record["recipe"]["seed"]] = record
    return [seeds[seed] for seed in sorted(seeds)]


def recipe_results() -> list[Path]:
    """The result files of recipes, without those of other benchmarks: colour first, then by name."""
    own = [path for path in RESULTS.glob("*.json") if not path.stem.startswith(OTHERS)]
    return sorted(own, key=lambda path: (*(not path.stem.startswith(start) for start in ORDER), path.stem))


CONTROLS = ("none", "noise", "leaves")
HEAD = (
    "| recipe | precision | teacher | student | with real data | not distilled | on noise | on leaves | parameters "
    "| ONNX bytes | impressions, per second | seconds per seed |"
)


def chosen_columns(lines: str, wanted: list[str]) -> str:
    """Some columns of a Markdown table, in the order of ``wanted``.

    Raises:
        ValueError: the table has no column of that name.
    """
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]
    missing = [name for name in wanted if name not in rows[0]]
    if missing:
        raise ValueError(f"the table of results has no column {missing[0]!r}; it has {', '.join(rows[0])}")
    places = [rows[0].index(name) for name in wanted]
    return "\n".join("| " + " | ".join(row[place] for place in places) + " |" for row in rows)


def table(names: list[str]) -> str:
    """A Markdown table, mean and standard deviation over the seeds of each recipe.

    A recipe that quantizes has two rows, unless it only calibrates: its student in floating point is the teacher. In
    each row all students have the same precision.
    """
    lines = [HEAD, "| " + " | ".join(["---"] * HEAD.count(" | ")) + " | --- |"]
    for name in names:
        if not (RESULTS / f"{name}.json").exists():
            raise SystemExit(f"There is no results/{name}.json; a recipe at a scale is named RECIPE-SCALE here.")
        records = json.loads((RESULTS / f"{name}.json").read_text())
        if not only_calibrates(records[0]):
            lines.append(row(name, records, "fp32", ""))
        if records[0]["accuracy"].get("student_int8") is not None:
            precision = bits_of(records[0]["recipe"]["compression"]["quantization"])
            lines.append(row(name, records, precision, "_int8"))
    return "\n".join(lines)


_README_TABLE = re.compile(
    r"(<!-- table: (?P<names>[^;]*); (?P<columns>.*?) -->\n).*?(\n<!-- end of the table -->)", re.DOTALL
)


def with_table(text: str) -> str:
    """README.md with the tables of the present records."""

    def filled(match: re.Match[str]) -> str:
        patterns = match["names"].split()
        names = [path.stem for path in recipe_results() if any(fnmatch(path.stem, one) for one in patterns)]
        return match[1] + "\n" + chosen_columns(table(names), match["columns"].split("; ")) + "\n" + match[4]

    new, count = _README_TABLE.subn(filled, text)
    if count != 2:
        raise SystemExit(
            f"README.md has {count} of its two '<!-- table: NAMES; COLUMNS -->' with '<!-- end of the table -->'."
        )
    return new


def only_calibrates(record: dict[str, Any]) -> bool:
    """Whether the recipe of a record trains nothing."""
    compression = record["recipe"]["compression"]
    trained = record["recipe"]["student"] is not None or compression["pruning"] is not None
    return not trained and compression["quantization"]["quantizer"] == "PtqQuantizer"


def row(name: str, records: list[dict[str, Any]], precision: str, suffix: str) -> str:
    """One row of the table.

    Args:
        name: of the recipe.
        records: one a seed.
        precision: of the students.
        suffix: of their keys in the records.
    """
    first = records[0]
    controls = [
        over_seeds([r["controls"][kind][f"accuracy{suffix}"] for r in records] if kind in first["controls"] else [])
        for kind in CONTROLS
    ]
    student = over_seeds([r["accuracy"][f"student{suffix}"] for r in records])
    real = over_seeds([r["real_data"]["accuracy"][f"student{suffix}"] for r in records if "real_data" in r])
    before, after = first["parameters"]["teacher"], first["parameters"]["student"]
    sizes = [first["bytes"]["teacher"]["onnx"], first["bytes"]["student"][f"onnx{suffix}"]]
    rates = [r["impressions"]["impressions_per_second"] for r in records]
    seconds = statistics.median(r["seconds"]["total"] for r in records)
    cells = [
        *(f"`{name}`", precision, f"{first['accuracy']['teacher']:.2f}", f"**{student}**", real, *controls),
        *(f"{before:,} -> {after:,}", " -> ".join(f"{size:,}" for size in sizes)),
        *(f"{first['impressions']['impressions']:,}, {statistics.median(rates):.0f}", f"{seconds:.0f}"),
    ]
    return f"| {' | '.join(cells)} |"


def over_seeds(values: list[float | None]) -> str:
    """Mean and standard deviation; a dash where nothing was measured."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} +- {statistics.stdev(values):.2f}"


def parsed() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", help="cpu, cuda, or cuda:N, as of zskd-nni compress")
    parser.add_argument("--real-data", action="store_true", help="also run each recipe on real data")
    parser.add_argument(
        "--images-of",
        metavar="NAME",
        help="train on the impressions of a finished row: that of the same seed, teacher and settings of transfer",
    )
    parser.add_argument("--scale", help="a scale of the recipes; results/RECIPE-SCALE.json")
    parser.add_argument("--also", type=int, metavar="N", help="N of a user's own images beside the synthetic ones")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    return parser.parse_args()


def run_seeds(recipe: str, arguments: argparse.Namespace) -> None:
    """Run a recipe seed by seed, each time writing the records of its row."""
    options = [
        *(["--threads", str(arguments.threads)] if arguments.threads else []),
        *(["--device", arguments.device] if arguments.device else []),
        *(["--scale", arguments.scale] if arguments.scale else []),
    ]
    name = f"{recipe}-{arguments.scale}" if arguments.scale else recipe
    if arguments.also is not None:
        name = f"{name}-also{arguments.also}"
        options += ["--set", "controls=[]"]  # they are those of the row without own images
    path = RESULTS / f"{name}.json"
    records = json.loads(path.read_text()) if path.exists() else []
    for seed in arguments.seeds:
        folder = arguments.runs / f"{name}-seed{seed}"
        images = arguments.images_of and arguments.runs / f"{arguments.images_of}-seed{seed}" / "impressions"
        own = []
        if arguments.also is not None:
            data = load_recipe(recipe).recipe.evaluation.data
            also = own_images(data, arguments.also, seed, make_folder(arguments.runs))
            own = ["--set", f"transfer.also={also.resolve()}"]
        record = run(recipe, seed, folder, [*options, *own], arguments.real_data, images)
        if arguments.also is not None:
            record["recipe"]["transfer"]["also"] = f"{arguments.also} images of the training split"
        records = with_record(records, record)
        write_json(path, records)


def main() -> None:
    """Print or write the table, or run the recipes."""
    arguments = parsed()
    if arguments.table:
        print(table(arguments.recipes or [path.stem for path in recipe_results()]))
    elif arguments.readme:
        write_atomic(README, with_table(README.read_text()))
    else:
        RESULTS.mkdir(exist_ok=True)
        for recipe in arguments.recipes:
            run_seeds(recipe, arguments)


if __name__ == "__main__":
    main()
