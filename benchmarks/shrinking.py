"""Removes half of the channels of well-known networks: ``results/shrinking.json`` and ``docs/shrinking.md``.

    python benchmarks/shrinking.py                 # all networks
    python benchmarks/shrinking.py resnet18 vgg11_bn
    python benchmarks/shrinking.py --table         # nothing is run: the page is written from results/

The config list is ``[{op_types: [Conv2d], sparse_ratio: 0.5}]`` alone. The layers that must lose the same channels are
found in each network's graph. The networks have random weights, and random statistics in their batch normalisations.
So a channel that is left behind would show in the logits. Parameter counts do not depend on weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zskd_nni.compression.pruning.dependency_config import plan_pruning
from zskd_nni.compression.pruning.speedup import shrink
from zskd_nni.models.build import build_network
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.onnx_export import onnx_bytes
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


def randomised(network: nn.Module) -> nn.Module:
    """Give BatchNorm random statistics, scales and shifts, so that they are not the defaults."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return network


def document(record: dict[str, Any]) -> str:
    """The text of ``docs/shrinking.md`` from the measurements."""
    rows = [
        f"| `{row['network']}` | {row['parameters']['before']:,} | {row['parameters']['after']:,} "
        f"| {100 * row['parameters']['after'] / row['parameters']['before']:.1f} % "
        f"| {row['onnx_bytes']['before']:,} -> {row['onnx_bytes']['after']:,} "
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
        "`max(1, |logit|)`. Above 1e-4 no network is returned. Networks of torchvision have 1,000 classes and images",
        "of 224 x 224, the others 10 classes and 32 x 32. Weights are random: this page is about shapes, not accuracy.",
        "Seconds are for pruning, shrinking, checking and both exports, on one CPU thread of a busy machine.",
        "",
        "From `results/shrinking.json`; `python benchmarks/shrinking.py` measures again and writes this page.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.networks if name not in NETWORKS]
    if unknown:
        parser.error(f"there is no network {unknown[0]} here; there are {', '.join(NETWORKS)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"networks": []}
    if not arguments.table:
        rows = {row["network"]: row for row in record["networks"]}
        for name in arguments.networks or NETWORKS:
            rows[name] = {**measure(name), "provenance": provenance("cpu", SEED)}
            print(f"{name}: {rows[name]['parameters']}, {rows[name]['seconds']} s", flush=True)
            ordered = [rows[name] for name in NETWORKS if name in rows]
            record = {"config_list": CONFIG, "pruner": "L1NormPruner", "networks": ordered}
            RESULTS.parent.mkdir(exist_ok=True)
            write_atomic(RESULTS, json.dumps(record, indent=1) + "\n")
    write_atomic(DOCUMENT, document(record))


if __name__ == "__main__":
    main()
