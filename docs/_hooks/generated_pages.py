"""Pages and parts of pages that are made of other files, and a navigation without what does not exist.

``<!-- results: COLUMNS -->`` in a page becomes the table of all result files, ``COLUMNS`` (names, separated by
semicolons) of it, or all. ``<!-- smallest students: COLUMNS -->`` becomes a row for each data set. The changelog page
is ``CHANGELOG.md``; the page of the packaged recipes' results is here.
"""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
_SIDES = ("before", "after")
OPTIONAL = ("benchmarks.md", "results.md")
TUTORIALS = "tutorials"
_RESULTS = re.compile(r"<!-- results:(?P<columns>[^>]*)-->")
_SMALLEST = re.compile(r"<!-- smallest students:(?P<columns>[^>]*)-->")
_BENCHMARKS = "<!-- benchmarks -->"
_LADDER = "<!-- ladder -->"
_EQUAL_FIT = "<!-- equal fit -->"
_MANY_WORKERS = "<!-- many workers -->"
_LARGER_TASK = "<!-- larger task -->"
_COSTS = "<!-- costs -->"
_LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<to>[^)#]+)[^)]*\)")  # one to no page of the site stays as its text
_WIDE = {  # pages whose tables or pictures need the place of the links beside them
    "howto/explorer.md": ["toc"],
    "recipe-results.md": ["navigation", "toc"],
    "reliability.md": ["toc"],
    "shrinking.md": ["navigation", "toc"],
}
_RESULTS_PAGE = """# Results of the packaged recipes

The plots show mean test accuracy against the size of the ONNX file. Each number is a recipe in one precision, listed
below its plot. The precision is fp32 (floating point), int8, or for instance W4A8: weights of 4 bits, activations of 8.
[The home page](index.md#what-it-gains) says what the plots show, and
[I have a ResNet and no data](howto/own-teacher.md) how to do the same with a network of your own.

<!-- chart: accuracy and bytes -->

The table has the figures: test accuracy in percent after the last step, mean and standard deviation over seeds 0, 1
and 2. A figure without a deviation is that of seed 0, and the figures of `cifar10-half-quick` with real data are those
of seeds 1 and 2.

- *student* was trained from the teacher's weights alone.
- *with real data* is the same recipe on the training images, the upper limit.
- The controls are the same student without distillation, distilled on uniform noise, and distilled on dead leaves
  (procedural images that fill the frame). Recipes without distillation are calibrated on such images instead.

A recipe that trains and quantizes has two rows. All students of a row have the same precision.

<div class="dense" markdown>

<!-- results: recipe; precision; teacher; student; with real data; not distilled; on noise; on leaves; parameters;
ONNX bytes; seconds per seed -->

</div>

The settings of the CIFAR-10 recipes were chosen on the last 5,000 training images, with a teacher that was trained on
the other 45,000. Those of the other recipes were chosen on a validation slice of Fashion-MNIST's training split. The
schedules of the MNIST recipes and of `fashion-mnist-taylor50` were lengthened after shorter runs had been measured on
test data. `mnist-ptq8` and `cifar10-ptq8` have NNI's defaults.

The figures are read from `results/*.json` when this page is built; each file says with which commit, versions, device
and recipe it was made.
"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in the tutorials and leave out pages that are not there."""
    docs = Path(config.docs_dir)
    notebooks = sorted(f"{TUTORIALS}/{path.name}" for path in (docs / TUTORIALS).glob("*.ipynb"))

    def pruned(entry: Any) -> Any:
        if isinstance(entry, list):
            return [kept for part in entry if (kept := pruned(part)) is not None]
        if isinstance(entry, dict):
            inside = {title: kept for title, part in entry.items() if (kept := pruned(part)) is not None}
            return inside or None
        if entry == TUTORIALS:
            return notebooks or None
        return None if entry in OPTIONAL and not (docs / entry).exists() else entry

    config.nav = pruned(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")  # seen from the site
    known = {file.src_uri for file in files}
    changes = _LINK.sub(lambda link: link[0] if link["to"] in known or ":" in link["to"] else link["text"], changes)
    files.append(File.generated(config, "changelog.md", content=changes))
    files.append(File.generated(config, "recipe-results.md", content=_RESULTS_PAGE))
    return files


def on_page_markdown(markdown: str, page: Any = None, **_: Any) -> str:
    """Put the tables in."""
    if page is not None and page.file.src_uri in _WIDE:
        page.meta.setdefault("hide", _WIDE[page.file.src_uri])
    if _BENCHMARKS in markdown:
        markdown = markdown.replace(_BENCHMARKS, benchmarks_table()).replace(_LADDER, ladder_table())
        markdown = markdown.replace(_EQUAL_FIT, equal_fit_table()).replace(_LARGER_TASK, larger_task_table())
        markdown = markdown.replace(_COSTS, costs_table())
    if _MANY_WORKERS in markdown:
        markdown = markdown.replace(_MANY_WORKERS, many_workers_table())
    markdown = _SMALLEST.sub(lambda match: smallest_table(match["columns"]), markdown)
    return _RESULTS.sub(lambda match: results_table(match["columns"]), markdown)


def many_workers_table() -> str:
    """The Markdown table of ``results/bench-many-workers.json``."""
    content = json.loads((ROOT / "results" / "bench-many-workers.json").read_text())
    measured, rows = content["measured"], content["simulated"]
    seconds = sorted(measured["shard_seconds"])
    shares = ("useful", "lost", "starting", "idle")
    lines = [
        "| a worker fails | workers | hours | restarts | useful work | lost shards | starts | waiting for the last |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [f"{round(100 * row[name], 1) + 0.0:.1f} %" for name in shares]  # no -0.0
        told = (row["failures"], str(row["workers"]), f"{row['hours']:,.2f}", f"{row['restarts']:,.1f}", *cells)
        lines.append(f"| {' | '.join(told)} |")
    quickest, median, slowest = seconds[0], seconds[len(seconds) // 2], seconds[-1]
    facts = (
        f"Measured, in seconds of one core's time: {len(seconds)} shards of {measured['impressions_a_shard']:,} "
        f"impressions of `{measured['recipe']}`, {quickest:.1f} to {slowest:.1f} s each (median {median:.1f} s), "
        f"{measured['start_seconds']:.1f} s for a process's start, "
        f"{1000 * measured['check_seconds_a_shard']:.1f} ms to check a shard, {measured['manifest_seconds']:.1f} s to "
        f"write a manifest of {content['assumed']['shards']:,} shards once."
    )
    return "\n".join([*lines, "", facts])


def benchmarks_table() -> str:
    """The Markdown table of ``results/bench-cpu.json``, ``bench-cuda.json`` and ``bench-memory.json``."""
    titles = {"cpu": "CPU", "cuda": "CUDA"}
    found: dict[str, dict[str, Any]] = {}
    sources = []
    for device in titles:
        names = (device, "memory") if device == "cpu" else (device,)
        paths = [ROOT / "results" / f"bench-{name}.json" for name in names]
        for record in [record for path in paths if path.exists() for record in json.loads(path.read_text())]:
            found.setdefault(record["name"], {})[device] = record
            source = record["provenance"]
            sources.append(f"{source['device']}, {source['threads']} threads, torch {source['versions']['torch']}")
    if not found:
        return "No result is recorded yet; `make bench` makes one."
    devices = [device for device in titles if any(device in records for records in found.values())]
    heads = " | ".join(f"{titles[device]}: ratio | target | ours and theirs" for device in devices)
    lines = [f"| what | {heads} |", f"| --- |{' --- | --- | --- |' * len(devices)}"]
    for name, records in found.items():
        cells = [name]
        for device in devices:
            record = records.get(device)
            if record is None:
                cells += ["not run", "", ""]
                continue
            target = "" if record["target"] is None else f"{record['target']:g}"
            target = f"at most {target}" if record.get("at_most") else target
            figures = f"{_figure(record['ours'])} and {_figure(record['theirs'])} {record['unit']}"
            if "of_matrix_peak" in record:
                figures += f", {100 * record['of_matrix_peak']:.3g} % of the matrix peak"
            cells += [f"**{record['ratio']:g}**", target, figures]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Measured on: {'; '.join(dict.fromkeys(sources))}."])


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def equal_fit_table() -> str:
    """The Markdown table of ``results/bench-equal-fit.json``, means over seeds."""
    path = ROOT / "results" / "bench-equal-fit.json"
    records = json.loads(path.read_text()) if path.exists() else []
    if not records:
        return "No result is recorded yet; `python benchmarks/equal_fit.py` makes one."
    lines = ["| teacher | impressions of | steps | mean fit | student's accuracy |", "| --- | --- | --- | --- | --- |"]
    for name in dict.fromkeys(record["name"] for record in records):
        of_teacher = [record for record in records if record["name"] == name]
        for side in (side for side in of_teacher[0] if side == "published" or side.startswith("engine, ")):
            steps, fits, accuracies = (
                [record[side][key] for record in of_teacher] for key in ("steps", "fit", "accuracy")
            )
            maker = "the published loop" if side == "published" else f"the {side}"
            told = "; ".join(
                ", ".join(f"{accuracy:.2f}" for accuracy in record[side]["accuracies"]) for record in of_teacher
            )
            lines.append(
                f"| {name} | {maker} | {mean(steps):.4g} | {mean(fits):.3f} | **{mean(accuracies):.2f}** ({told}) |"
            )
    sizes = {
        f"{record['name']}: {record['impressions']} impressions, {record['student_steps']} steps of the student, "
        f"{record['measured_on']}"
        for record in records
    }
    return "\n".join([*lines, "", f"In brackets the two students of each seed. {'; '.join(sorted(sizes))}."])


def ladder_table() -> str:
    """The Markdown table of ``results/bench-ladder-cpu.json`` and ``results/bench-ladder-cuda.json``."""
    lines = []
    for device in ("cpu", "cuda"):
        path = ROOT / "results" / f"bench-ladder-{device}.json"
        for record in json.loads(path.read_text()) if path.exists() else []:
            told = [", ".join(f"{kind} {share:.0%}" for kind, share in _largest(record[side])) for side in _SIDES]
            cells = [record["what"], record["change"], f"**{record['ratio']:g}**", *told]
            lines.append(f"| {device} | {' | '.join(cells)} |")
    if not lines:
        return "No result is recorded yet; `make bench` makes one."
    head = [
        "| device | what | change | ratio | where the time went before | and after |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *lines])


def larger_task_table() -> str:
    """The Markdown table of ``results/bench-larger-task.json``."""
    path = ROOT / "results" / "bench-larger-task.json"
    lines = ["| stage | of | seconds each | minutes | peak memory |", "| --- | --- | --- | --- | --- |"]
    for record in json.loads(path.read_text()):
        amount = f"{record['units']:,} {record['unit']}s" if record["unit"] == "image" else f"{record['units']} steps"
        seconds, minutes = f"{record['seconds_a_unit']:.2g}", f"{record['minutes']:.2g}"
        lines.append(f"| {record['name']} | {amount} | {seconds} | {minutes} | {record['peak_mib'] / 1024:.1f} GiB |")
    return "\n".join(lines)


def costs_table() -> str:
    """The Markdown table of ``results/bench-costs.json``."""
    path = ROOT / "results" / "bench-costs.json"
    lines = ["| what | measured | limit |", "| --- | --- | --- |"]
    for row in json.loads(path.read_text()) if path.exists() else []:
        limit = f"at most {row['most']:g}" if "most" in row else f"at least {row['least']:,}"
        kept = row["value"] <= row["most"] if "most" in row else row["value"] >= row["least"]
        value = f"{row['value']:,.3g}" if row["value"] < 1000 else f"{row['value']:,.0f}"
        lines.append(f"| {row['what']} | {value if kept else f'**{value}**'} {row['unit']} | {limit} |")
    return "\n".join(lines)


def _largest(shares: dict[str, float]) -> list[tuple[str, float]]:
    """The kinds that take a twentieth of the time or more, the largest first."""
    return sorted(((kind, share) for kind, share in shares.items() if share >= 0.05), key=lambda entry: -entry[1])


def results_table(columns: str = "") -> str:
    """The Markdown table of ``results/*.json``, as ``benchmarks/packaged_recipes.py --table`` prints it."""
    recipes = packaged_recipes()
    return _typeset(recipes.table([entry.stem for entry in recipes.recipe_results()]), columns)


def smallest_table(columns: str = "") -> str:
    """Of each data set but the digits the recipe whose student's file is the smallest, and its row."""
    recipes = packaged_recipes()
    smallest: dict[str, tuple[int, bool, str, bool]] = {}
    for path in recipes.recipe_results():
        first = json.loads(path.read_text())[0]
        sizes, data = first["bytes"]["student"], first["recipe"]["evaluation"]["data"]
        quantized = sizes["onnx_int8"] is not None
        # Of files of one size the one that has a twin on real data, then the first by name.
        row = (sizes["onnx_int8"] or sizes["onnx"], "real_data" not in first, path.stem, quantized)
        smallest[data] = min(row, smallest.get(data, row))
    lines: list[str] = []
    for data, (_, _, name, quantized) in smallest.items():
        if data != "digits":
            head, rule, *rows = recipes.table([name]).splitlines()
            lines = [*(lines or [head, rule]), rows[-1] if quantized else rows[0]]
    return _typeset("\n".join(lines), columns)


def _typeset(lines: str, columns: str) -> str:
    wanted = [name.strip() for name in columns.split(";") if name.strip()]
    lines = packaged_recipes().chosen_columns(lines, wanted) if wanted else lines
    return lines.replace(" +- ", "\u00a0±\u00a0").replace(" -> ", "\u00a0→\u00a0")


@cache
def packaged_recipes() -> Any:
    """The script ``benchmarks/packaged_recipes.py``."""
    path = ROOT / "benchmarks" / "packaged_recipes.py"
    spec = importlib.util.spec_from_file_location("packaged_recipes", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
