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

# Of the families of torchvision and timm, a small one each; by the side of their images. 10 classes.
FAMILIES: dict[int, tuple[str, ...]] = {
    64: (
        "torchvision:resnet18", "torchvision:resnet34", "torchvision:resnet50", "torchvision:wide_resnet50_2",
        "torchvision:resnext50_32x4d", "torchvision:vgg11", "torchvision:vgg11_bn", "torchvision:vgg16_bn",
        "torchvision:squeezenet1_0", "torchvision:squeezenet1_1", "torchvision:mobilenet_v2",
        "torchvision:mobilenet_v3_small", "torchvision:mobilenet_v3_large", "torchvision:mnasnet0_5",
        "torchvision:mnasnet1_0", "torchvision:shufflenet_v2_x0_5", "torchvision:shufflenet_v2_x1_0",
        "torchvision:efficientnet_b0", "torchvision:efficientnet_v2_s", "torchvision:regnet_x_400mf",
        "torchvision:regnet_y_400mf", "torchvision:densenet121", "torchvision:googlenet", "torchvision:convnext_tiny",
        "torchvision:swin_t", "torchvision:swin_v2_t", "torchvision:alexnet",
        "timm:resnet10t", "timm:resnet18d", "timm:resnet26", "timm:resnetblur18", "timm:seresnet18", "timm:skresnet18",
        "timm:ecaresnet26t", "timm:resnest14d", "timm:res2net50_14w_8s", "timm:gernet_s", "timm:repvgg_a0",
        "timm:mobileone_s0", "timm:mobilenetv1_100", "timm:mobilenetv2_035", "timm:mobilenetv3_small_050",
        "timm:mobilenetv4_conv_small_035", "timm:tinynet_e", "timm:lcnet_035", "timm:fbnetc_100", "timm:spnasnet_100",
        "timm:mnasnet_small", "timm:mixnet_s", "timm:semnasnet_075", "timm:efficientnet_b0", "timm:efficientnet_es",
        "timm:tf_efficientnet_b0", "timm:tf_mobilenetv3_small_075", "timm:ghostnet_050", "timm:ghostnetv2_100",
        "timm:hardcorenas_a", "timm:regnetx_002", "timm:regnety_002", "timm:regnetz_005", "timm:rexnet_100",
        "timm:densenet121", "timm:dla34", "timm:dla46_c", "timm:cspresnet50", "timm:cspdarknet53", "timm:darknet17",
        "timm:vovnet39a", "timm:ese_vovnet19b_dw", "timm:selecsls42", "timm:hgnet_tiny", "timm:hrnet_w18_small",
        "timm:vgg11", "timm:vgg11_bn", "timm:xception41", "timm:dpn48b", "timm:nf_resnet26", "timm:nf_regnet_b0",
        "timm:convnext_atto", "timm:convnextv2_atto", "timm:edgenext_xx_small", "timm:fastvit_t8", "timm:starnet_s1",
        "timm:repghostnet_050", "timm:poolformer_s12", "timm:mobilevit_xxs",
    ),
    224: (
        "torchvision:vit_b_16", "torchvision:maxvit_t", "timm:vit_tiny_patch16_224", "timm:deit_tiny_patch16_224",
        "timm:resmlp_12_224",
    ),
    299: ("torchvision:inception_v3", "timm:inception_v3"),
}  # fmt: skip
SIDES = {name: side for side, names in FAMILIES.items() for name in names}


def measure_family(name: str) -> dict[str, Any]:
    """Prune and shrink one network of the second table, or say in one sentence why not."""
    from nni.compression.pruning import L1NormPruner

    torch.manual_seed(SEED)
    row: dict[str, Any] = {"network": name, "side": SIDES[name]}
    started = time.monotonic()
    try:
        network = randomised(build_network(name, {"num_classes": 10}, None)).eval()
        images = InputSpec((3, SIDES[name], SIDES[name])).midpoint(2)
        row["before"] = sum(parameter.numel() for parameter in network.parameters())
        pruner = L1NormPruner(network, plan_pruning(network, CONFIG, images).config_list)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        result = shrink(network, masks, images)
        row |= {"after": result.parameters_after, "max_logit_difference": result.max_logit_difference}
    except UserError as error:
        row["why_not"] = str(error)
    return {**row, "seconds": round(time.monotonic() - started, 1), "provenance": provenance("cpu", SEED)}


def measure_families(names: list[str], again: bool, record: dict[str, Any]) -> None:
    """Measure the networks of the second table that are not in the record yet, and write it after each."""
    rows = {row["network"]: row for row in record.get("families", [])}
    for name in names or SIDES:
        if name in rows and not again:
            continue
        rows[name] = measure_family(name)
        print({key: value for key, value in rows[name].items() if key != "provenance"}, flush=True)
        record["families"] = [rows[each] for each in SIDES if each in rows]
        write_atomic(RESULTS, json.dumps(record, indent=1) + "\n")


def families_section(record: dict[str, Any]) -> list[str]:
    """The second table of the page; nothing where nothing is measured."""
    rows = record.get("families", [])
    if not rows:
        return []
    shrunk = sum("after" in row for row in rows)
    lines = [
        "## Families",
        "",
        f"{shrunk} of these {len(rows)} networks are shrunk, with 10 classes and without exports. A name begins with",
        "the package that has the network. Weights are random, from one seed. The first table's differences are",
        "relative to each logit (at least 1), which is never less.",
        "",
        "| network | image side | parameters | after | logit difference | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        before = f"{row['before']:,}" if "before" in row else "-"
        figures = f"{row['after']:,} | {row['max_logit_difference']:.1e}" if "after" in row else f"{row['why_not']} | -"
        lines.append(f"| `{row['network']}` | {row['side']} | {before} | {figures} | {row['seconds']:.0f} |")
    return [*lines, "", "`python benchmarks/shrinking.py --families` measures what is missing.", ""]


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
    parser.add_argument("--again", action="store_true", help="also those that are measured already")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    known = SIDES if arguments.families else NETWORKS
    unknown = [name for name in arguments.networks if name not in known]
    if unknown:
        parser.error(f"there is no network {unknown[0]} here; there are {', '.join(known)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"networks": []}
    if arguments.families and not arguments.table:
        measure_families(arguments.networks, arguments.again, record)
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
