"""How fast synthesis, belief matching and training are, as ratios measured side by side: ``make bench``.

    python benchmarks/bench.py                    # about ten minutes on two cores: results/bench-cpu.json
    python benchmarks/bench.py --device cuda      # results/bench-cuda.json
    python benchmarks/bench.py --only speed-of-light
    python benchmarks/bench.py --only peer --peer CLONE   # against the code of ZSKT's authors: peers.py

Every ratio is the median of pairs, one of each side in turn, so that a busy machine slows both. The baselines are the
published schedules in ``published_loops.py``. For the speed of light the baseline is a bare forward pass and input
gradient of the same teacher, in the engine's precision and memory format. Networks start from their shipped weights
(``zoo:lenet5-fashion-mnist``, ``alexnet-cifar10``), or from random ones: speed does not depend on them, except where a
fit is reached.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matrix_peak import matrix_peak, operations
from peers import authors_rounds, commit_of
from published_loops import zskd_loop, zskt_loop
from safetensors.torch import load_file
from torch import nn

from zskd_nni.data.augmentation import Augmentation
from zskd_nni.data.procedural import start_images
from zskd_nni.data.sources import StoredSource
from zskd_nni.methods.registry import find_method
from zskd_nni.methods.zskd import ZskdSettings, ZskdTargets
from zskd_nni.methods.zskt.settings import ZsktSettings
from zskd_nni.methods.zskt.train import train_zskt
from zskd_nni.models.build import build_network
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.local_response_norm import fast_response_norms
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.files import write_json
from zskd_nni.runtime.provenance import provenance
from zskd_nni.synthesis import SynthesisSettings
from zskd_nni.synthesis.engine import ShardInputs, synthesize_shard
from zskd_nni.training.distillation import DistillationSettings, distill, student_schedule
from zskd_nni.training.losses import distillation_loss

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
PAIRS = 4
COLOUR, GREY = InputSpec((3, 32, 32)), InputSpec((1, 32, 32))
NETWORKS: dict[str, tuple[str, dict[str, Any], str, InputSpec]] = {
    "lenet5": ("zoo:lenet5", {}, "lenet5-fashion-mnist", GREY),
    "alexnet": ("zoo:alexnet", {"bn_momentum": 0.01}, "alexnet-cifar10", COLOUR),
}
STUDENTS = {"lenet5": ("zoo:lenet5_half", {}), "alexnet": ("zoo:alexnet_half", {"bn_momentum": 0.01})}
# What "equal fit" means below: the mean fit of the published schedule, as recorded by equal_fit.py.
EQUAL_FIT = RESULTS / "bench-equal-fit.json"
TEMPERATURE = 20.0


@dataclass(frozen=True)
class Baseline:
    """What the package is compared with.

    Attributes:
        name: of the ratio.
        theirs: units of a call, and the call.
        target: of the ratio on the CPU and on CUDA.
        detail: kept in the record.
    """

    name: str
    theirs: tuple[float, Callable[[], object]]
    target: tuple[float, float] | None
    detail: dict[str, Any] = field(default_factory=dict)


class Bench:
    """Measures pairs on one device.

    Args:
        device: cpu or cuda.
        pairs: of each ratio.
    """

    def __init__(self, device: str, pairs: int) -> None:
        self.device, self.pairs = device, pairs
        self.cuda = torch.device(device).type == "cuda"
        self.records: list[dict[str, Any]] = []
        self.operations = 0.0  # of one unit of the package, as last measured

    def seconds(self, work: Callable[[], object]) -> float:
        """Duration of one call; the device is idle before and after it."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        work()
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    def compare(
        self,
        name: str,
        unit: str,
        ours: tuple[float, Callable[[], object]],
        theirs: tuple[float, Callable[[], object]],
        target: tuple[float, float] | None,
        **detail: Any,
    ) -> None:
        """Add a record: units per second of the package, divided by those of the baseline.

        Args:
            name: of the ratio.
            unit: what is counted.
            ours: units of a call, and the call.
            theirs: the same.
            target: of the ratio on the CPU and on CUDA.
            detail: kept in the record.
        """
        self.compare_with_each(unit, ours, [Baseline(name, theirs, target, detail)])

    def compare_with_each(
        self, unit: str, ours: tuple[float, Callable[[], object]], baselines: Sequence[Baseline]
    ) -> None:
        """Add a record for each baseline: every round is one call of the package, then one of each baseline."""
        mine, *theirs = self.rates([ours, *(baseline.theirs for baseline in baselines)])
        for baseline, rates in zip(baselines, theirs, strict=True):
            self.add(baseline, unit, mine, rates)

    def rates(self, sides: Sequence[tuple[float, Callable[[], object]]]) -> list[list[float]]:
        """Units per second of each side, in as many rounds as there are pairs; every side runs once per round."""
        units, ours = sides[0]
        self.operations = operations(ours) / units  # this call also warms up
        for _, work in sides[1:]:
            work()
        rates: list[list[float]] = [[] for _ in sides]
        for _ in range(self.pairs):
            for side, (units, work) in zip(rates, sides, strict=True):
                side.append(units / self.seconds(work))
        return rates

    def of_matrix_peak(self, rate: float, precision: str) -> float:
        """The rate in operations, as a share of the rate of the device's fastest matrix product."""
        peak = matrix_peak(self.device, getattr(torch, precision))
        return float(f"{rate * self.operations / peak:.3g}")

    def add(self, baseline: Baseline, unit: str, ours: list[float], theirs: list[float]) -> None:
        """Add the record of a baseline whose rates, and ours, are known."""
        ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
        record = {
            "name": baseline.name,
            "unit": unit,
            "ratio": float(f"{ratio:.3g}"),
            "target": None if baseline.target is None else baseline.target[self.cuda],
            "ours": float(f"{statistics.median(ours):.4g}"),
            "theirs": float(f"{statistics.median(theirs):.4g}"),
            "device": torch.cuda.get_device_name(self.device) if self.cuda else "cpu",
            "pairs": self.pairs,
            "of_matrix_peak": self.of_matrix_peak(statistics.median(ours), baseline.detail.get("precision", "float32")),
            **baseline.detail,
            "provenance": provenance(self.device, 0),
        }
        self.records.append(record)
        goal = "" if baseline.target is None else f" (target {record['target']:g})"
        sides = f"{record['ours']:g} against {record['theirs']:g} {unit}"
        print(f"{baseline.name}: {record['ratio']:g}x{goal}; {sides}", flush=True)


def plain_network(name: str, device: str) -> nn.Module:
    """The network as its author wrote it, with trained weights if there are any; no gradients for weights."""
    reference, arguments, weights, _ = NETWORKS[name]
    torch.manual_seed(0)
    network = build_network(reference, arguments)
    for folder in (ROOT / "zskd_nni" / "models" / "zoo" / "weights", Path("teachers")):
        if (folder / f"{weights}.safetensors").exists():
            loaded = load_file(folder / f"{weights}.safetensors")
            network.load_state_dict(
                {key: value.float() if value.is_floating_point() else value for key, value in loaded.items()}
            )
            break
    else:
        print(f"{weights} is neither shipped nor in teachers/: random weights")
    return network.eval().requires_grad_(False).to(device)


def paper_settings(**changes: Any) -> SynthesisSettings:
    """The preset `paper` of ZSKD, with changes."""
    options = find_method("zskd").options("paper", {})
    return replace(options.synthesis, **changes)


def ways(goal: float, slots: int) -> dict[str, SynthesisSettings]:
    """Ways in which the engine reaches the published loop's mean fit or a better one: name -> settings.

    Images of equal fit are not equally useful: the start and the remaining contrast matter more. So students are
    trained on the images of each way, and the way with the most accurate students is measured.
    """
    early = paper_settings(learning_rate=0.1, tolerance=goal, max_steps=200, slots=slots)
    return {
        "smooth noise, each image stopped at the fit": replace(early, start="smooth"),
        "uniform noise, each image stopped at the fit": early,
        # As in the published loop, with a learning rate at which a twentieth of its steps is enough.
        "smooth noise, rescaled": paper_settings(
            start="smooth", learning_rate=0.05, max_steps=75, range="rescale", slots=min(slots, 100)
        ),
    }


def equal_fit(name: str) -> tuple[float, str]:
    """What equal_fit.py measured for this teacher.

    Returns:
        Mean KL(target || teacher at 20) that the published schedule (batch 100, 1,500 steps) leaves, and the
        way of :func:`ways` with the most accurate students.

    Raises:
        SystemExit: all students are less accurate than those of the published loop. The ratios would then not be those
            of equal quality.
    """
    records = [record for record in json.loads(EQUAL_FIT.read_text()) if record["name"] == NETWORKS[name][2]]
    accuracies = {way: statistics.mean(rec[f"engine, {way}"]["accuracy"] for rec in records) for way in ways(1, 1)}
    best = max(accuracies, key=lambda way: accuracies[way])
    published = statistics.mean(record["published"]["accuracy"] for record in records)
    if accuracies[best] < published:
        raise SystemExit(
            f"{name}: students of {best} reach {accuracies[best]:.2f} %, those of the published loop {published:.2f} %."
        )
    return statistics.mean(record["published"]["fit"] for record in records), best


def inputs_for(teacher: Teacher, count: int, settings: SynthesisSettings, seed: int) -> ShardInputs:
    """ZSKD's soft targets, and the noise that images start from."""
    targets = ZskdTargets(teacher, ZskdSettings()).targets(0, count, count, seed)
    starts, free = start_images(settings.start, count, teacher.spec, torch.Generator().manual_seed(seed), settings.hold)
    limit = torch.full((count,), float(settings.step_limits[1]))
    return ShardInputs(targets, starts, torch.full((count, 1), TEMPERATURE), torch.zeros(count), limit, free)


def synthesis(bench: Bench, name: str) -> None:
    """Impressions per second of the engine, against the published loop and against the same loop tuned."""
    model = plain_network(name, bench.device)
    spec = NETWORKS[name][3]
    teacher = Teacher(model, spec).to(bench.device)
    count = 1000 if name == "lenet5" else 100
    if bench.cuda:
        count = 4000
    goal, way = equal_fit(name)
    settings = ways(goal, min(count, 1000 if bench.cuda else 250))[way]
    inputs = inputs_for(teacher, count, settings, 0)
    made: list[float] = []

    def engine() -> None:  # draws its starts, as the published loop does
        made.append(float(synthesize_shard(teacher, inputs_for(teacher, count, settings, 0), settings).fit.mean()))

    engine()
    # The published loop at full length takes minutes, but each of its steps costs the same.
    steps = 30 if name == "lenet5" else 3
    targets = inputs.targets[:100].to(bench.device)
    batch = best_batch(bench, model, spec, inputs)
    pool = inputs.targets[torch.arange(batch) % count].to(bench.device)
    chosen = {
        "way": way,
        "learning_rate": settings.learning_rate,
        "max_steps": settings.max_steps,
        "tolerance": None if settings.tolerance is None else round(settings.tolerance, 4),
        "slots": settings.slots,
    }
    loop = partial(zskd_loop, model, shape=spec.shape)
    baselines = [
        Baseline(
            f"synthesis, {name}, against the published loop",
            (100 * steps / 1500, partial(loop, targets, steps=steps)),
            (30, 1000 if name == "lenet5" else 100),
            {"fit": {"ours": round(made[0], 4), "theirs": round(goal, 4)}, "settings": chosen},
        ),
        Baseline(
            f"synthesis, {name}, against the loop with its best batch",
            (batch * steps / 1500, partial(loop, pool, steps=steps, batch=batch)),
            (2, 5),
            {"tuned": {"batch": batch, "steps": 1500, "learning_rate": 1e-3}},
        ),
    ]
    bench.compare_with_each("impressions/s", (count, engine), baselines)


def tuned_loop(bench: Bench, name: str) -> None:
    """Impressions per second of the engine and of the published loop, with the same settings: those of the loop.

    Batch, learning rate and steps are those with which the loop reaches the published schedule's mean fit soonest.
    """
    model, spec = plain_network(name, bench.device), NETWORKS[name][3]
    teacher = Teacher(model, spec).to(bench.device)
    pool = inputs_for(teacher, 250, paper_settings(), 0)
    batch = best_batch(bench, model, spec, pool)
    targets = pool.targets[torch.arange(batch) % len(pool.targets)].to(bench.device)
    rate, steps = best_learning_rate(model, spec, targets, equal_fit(name)[0])
    settings = paper_settings(learning_rate=rate, max_steps=steps, range="rescale", slots=batch)
    inputs, calls = inputs_for(teacher, batch, settings, 0), 1 if name == "alexnet" else 10

    def engine() -> None:  # draws its starts, as the loop does
        for _ in range(calls):
            starts, _ = start_images("uniform", batch, spec, torch.Generator().manual_seed(0), 0.0)
            synthesize_shard(teacher, replace(inputs, targets=targets, starts=starts), settings)

    def loop() -> None:
        for _ in range(calls):
            zskd_loop(model, targets, spec.shape, steps=steps, batch=batch, learning_rate=rate)

    bench.compare(
        f"synthesis, {name}, against the loop with its best batch, learning rate and steps",
        "impressions/s",
        (batch * calls, engine),
        (batch * calls, loop),
        (1, 1),
        settings={"batch": batch, "steps": steps, "learning_rate": rate},
    )


def best_batch(bench: Bench, model: nn.Module, spec: InputSpec, inputs: ShardInputs) -> int:
    """The batch size at which a step of the published loop takes the least time per image."""
    sizes = (25, 50, 100, 250) if not bench.cuda else (100, 1000, 4000, 16000)

    def cost(size: int) -> float:
        targets = inputs.targets[torch.arange(size) % len(inputs.targets)].to(bench.device)
        zskd_loop(model, targets, spec.shape, steps=1, batch=size)
        steps = max(2, 200 // size) if not bench.cuda else 10
        return bench.seconds(lambda: zskd_loop(model, targets, spec.shape, steps=steps, batch=size)) / size / steps

    return min(sizes, key=cost)


def best_learning_rate(model: nn.Module, spec: InputSpec, targets: torch.Tensor, fit: float) -> tuple[float, int]:
    """Learning rate and least number of steps with which the published loop reaches the mean fit."""
    tried = (4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 25, 30, 40, 60, 90)
    best = (1e-3, 1500)

    def reached(rate: float, steps: int) -> bool:
        torch.manual_seed(1)
        _, fits = zskd_loop(model, targets, spec.shape, steps=steps, batch=len(targets), learning_rate=rate)
        return float(fits.mean()) <= fit

    for rate in (0.1, 0.2, 0.4, 0.05, 0.02):
        fewer = [steps for steps in tried if steps < best[1]]
        if not fewer or not reached(rate, fewer[-1]):
            continue  # no better than the best so far
        low, high = 0, len(fewer) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(rate, fewer[middle]) else (middle + 1, high)
        best = (rate, fewer[high])
    return best


def speed_of_light(bench: Bench, name: str) -> None:
    """Image-steps per second of the whole engine, against the teacher's bare forward pass and input gradient."""
    spec = NETWORKS[name][3]
    teacher = Teacher(plain_network(name, bench.device), spec).to(bench.device)
    sizes = (
        {"lenet5": (64, 125, 250, 500), "alexnet": (16, 32, 64, 125)}[name] if not bench.cuda else (1000, 4000, 16000)
    )

    def bare(size: int, repeats: int) -> Callable[[], None]:
        x = torch.rand((size, *spec.shape), device=bench.device)

        def work() -> None:
            with fast_response_norms(teacher.model):
                for _ in range(repeats):
                    leaf = x.requires_grad_(True)
                    torch.autograd.grad(teacher.model(leaf).sum(), leaf)
                with torch.no_grad():
                    teacher.model(x)  # the engine looks at the finished images once more

        return work

    torch.set_flush_denormal(True)
    costs = {}
    for size in sizes:
        bare(size, 1)()
        costs[size] = min(bench.seconds(bare(size, 2)) / size for _ in range(3))
    size = min(costs, key=lambda size: costs[size])
    steps = 20 if name == "lenet5" or bench.cuda else 4
    settings = paper_settings(max_steps=steps, slots=size)
    inputs = inputs_for(teacher, size, settings, 0)
    bench.compare(
        f"synthesis, {name}, against the speed of light",
        "image-steps/s",
        (size * steps, lambda: synthesize_shard(teacher, inputs, settings)),
        (size * steps, bare(size, steps)),
        (0.85, 0.75),
        batch=size,
    )


class ZsktTraining:
    """ZSKT, WRN-40-2 to WRN-16-1 with random weights: the authors' loop and ours, several rounds per call."""

    def __init__(self, bench: Bench) -> None:
        torch.manual_seed(0)
        self.model = build_network("zoo:wrn", {"depth": 40, "width": 2}).eval().requires_grad_(False).to(bench.device)
        self.teacher = Teacher(self.model, COLOUR).to(bench.device)
        self.device = bench.device
        # Several rounds per call, so that the start of a training (comparing layers, building networks) counts little.
        self.batch, self.rounds = (128, 20) if bench.cuda else (32, 4)

    def _student(self) -> nn.Module:
        return build_network("zoo:wrn", {"depth": 16, "width": 1}).to(self.device)

    def published(self, **changes: Any) -> None:
        """The authors' loop, with changes."""
        network = self._student().train()
        groups = tuple([getattr(side, f"group{n}") for n in (1, 2, 3)] for side in (self.model, network))
        zskt_loop(self.model, network, groups, rounds=self.rounds, batch=self.batch, **changes)

    def ours(self, autocast: bool) -> None:
        """The package's loop, in bfloat16 or float32."""
        settings = ZsktSettings(rounds=self.rounds, batch=self.batch, autocast=autocast)
        train_zskt(self._student(), self.teacher, settings, quiet=True)


def belief_matching(bench: Bench, name: str) -> None:
    """Rounds per second of ZSKT, WRN-40-2 to WRN-16-1; the name is ignored."""
    training = ZsktTraining(bench)
    for precision in ("float32", "bfloat16"):
        bench.compare(
            f"ZSKT, WRN-40-2 to WRN-16-1, {precision}, against the authors' loop",
            "rounds/s",
            (training.rounds, partial(training.ours, precision == "bfloat16")),
            (training.rounds, training.published),
            (1.5, 4) if precision == "bfloat16" else None,
            batch=training.batch,
            precision=precision,
        )


def student_training(bench: Bench, name: str) -> None:
    """Student steps per second of ``distill`` against a bare loop on tensors in memory."""
    spec = NETWORKS[name][3]
    teacher = Teacher(plain_network(name, bench.device), spec).to(bench.device)
    batch = 128 if not bench.cuda else 512
    # Long enough that the start of a training (fingerprint, optimiser, progress) counts little.
    steps = 8 if name == "alexnet" and not bench.cuda else 100
    images = torch.rand((batch * 4, *spec.shape), device=bench.device)
    settings = DistillationSettings(temperature=4, steps=steps, batch=batch, augmentation=Augmentation())
    reference, arguments = STUDENTS[name]

    def ours() -> None:
        student = build_network(reference, arguments).to(bench.device)
        distill(student, teacher, StoredSource(images, batch, 0, "bench"), settings, quiet=True)

    def bare() -> None:
        student = build_network(reference, arguments).to(bench.device).to(memory_format=torch.channels_last).train()
        optimizer, _ = student_schedule(student, settings)
        with fast_response_norms(student):
            for step in range(steps):
                x = images[step % 4 * batch : (step % 4 + 1) * batch]
                with torch.no_grad():
                    answers = teacher(x)
                loss = distillation_loss(student(x), answers, settings.temperature)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

    bench.compare(
        f"student training, {name}, against a bare loop",
        "steps/s",
        (steps, ours),
        (steps, bare),
        (0.9, 0.85),
        batch=batch,
    )


def peer(bench: Bench, clone: Path) -> None:
    """Rounds per second of ZSKT against the released code itself."""
    training = ZsktTraining(bench)
    bench.compare(
        "ZSKT, WRN-40-2 to WRN-16-1, bfloat16, against the released code itself",
        "rounds/s",
        (training.rounds, partial(training.ours, True)),
        (training.rounds, authors_rounds(clone, training.rounds, training.batch, bench.device)),
        (1.5, 4),
        batch=training.batch,
        precision="bfloat16",
        peer=f"polo5/ZeroShotKnowledgeTransfer@{commit_of(clone)}",
    )


PARTS: dict[str, Callable[[Bench, str], None]] = {
    "synthesis": synthesis,
    "tuned": tuned_loop,
    "speed-of-light": speed_of_light,
    "student": student_training,
    "zskt": belief_matching,
}


def main() -> None:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "peer"], default=list(PARTS))
    parser.add_argument("--peer", type=Path, help="a clone of polo5/ZeroShotKnowledgeTransfer")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--threads", type=int, help="all cores where absent")
    parser.add_argument("--out", type=Path, help="results/bench-DEVICE.json where absent")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or os.cpu_count() or 1)
    torch.set_flush_denormal(True)
    bench = Bench(arguments.device, arguments.pairs)
    path = arguments.out or RESULTS / f"bench-{torch.device(arguments.device).type}.json"
    if "peer" in arguments.only and arguments.peer is None:
        parser.error("the part peer takes a clone: --peer FOLDER")
    for part in arguments.only:
        for name in arguments.networks[: 1 if part in ("zskt", "peer") else None]:
            if part == "peer":
                peer(bench, arguments.peer)
            else:
                PARTS[part](bench, name)
            kept = json.loads(path.read_text()) if path.exists() else []
            new = {record["name"] for record in bench.records}
            write_json(path, [record for record in kept if record["name"] not in new] + bench.records)


if __name__ == "__main__":
    main()
