"""Removes half of the channels of well-known networks: ``results/shrinking.json`` and ``docs/shrinking.md``.

    python benchmarks/shrinking.py                 # all networks
    python benchmarks/shrinking.py resnet18 vgg11_bn
    python benchmarks/shrinking.py --families      # those of the second table that are not measured yet
    python benchmarks/shrinking.py --families --again torchvision:resnet18 timm:lcnet_035
    python benchmarks/shrinking.py --table         # nothing is run: the page is written from results/

The config list is ``[{op_types: [Conv2d], sparse_ratio: 0.5}]`` alone. The layers that must lose the same channels are
found in each network's graph. The networks have random weights, and random statistics in their batch normalisations.
So a channel that is left behind would show in the logits. Parameter counts do not depend on weights.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from known_networks import CLONES, KNOWN, LINEAR, alone, build, randomised
from torch import nn

from zskd_nni.compression.pruning.dependency_config import plan_pruning
from zskd_nni.compression.pruning.speedup import ShrinkResult, shrink
from zskd_nni.data.sources import NoiseSource
from zskd_nni.models.build import build_network
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.onnx_export import export_onnx, onnx_bytes
from zskd_nni.models.teacher import Teacher
from zskd_nni.recipes.compression_config import QuantizationConfig
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import write_atomic
from zskd_nni.runtime.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCUMENT = ROOT / "results" / "shrinking.json", ROOT / "docs" / "shrinking.md"
CONFIG = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
SEED = 0
# Name -> how it is built, its arguments, the side of its images.
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    **{
        name: (f"torchvision:{name}", {}, 224)
        for name in (
            "resnet18",
            "resnet34",
            "mobilenet_v2",
            "vgg11_bn",
            "densenet121",
            "efficientnet_b0",
            "regnet_y_400mf",
            "shufflenet_v2_x1_0",
        )
    },
    "wrn-16-1": ("zoo:wrn", {"depth": 16, "width": 1}, 32),
    "wrn-40-2": ("zoo:wrn", {"depth": 40, "width": 2}, 32),
}

INT8 = [{"op_types": ["Conv2d", "Linear"], "target_names": ["_input_", "weight"], "quant_dtype": "int8"}]
WHY_OURS = [
    "Our channel flow stays for what it is used for here. It plans masks before anything is removed. NNI's pruners",
    "need its groups, its reasons for the layers that stay go into the report, and a network is distilled under the",
    "masks for thousands of steps before it is shrunk. The result then computes what was distilled. DepGraph removes",
    "channels at once and compares nothing. In front of a LayerNorm it removes more than we do: the mean of those that",
    "are left is not the mean of all, which is harmless if training follows, and wrong after it. Where DepGraph is",
    "right it is much faster: it follows the graph once, while NNI's `ModelSpeedup` runs every node on random images.",
]
LIMIT = 300.0  # seconds for one network of the second table


def measure_family(name: str, clones: Path | None, with_exports: bool = True) -> dict[str, Any]:
    """Prune and shrink one network of the second table, and export it; or one sentence why not."""
    network, side = build(name, clones), KNOWN[name].side
    spec = InputSpec((3, side, side))
    row: dict[str, Any] = {"network": name, "side": side, "cpu": True}
    row["before"] = sum(parameter.numel() for parameter in network.parameters())
    started = time.process_time()
    try:
        result = _shrunken(network, spec, name in LINEAR)
        row |= {"after": result.parameters_after, "max_logit_difference": result.max_logit_difference}
        row["seconds"] = round(time.process_time() - started, 1)
        if with_exports:
            row |= exports(result.model, spec)
    except UserError as error:
        row["why_not"] = getattr(error, "reason", str(error))  # without the advice that is followed here
        row["seconds"] = round(time.process_time() - started, 1)
    return row


def _shrunken(network: nn.Module, spec: InputSpec, linear: bool) -> ShrinkResult:
    from nni.compression.pruning import L1NormPruner

    images = spec.midpoint(2)
    # NNI asks for the very name of a class, so that derived ones are named too.
    convolutions = {type(module).__name__ for module in network.modules() if isinstance(module, nn.Conv2d)}
    config = [{"op_types": [*sorted(convolutions), *["Linear"] * linear], "sparse_ratio": 0.5}]
    plan = plan_pruning(network, config, images)
    pruner = L1NormPruner(network, plan.config_list)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return shrink(network, masks, images, graph=plan.graph)


def exports(network: nn.Module, spec: InputSpec) -> dict[str, Any]:
    """The differences between onnxruntime and PyTorch, in floating point and in int8, or why there is no file."""
    from zskd_nni.compression.quantization.qdq_onnx import export_quantized_onnx
    from zskd_nni.compression.quantization.quantize import quantize

    row: dict[str, Any] = {}
    images = torch.rand(8, *spec.shape, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        try:
            row["onnx_difference"] = export_onnx(network, spec, file, images)
            row["onnx_bytes"] = file.stat().st_size
        except UserError as error:
            row["onnx_why_not"] = str(error)
        try:
            config = QuantizationConfig(INT8, quantizer="PtqQuantizer", calibration_images=32)
            quantized = quantize(network, config, Teacher(network, spec), NoiseSource(spec, 16))
            # Random weights have no clear winners: the difference says more than the classes.
            written = export_quantized_onnx(quantized, spec, file, images, least_agreement=0.0)
            row |= {"int8_difference": written.max_logit_difference, "int8_bytes": written.bytes}
        except UserError as error:
            row["int8_why_not"] = str(error)
    return row


def is_measured(row: dict[str, Any] | None, with_exports: bool) -> bool:
    """Whether nothing is missing in a row of the second table."""
    if row is None:
        return False
    exported = any(key in row for key in ("onnx_difference", "onnx_why_not"))
    return "why_not" in row or exported or not with_exports


def measure_families(
    names: list[str], again: bool, clones: Path | None, limit: float, with_exports: bool = True
) -> dict[str, Any]:
    """Measure what the record lacks of the networks of the second table, and write it after each."""
    for package in ("timm", "transformers", "nni.compression.pruning", "onnxscript"):
        importlib.import_module(package)  # once, not in every process
    if with_exports:
        onnx_bytes(nn.Conv2d(3, 1, 1), InputSpec((3, 2, 2)))  # the exporter lists its operators, once too
    for name in names or KNOWN:
        record = json.loads(RESULTS.read_text())  # the other command writes it too
        rows = {row["network"]: row for row in record.get("families", [])}
        cloned = name.partition(":")[0] in CLONES
        if (is_measured(rows.get(name), with_exports) and not again) or (cloned and clones is None):
            continue
        work = functools.partial(measure_family, with_exports=with_exports)
        row = {**alone(work, name, clones, limit), "provenance": provenance("cpu", SEED)}
        print({key: value for key, value in row.items() if key != "provenance"}, flush=True)
        record = json.loads(RESULTS.read_text())
        rows = {row["network"]: row for row in record.get("families", [])} | {name: row}
        record["families"] = [rows[each] for each in KNOWN if each in rows]
        write_atomic(RESULTS, json.dumps(record, indent=1) + "\n")
    return json.loads(RESULTS.read_text())


def families_section(record: dict[str, Any]) -> list[str]:
    """The second table of the page; nothing where nothing is measured."""
    rows = record.get("families", [])
    if not rows:
        return []
    others = {row["network"]: row for row in record.get("depgraph", [])}
    reasons: dict[str, int] = {}
    table = [_family_line(row, others.get(row["network"]), reasons) for row in rows]
    return [
        "## Families",
        "",
        *_family_counts(rows),
        "",
        "A name begins with the package or the public repository that has the network. Networks have random weights",
        "from one seed and 10 classes, or as many as the repository gives them; those of transformers are small ones.",
        "The config names Conv2d, and the classes derived from it that the network has. A + stands for one that names",
        "Linear beside it: what the convolutions make is normalised over the channels there, so that they stay.",
        "*Left* is the share of the parameters. The difference is the largest between the logits of the masked and the",
        "shrunken network, relative to the largest logit. The columns of ONNX are onnxruntime's differences on the",
        "shrunken network: in floating point from PyTorch, in int8 (`PtqQuantizer`, inputs and weights of convolutions",
        "and linear layers) from NNI's simulation. A step at which a value is rounded the other way shows there.",
        *_about_seconds(rows),
        "",
        '<div class="dense" markdown>',
        "",
        "| network | side | parameters | after | left | difference | ONNX | int8 | s "
        "| DepGraph: left | difference | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *table,
        "",
        "</div>",
        "",
        "Why not, by the numbers in brackets:",
        "",
        *(f"{number}. {said[0].upper()}{said[1:].rstrip('.')}." for said, number in reasons.items()),
        "",
        *_depgraph_section(record, others),
        "`python benchmarks/shrinking.py --families --clones CLONES` measures what is missing; the first lines of",
        "`benchmarks/known_networks.py` say how the clones get into the folder.",
        "`python benchmarks/depgraph.py --clones CLONES` makes the last columns.",
        "",
    ]


def _about_seconds(rows: list[dict[str, Any]]) -> list[str]:
    """What the seconds are, and whether some are still the clock's."""
    lines = ["Seconds are those of one CPU core, for planning, pruning, shrinking and checking."]
    clock = [f"`{row['network']}`" for row in rows if "cpu" not in row]
    if clock:
        lines.append(f"Those of {', '.join(clock)} are the clock's on a busy machine.")
    if not all(is_measured(row, with_exports=True) for row in rows):
        lines.append("A dash: not measured yet.")
    return lines


def _family_counts(rows: list[dict[str, Any]]) -> list[str]:
    shrunk = sum("after" in row for row in rows)
    convolutional = [row for row in rows if KNOWN[row["network"]].convolutional]
    third = sum(by_a_third(row) for row in convolutional)
    share = 100 * third / max(1, len(convolutional))
    return [
        f"{shrunk} of these {len(rows)} networks are shrunk. {third} of the {len(convolutional)} convolutional ones "
        f"({share:.0f} %)",
        "lose a third of their parameters or more. The others stay as they are, for a reason named below the table.",
    ]


def by_a_third(row: dict[str, Any]) -> bool:
    """Whether a network has lost a third of its parameters or more."""
    return "after" in row and row["after"] <= 2 / 3 * row["before"]


def _family_line(row: dict[str, Any], other: dict[str, Any] | None, reasons: dict[str, int]) -> str:
    """A row. A reason gets a number, and stands below the table: a sentence would make its column wide."""

    def numbered(reason: str) -> str:
        return "-" if reason == "-" else f"no ({reasons.setdefault(one_line(reason), len(reasons) + 1)})"

    before = f"{row['before']:,}" if "before" in row else "-"
    linear = " +" if row["network"] in LINEAR else ""
    cells = [f"`{row['network']}`{linear}", str(row.get("side", "-")), before, *_shrunk_cells(row)]
    if "after" not in row:
        cells[3] = numbered(row.get("why_not") or "-")
    for kind in ("onnx", "int8"):
        difference, why_not = row.get(f"{kind}_difference"), row.get(f"{kind}_why_not", "-")
        cells.append(numbered(why_not) if difference is None else f"{difference:.0e}")
    cells.append(f"{row['seconds']:.0f}")
    if other is None:
        cells += ["-"] * 3
    elif "after" in other:
        left = 100 * other["after"] / other["before"]
        cells += [f"{left:.0f}\u00a0%", _difference(other["max_logit_difference"]), f"{other['seconds']:.1f}"]
    else:
        cells += [numbered(other["why_not"]), "-", f"{other['seconds']:.1f}"]
    return f"| {' | '.join(cells)} |"


def _times(count: int) -> str:
    return {0: "never", 1: "once"}.get(count, f"{count} times")


def _depgraph_section(record: dict[str, Any], others: dict[str, dict[str, Any]]) -> list[str]:
    """What the two columns add up to, and why our channel flow stays."""
    rows = record["families"]
    both = [(row, others[row["network"]]) for row in rows if row["network"] in others]
    if not both:
        return []
    right = [(row, other) for row, other in both if other.get("max_logit_difference", 1.0) <= 1e-4]
    further = sum(min(row.get("after", row["before"]), other["before"]) > 1.02 * other["after"] for row, other in right)
    ours = [row for row, _ in both if "after" in row]
    less = sum(row["after"] * 1.02 < other["after"] for row, other in right if "after" in row)
    wrong = [other for _, other in both if other.get("max_logit_difference", 0.0) > 1e-4]
    failed = sum("why_not" in other for _, other in both)
    seconds = [(row["seconds"], other["seconds"]) for row, other in right if "after" in row and "cpu" in row]
    quicker = statistics.median(a / max(b, 0.1) for a, b in seconds) if seconds else None
    quick = f" Ours takes {quicker:.0f} times the seconds of DepGraph (median)." if quicker is not None else ""
    return [
        "### Beside Torch-Pruning's DepGraph",
        "",
        f"Both were given {len(both)} of these networks. Ours shrinks {len(ours)}, all exactly. DepGraph returns",
        f"{len(both) - failed}. Of these {len(right)} compute what the original does when the same channels are zero,",
        f"and {len(wrong)} differ from that by more than 1e-4; {failed} end in an exception or do not run afterwards.",
        f"Where DepGraph is right, its network is the smaller one {_times(further)}, and ours {_times(less)}.{quick}",
        "",
        *_lines_of_code(record.get("lines_of_code", {})),
        *WHY_OURS,
        "",
    ]


def _lines_of_code(counts: dict[str, int]) -> list[str]:
    if not counts:
        return []
    return [
        "Lines of code, without comments: "
        + ", ".join(f"{name} {count:,}" for name, count in counts.items())
        + ". NNI's `ModelSpeedup` is part of NNI.",
        "",
    ]


def _shrunk_cells(row: dict[str, Any]) -> list[str]:
    if "after" not in row:
        return ["-"] * 3
    left = 100 * row["after"] / row["before"]
    return [f"{row['after']:,}", f"{left:.0f}\u00a0%", _difference(row["max_logit_difference"])]


def _difference(value: float) -> str:
    return f"{value:.0e}" if value < 1e6 else "not finite"


def one_line(text: str) -> str:
    """A sentence that a cell of a table can hold."""
    return " ".join(text.split()).replace("|", "/")


def measure(name: str) -> dict[str, Any]:
    """Prune, shrink and export one network."""
    from nni.compression.pruning import L1NormPruner

    factory, arguments, side = NETWORKS[name]
    torch.manual_seed(SEED)
    network = randomised(build_network(factory, arguments, None)).eval()
    spec = InputSpec((3, side, side))
    started = time.monotonic()
    plan = plan_pruning(network, CONFIG, spec.midpoint(2))
    pruner = L1NormPruner(network, plan.config_list)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    result = shrink(network, masks, spec.midpoint(2))
    return {
        "network": name,
        "model": factory,
        "arguments": arguments,
        "input": [3, side, side],
        "parameters": {"before": result.parameters_before, "after": result.parameters_after},
        "onnx_bytes": {"before": len(onnx_bytes(network, spec)), "after": len(onnx_bytes(result.model, spec))},
        "max_logit_difference": result.max_logit_difference,
        "argmax_agreement": result.argmax_agreement,
        "left_out": plan.left_out,
        "note": result.note,
        "seconds": round(time.monotonic() - started, 1),
    }


def document(record: dict[str, Any]) -> str:
    """The text of ``docs/shrinking.md`` from the measurements."""
    rows = [
        f"| `{row['network']}` | {row['parameters']['before']:,} | {row['parameters']['after']:,} "
        f"| {100 * row['parameters']['after'] / row['parameters']['before']:.1f}\u00a0% "
        f"| {row['onnx_bytes']['before']:,}\u00a0→\u00a0{row['onnx_bytes']['after']:,} "
        f"| {row['max_logit_difference']:.1e} | {row['seconds']:.0f} |"
        for row in record["networks"]
    ]
    lines = [
        "# Shrinking well-known networks",
        "",
        "Half of the channels of every convolution are chosen by `L1NormPruner` and removed. The user writes one",
        f"line, `{json.dumps(record['config_list'])}`. Affected batch normalisations, residual",
        "additions, grouped and depthwise convolutions are found in the network's graph. Layers whose channels cannot",
        "be removed keep them, and so does the classifier.",
        "",
        "| network | parameters | after | left | ONNX bytes | logit difference | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        "The logit difference is the largest between the masked and the shrunk network in `eval()` mode, relative to",
        "the largest logit. Above 1e-4 no network is returned. Networks of torchvision have 1,000 classes and images",
        "of 224 x 224, the others 10 classes and 32 x 32. Weights are random: this page is about shapes, not accuracy.",
        "Seconds are for pruning, shrinking, checking and both exports, on one CPU thread of a busy machine.",
        "",
        "From `results/shrinking.json`; `python benchmarks/shrinking.py` measures again and writes this page.",
        "",
        *families_section(record),
    ]
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--families", action="store_true", help="the second table")
    parser.add_argument("--clones", type=Path, help="the folder of the clones of known_networks.py")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for each network of the second table")
    parser.add_argument("--without-exports", action="store_true", help="leave ONNX for a later run")
    parser.add_argument("--again", action="store_true", help="also those that are measured already")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    known = KNOWN if arguments.families else NETWORKS
    unknown = [name for name in arguments.networks if name not in known]
    if unknown:
        parser.error(f"there is no network {unknown[0]} here; there are {', '.join(known)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"networks": []}
    if arguments.families and not arguments.table:
        record = measure_families(
            arguments.networks, arguments.again, arguments.clones, arguments.limit, not arguments.without_exports
        )
    elif not arguments.table:
        rows = {row["network"]: row for row in record["networks"]}
        for name in arguments.networks or NETWORKS:
            rows[name] = {**measure(name), "provenance": provenance("cpu", SEED)}
            print(f"{name}: {rows[name]['parameters']}, {rows[name]['seconds']} s", flush=True)
            ordered = [rows[name] for name in NETWORKS if name in rows]
            record |= {"config_list": CONFIG, "pruner": "L1NormPruner", "networks": ordered}
            RESULTS.parent.mkdir(exist_ok=True)
            write_atomic(RESULTS, json.dumps(record, indent=1) + "\n")
    write_atomic(DOCUMENT, document(record))


if __name__ == "__main__":
    main()
