"""What people would use instead, on the same teachers at the same size or bits: ``make rivals``.

    python benchmarks/compare_rivals.py                    # the short form: seed 0, ours from results/ where recorded
    python benchmarks/compare_rivals.py --long             # seeds 0 to 2, and whatever of ours is not recorded yet
    python benchmarks/compare_rivals.py alexnet --only squant equalisation --again

Each row is written to ``results/rivals-NETWORK.json`` as soon as it is measured; a row that is there is not measured
again, so that a stopped run continues. No rival sees a real image: test data (``ZSKD_NNI_DATA``) is read once for each
finished network. The seconds are those of making the network, without measuring it. ``docs/rivals.md`` shows the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rivals import ort, pruning, quantization, recipes
from rivals.pairs import PAIRS, Pair, teacher_of, test_images
from torch import nn

from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import write_json
from zskd_nni.runtime.provenance import provenance
from zskd_nni.training.inference import float_answers, logits_on
from zskd_nni.training.metrics import accuracy

RESULTS = Path(__file__).resolve().parent.parent / "results"
HALF, BITS = "half", ("W8A8", "W4A8", "W4A4")
TASKS = (HALF, *BITS)


@dataclass(frozen=True)
class Rival:
    """One way to the same size or bits; ours, and ours on real images, are rows like any other.

    Attributes:
        make: ``(pair, seed)`` for half of the channels, ``(pair, task, seed)`` for bits, to a network or to a function
            from images to logits; with seconds that were spent before, where the two are a pair.
        tasks: those it is for.
        chance: whether another seed gives another network; seed 0 alone is measured where not.
    """

    make: Callable[..., Any]
    tasks: tuple[str, ...]
    chance: bool = True


RIVALS = {
    "nni": Rival(pruning.nni_alone, (HALF,), chance=False),
    "torch-pruning": Rival(pruning.torch_pruning, (HALF,), chance=False),
    "bn-noise": Rival(pruning.batch_norm_on_noise, (HALF,)),
    "folding": Rival(pruning.model_folding, (HALF,)),
    "equalisation": Rival(quantization.equalisation_and_bias_correction, BITS),
    "squant": Rival(quantization.squant, BITS),
    "onnxruntime": Rival(ort.static_quantization, BITS),
    "nni-noise": Rival(recipes.noise, BITS),
    "ours": Rival(recipes.impressions, BITS),
    "ours-options": Rival(recipes.impressions_with_options, BITS),
    "real": Rival(recipes.real_images, BITS),
    "real-options": Rival(recipes.real_images_with_options, BITS),
}


def measure(pair: Pair, rival: Rival, task: str, seed: int) -> dict[str, Any]:
    """Make a rival's network, then measure it on test data; or say in one sentence why it cannot be made."""
    started = time.perf_counter()
    try:
        network = rival.make(pair, seed) if task == HALF else rival.make(pair, task, seed)
        network, before = network if isinstance(network, tuple) else (network, 0.0)
        seconds, spec, data = time.perf_counter() - started + before, teacher_of(pair).spec, test_images(pair)
        row: dict[str, Any] = {"seconds": round(seconds, 2)}
        if isinstance(network, nn.Module):
            row["parameters"] = sum(parameter.numel() for parameter in network.parameters())
            network = float_answers(network.eval(), spec)
        return {**row, "accuracy": round(accuracy(logits_on(network, data, spec), data.labels), 2)}
    except UserError as error:
        return {"why_not": str(error).splitlines()[0][:300]}


def made_in(seconds: dict[str, float], student: str, *stages: str) -> float:
    """Seconds of making a student, without those of exporting and measuring it."""
    return round(sum(value for key, value in seconds.items() if key in stages or key.endswith(f" of {student}")), 2)


def recorded(pair: Pair) -> Iterator[dict[str, Any]]:
    """Rows of our pruning recipe and its twin, from ``results/``."""
    recipe, scale = pair.pruned
    path = RESULTS / f"{recipe}{f'-{scale}' if scale else ''}.json"
    for record in json.loads(path.read_text()) if path.exists() else []:
        seed = record["recipe"]["seed"]
        command = f"python benchmarks/packaged_recipes.py {recipe}{f' --scale {scale}' if scale else ''} --real-data"
        row = {"task": HALF, "seed": seed, "command": f"{command} --seeds {seed}", "provenance": record["provenance"]}
        row["parameters"] = record["parameters"]["student"]
        student = made_in(record["seconds"], "student", "synthesis")
        yield {**row, "rival": "ours", "accuracy": record["accuracy"]["student"], "seconds": student}
        if "real_data" in record:
            seconds = made_in(record["real_data"]["seconds"], "student")
            yield {**row, "rival": "real", "accuracy": record["real_data"]["accuracy"]["student"], "seconds": seconds}


class Records:
    """The rows of one network, on disk after each that is added."""

    def __init__(self, network: str) -> None:
        self.path = RESULTS / f"rivals-{network}.json"
        self.rows: list[dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else []

    def has(self, rival: str, task: str, seed: int) -> bool:
        """Whether this row is measured."""
        return any((row["rival"], row["task"], row["seed"]) == (rival, task, seed) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, in the place of the one that it repeats."""
        key = ("rival", "task", "seed")
        others = [one for one in self.rows if any(one[name] != row[name] for name in key)]
        place = {key: number for number, key in enumerate((*TASKS, *RIVALS))}
        self.rows = sorted([*others, row], key=lambda one: (place[one["task"]], place[one["rival"]], one["seed"]))
        write_json(self.path, self.rows)
        print({name: value for name, value in row.items() if name != "provenance"}, flush=True)


def compare(network: str, arguments: argparse.Namespace) -> None:
    """Measure the rows of one network that are not recorded."""
    pair, records, wanted = PAIRS[network], Records(network), arguments.only or [*RIVALS]
    for key, rival in RIVALS.items():
        for task in [task for task in rival.tasks if task in arguments.tasks] if key in wanted else ():
            for seed in arguments.seeds if rival.chance else arguments.seeds[:1]:
                if arguments.again or not records.has(key, task, seed):
                    command = f"python benchmarks/compare_rivals.py {network} --only {key} --seeds {seed}"
                    row = {"rival": key, "task": task, "seed": seed, **measure(pair, rival, task, seed)}
                    records.add({**row, "command": command, "provenance": machine(seed)})
    for row in recorded(pair):
        if row["rival"] in wanted and HALF in arguments.tasks:
            records.add(row)


def machine(seed: int) -> dict[str, Any]:
    """Provenance with the number of cores."""
    return {**provenance("cpu", seed), "cores": os.cpu_count()}


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(PAIRS)}; all where absent")
    parser.add_argument("--only", nargs="+", choices=[*RIVALS])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--long", action="store_true", help="seeds 0 to 2")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--again", action="store_true", help="also what is measured already")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.networks if name not in PAIRS]
    if unknown:
        parser.error(f"there is no network {unknown[0]} here; there are {', '.join(PAIRS)}")
    arguments.seeds = arguments.seeds or ([0, 1, 2] if arguments.long else [0])
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for network in arguments.networks or PAIRS:
        compare(network, arguments)


if __name__ == "__main__":
    main()
