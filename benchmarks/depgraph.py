"""Removes half of the channels of the known networks with Torch-Pruning's DepGraph: columns of ``docs/shrinking.md``.

    pip install torch-pruning timm transformers
    python benchmarks/depgraph.py --clones CLONES            # what is not measured yet; see known_networks.py
    python benchmarks/depgraph.py --again timm:dla34

It gets the task that our own row has: half of the outputs of every Conv2d, by their L1 norm, the classifier kept. The
smaller network is compared with a copy of the whole one in which the same channels are zero: outputs of the layers that
make them, inputs of the dense layers that read them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
import warnings
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from known_networks import CLONES, KNOWN, alone, build
from shrinking import DOCUMENT, RESULTS, document
from torch import Tensor, nn

from zskd_nni.compression.pruning import channel_flow
from zskd_nni.compression.pruning.speedup import CannotShrinkError, compare
from zskd_nni.models.teacher import first_tensor
from zskd_nni.runtime.files import write_atomic
from zskd_nni.runtime.provenance import provenance


class _Twin:
    """The whole network; what DepGraph removes from the other one is set to zero here."""

    def __init__(self, network: nn.Module) -> None:
        self.network = deepcopy(network)
        self.paths = {module: path for path, module in network.named_modules()}
        self.left: dict[tuple[str, bool], list[int]] = {}

    @torch.no_grad()
    def mask(self, module: nn.Module, outputs: bool, positions: list[int]) -> None:
        """Positions are those of the network as it is after what was removed before."""
        path = self.paths.get(module)
        if path is None:
            return
        twin: Any = self.network.get_submodule(path)
        weight = getattr(twin, "weight", None)
        dim = 0 if outputs or not isinstance(weight, Tensor) or weight.dim() < 2 else 1
        if not isinstance(weight, Tensor) or (dim == 1 and getattr(twin, "groups", 1) > 1):
            return
        left = self.left.setdefault((path, outputs), list(range(weight.shape[dim])))
        gone = [left[position] for position in positions]
        self.left[path, outputs] = [each for each in left if each not in set(gone)]
        weight.index_fill_(dim, torch.tensor(gone), 0.0)
        if outputs and getattr(twin, "bias", None) is not None:
            twin.bias[gone] = 0.0


def measure(name: str, clones: Path | None) -> dict[str, Any]:
    """One network; an exception of Torch-Pruning is the reason why not."""
    pruning: Any = importlib.import_module("torch_pruning")
    warnings.simplefilter("ignore")
    network, side = build(name, clones), KNOWN[name].side
    images = torch.full((2, 3, side, side), 0.5)
    with torch.no_grad():
        classes = first_tensor(network(images.clone())).shape[1]
    row: dict[str, Any] = {"network": name, "before": sum(each.numel() for each in network.parameters())}
    twin, started = _Twin(network), time.process_time()
    try:
        heads = [each for each in network.modules() if isinstance(each, nn.Linear) and each.out_features == classes]
        last = [each for each in network.modules() if isinstance(each, nn.Conv2d) and each.out_channels == classes]
        pruner = pruning.pruner.MagnitudePruner(
            network,
            images,
            importance=pruning.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=0.5,
            ignored_layers=[*heads, *last],
            root_module_types=[nn.Conv2d],
            output_transform=first_tensor,
        )
        for group in pruner.step(interactive=True):
            for dependency, positions in group:
                outputs = pruner.DG.is_out_channel_pruning_fn(dependency.handler)
                twin.mask(dependency.target.module, outputs, list(positions))
            group.prune()
        row["seconds"] = round(time.process_time() - started, 1)
        difference, _ = compare(twin.network, network, (images,))
        row |= {"after": sum(each.numel() for each in network.parameters()), "max_logit_difference": difference}
    except CannotShrinkError as error:
        row |= {"why_not": error.reason, "seconds": round(time.process_time() - started, 1)}
    except Exception as error:
        said = " ".join(str(error).split())[:120]
        row |= {"why_not": f"{type(error).__name__}: {said}", "seconds": round(time.process_time() - started, 1)}
    return row


# What finds the channels that belong together, and what removes them.
OUR_FLOW = ("channel_flow.py", "moved_dims.py", "tried_functions.py", "dependency_config.py")
OUR_REMOVAL = ("speedup.py", "nni_speedup.py", "mask_updaters.py", "constant_folding.py")


def lines_of_code() -> dict[str, int]:
    """Lines of Python with anything on them but comments."""
    theirs = Path(importlib.import_module("torch_pruning").__file__ or "").parent
    ours = Path(channel_flow.__file__).parent

    def count(files: Iterable[Path]) -> int:
        lines = [line.strip() for file in files for line in file.read_text().splitlines()]
        return sum(bool(line) and not line.startswith("#") for line in lines)

    return {
        "our flow and plan": count(ours / name for name in OUR_FLOW),
        "our removal and check": count(ours / name for name in OUR_REMOVAL),
        "DepGraph": count([*(theirs / "dependency").glob("*.py"), theirs / "ops.py"]),
        "its removal and pruner": count(
            [theirs / "pruner" / "function.py", theirs / "pruner" / "algorithms" / "base_pruner.py"]
        ),
    }


def main() -> None:
    """Parse the arguments, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*")
    parser.add_argument("--clones", type=Path, help="the folder of the clones")
    parser.add_argument("--again", action="store_true", help="also those that are measured already")
    parser.add_argument("--limit", type=float, default=120, help="seconds for each network")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.networks if name not in KNOWN]
    if unknown:
        parser.error(f"there is no network {unknown[0]} here; the names are those of known_networks.py")
    torch.set_num_threads(1)
    for package in ("torch_pruning", "timm", "transformers"):
        importlib.import_module(package)  # once, not in every process
    record = json.loads(RESULTS.read_text())
    rows = {row["network"]: row for row in record.get("depgraph", [])}
    for name in arguments.networks or KNOWN:
        cloned = name.partition(":")[0] in CLONES
        if (name in rows and not arguments.again) or (cloned and arguments.clones is None):
            continue
        rows[name] = {**alone(measure, name, arguments.clones, arguments.limit), "provenance": provenance("cpu", 0)}
        print({key: value for key, value in rows[name].items() if key != "provenance"}, flush=True)
        record = json.loads(RESULTS.read_text())  # the other command writes it too
        record["depgraph"] = [rows[each] for each in KNOWN if each in rows]
        write_atomic(RESULTS, json.dumps(record, indent=1) + "\n")
    record["lines_of_code"] = lines_of_code()
    write_atomic(RESULTS, json.dumps(record, indent=1) + "\n")
    write_atomic(DOCUMENT, document(record))


if __name__ == "__main__":
    main()
