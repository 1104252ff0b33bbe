"""What each optimisation of the engine gains, and where the time goes before and after it.

    python benchmarks/ladder.py                   # a few minutes on two cores: results/bench-ladder-cpu.json
    python benchmarks/ladder.py --device cuda

Each rung is the previous one with one thing changed. All are measured in turn, round by round, so that a busy machine
slows neighbours alike. The ratio is the median over rounds. The profile is PyTorch's: shares of the time that is spent
in the operators themselves.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bench import (
    NETWORKS,
    RESULTS,
    Baseline,
    Bench,
    ZsktTraining,
    best_batch,
    inputs_for,
    paper_settings,
    plain_network,
)
from published_loops import zskd_loop
from torch import nn
from torch.profiler import ProfilerActivity, profile

from zskd_nni.models.local_response_norm import fast_response_norms
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.files import write_json
from zskd_nni.synthesis.engine import synthesize_shard
from zskd_nni.training.losses import attention_map

# Kind of operator -> parts of operator names; the first kind that matches counts.
KINDS = {
    "convolution, backward": ("convolution_backward", "conv2d_backward"),
    "convolution": ("convolution", "conv2d", "mkldnn"),
    "pooling": ("pool",),
    "linear": ("addmm", "::mm", "linear", "gemm", "bmm"),
    "normalisation": ("batch_norm", "avg_pool3d", "pow"),
    "copies": ("copy_", "clone", "contiguous", "to_copy", "cat"),
}
LADDERS = ["lenet5", "alexnet", "zskt"]
Rung = tuple[str, Callable[[], object], float]


def shares(work: Callable[[], object]) -> dict[str, float]:
    """The share of each kind of operator in the time of one call."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=kinds) as seen:
        work()
    spent: dict[str, float] = defaultdict(float)
    for event in seen.key_averages():
        own = event.self_device_time_total or event.self_cpu_time_total
        kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), "the rest")
        spent[kind] += own
    whole = sum(spent.values())
    return {kind: round(spent[kind] / whole, 3) for kind in (*KINDS, "the rest") if spent[kind]}


def synthesis_rungs(bench: Bench, name: str) -> list[Rung]:
    """From the published loop without any optimisation to the engine, in image-steps of one call."""
    model = plain_network(name, bench.device)
    spec = NETWORKS[name][3]
    teacher = Teacher(model, spec).to(bench.device)
    steps = 20 if name == "lenet5" or bench.cuda else 3
    settings = paper_settings(max_steps=steps, slots=100)
    inputs = inputs_for(teacher, 100, settings, 0)
    best = best_batch(bench, model, spec, inputs)
    best_inputs = inputs_for(teacher, best, settings, 0)
    wanted, more = inputs.targets.to(bench.device), best_inputs.targets.to(bench.device)

    def loop(batch: int, weights: bool, denormals: bool, norms: bool = False, last: bool = False) -> None:
        torch.set_flush_denormal(not denormals)
        targets = wanted if batch == 100 else more
        model.requires_grad_(weights)
        model.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        with fast_response_norms(model) if norms else nullcontext():
            zskd_loop(model, targets, spec.shape, steps=steps, batch=batch, learning_rate=0.05)
        for weight in model.parameters():
            weight.grad = None

    def engine() -> None:
        torch.set_flush_denormal(True)
        synthesize_shard(teacher, best_inputs, paper_settings(max_steps=steps, slots=best))

    rungs: list[Rung] = [
        ("the published loop, without care", lambda: loop(100, True, True), 100 * steps),
        ("no gradients for weights", lambda: loop(100, False, True), 100 * steps),
        ("denormals flushed", lambda: loop(100, False, False), 100 * steps),
    ]
    if best != 100:
        rungs.append((f"batches of {best} instead of 100", lambda: loop(best, False, False), best * steps))
    if any(isinstance(module, nn.LocalResponseNorm) for module in model.modules()):
        rungs.append(("response norms in one pass", lambda: loop(best, False, False, True), best * steps))
    rungs.append(("channels last in memory", lambda: loop(best, False, False, True, True), best * steps))
    rungs.append(("the engine: slots that are refilled", engine, best * steps))
    return rungs


def belief_rungs(bench: Bench) -> list[Rung]:
    """From the authors' loop of ZSKT to ours, in rounds of one call."""
    training = ZsktTraining(bench)
    changes: dict[str, Any] = {}
    rungs: list[Rung] = [("the authors' loop", training.published, training.rounds)]
    for change, key, value in (
        ("channels last in memory", "memory_format", torch.channels_last),
        ("gradients of attention laid out like the rest", "attention_map", attention_map),
        ("Adam's step in one kernel", "fused", True),
    ):
        changes = {**changes, key: value}
        rungs.append((change, partial(training.published, **changes), training.rounds))
    rungs.append(("the package's game: checked, resumable", lambda: training.ours(False), training.rounds))
    rungs.append(("bfloat16", lambda: training.ours(True), training.rounds))
    return rungs


def climbed(bench: Bench, what: str, unit: str, rungs: list[Rung]) -> list[dict[str, Any]]:
    """A record for each rung except the first."""
    rates = bench.rates([(units, work) for _, work, units in rungs])
    profiles = [shares(work) for _, work, _ in rungs]
    records = []
    for before, after in pairwise(range(len(rungs))):
        (_, work, units), (change, _, _) = rungs[before], rungs[after]
        bench.add(Baseline(f"{what}: {change}", (units, work), None), unit, rates[after], rates[before])
        record = bench.records[-1]
        record |= {"what": what, "change": change, "before": profiles[before], "after": profiles[after]}
        records.append(record)
    return records


def main() -> None:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=LADDERS, default=LADDERS)
    parser.add_argument("--threads", type=int, help="all cores where absent")
    parser.add_argument("--out", type=Path, help="results/bench-ladder-DEVICE.json where absent")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or os.cpu_count() or 1)
    bench = Bench(arguments.device, arguments.pairs)
    path = arguments.out or RESULTS / f"bench-ladder-{torch.device(arguments.device).type}.json"
    for name in arguments.only:
        if name == "zskt":
            records = climbed(bench, "ZSKT, WRN-40-2 to WRN-16-1", "rounds/s", belief_rungs(bench))
        else:
            records = climbed(bench, f"synthesis, {name}", "image-steps/s", synthesis_rungs(bench, name))
        kept = json.loads(path.read_text()) if path.exists() else []
        new = {record["name"] for record in records}
        write_json(path, [record for record in kept if record["name"] not in new] + records)


if __name__ == "__main__":
    main()
