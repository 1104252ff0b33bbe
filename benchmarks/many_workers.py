"""How synthesis by many workers scales: a simulation of up to 1,000 of them, ``results/bench-many-workers.json``.

    python benchmarks/many_workers.py             # measures shards and starts on this machine, then simulates
    python benchmarks/many_workers.py --again     # simulates with the earlier measurements

These are measured, in CPU seconds of one core: each of a number of shards, the start of a process up to its first
shard, checking a finished shard, and writing the manifest. The launch is simulated. Processes start together, divide
the missing shards by the package's function (``zskd_nni.runtime.distributed.share``) and work shard after shard. When
one of them dies, all are restarted, as by torch elastic. Failures are random, with the same rate for every worker. A
shard that was not finished is lost. The time until all processes have found each other is not measured for a thousand;
it is assumed (``RENDEZVOUS``).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zskd_nni.methods.registry import transfer_source
from zskd_nni.recipes.load import load_recipe
from zskd_nni.runtime.distributed import share
from zskd_nni.runtime.files import sha256_of_file, write_json
from zskd_nni.runtime.provenance import provenance
from zskd_nni.synthesis import ImpressionStore
from zskd_nni.synthesis.store import shard_name

RESULTS = Path(__file__).resolve().parent.parent / "results" / "bench-many-workers.json"
RECIPE = "mnist-half"
SHARD = 1000  # impressions, as recipes have it
WORKERS = (1, 4, 16, 64, 250, 1000)
SHARDS = 100_000  # the most that a store may have
FAILURES = {  # rates of one worker, per second
    "never": 0.0,
    "once a worker in 30 days": 1 / (30 * 86_400),
    "once a worker in a day": 1 / 86_400,
    "once a worker in 6 hours": 4 / 86_400,
}
RENDEZVOUS = 20.0  # seconds until all processes have found each other, in addition to a process's start
ROUNDS = 10


def measure(shards: int) -> dict[str, Any]:
    """The input of the simulation: CPU seconds, which do not depend on other work of the machine."""
    teacher = load_recipe(RECIPE).teacher()
    times: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        for number in range(shards):
            started = time.process_time()
            transfer_source(teacher, Path(place) / str(number), SHARD, seed=number, quiet=True)
            times.append(round(time.process_time() - started, 3))
        store = ImpressionStore.open(Path(place) / "0")
        path = store.folder / shard_name(0)
        started = time.process_time()
        for _ in range(50):
            sha256_of_file(path)
        check = (time.process_time() - started) / 50
        lines = {str(index): store.manifest["shards"]["0"] for index in range(SHARDS)}
        started = time.process_time()
        write_json(store.folder / "manifest.json", {**store.manifest, "shards": lines})
        manifest = time.process_time() - started
    code = (
        "import zskd_nni.cli, zskd_nni.synthesis, zskd_nni.runtime.distributed; "
        "from zskd_nni.recipes.load import load_recipe as r; "
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(3):
        subprocess.run([sys.executable, "-c", f"{code}r({RECIPE!r}).teacher()"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 3
    return {
        "recipe": RECIPE,
        "impressions_a_shard": SHARD,
        "shard_seconds": times,
        "check_seconds_a_shard": round(check, 6),
        "manifest_seconds": round(manifest, 3),
        "start_seconds": round(start, 2),
        "provenance": provenance("cpu", 0),
    }


def simulate(
    durations: Sequence[float], workers: int, rate: float, start: float, check: float, random: np.random.Generator
) -> dict[str, float]:
    """One launch, from its first start to the last shard.

    Args:
        durations: seconds of every shard of the store.
        workers: how many there are.
        rate: failures of one worker per second.
        start: seconds from a (re)start to the first shard.
        check: seconds to check a finished shard.
        random: of the failures.

    Returns:
        Duration in hours, number of restarts, and shares of the workers' time: useful, lost with unfinished shards,
        spent on starts, and idle while others finish.
    """
    seconds = np.asarray(durations)
    missing = list(range(len(durations)))
    made = np.zeros(len(durations), dtype=int)
    now = lost = starting = 0.0
    restarts = -1
    while missing:
        restarts += 1
        begin = start + check * (len(durations) - len(missing)) / workers
        failure = random.exponential(1 / (rate * workers)) if rate else np.inf
        if failure < begin:
            now += failure
            starting += failure * workers
            continue
        last, still = begin, []
        for rank in range(workers):
            own = share(missing, rank, workers)
            done = begin + np.cumsum(seconds[own])
            finished = int(np.searchsorted(done, failure, side="right"))
            made[own[:finished]] += 1
            end = float(done[finished - 1]) if finished else begin
            last = max(last, end)
            if finished < len(own):
                still += own[finished:]
                lost += failure - end  # in the middle of a shard when all were stopped
        now += failure if still else last
        starting += begin * workers
        missing = sorted(still)
    assert (made == 1).all(), "every shard is finished once"
    useful = float(seconds.sum())
    shares = {"useful": useful, "lost": lost, "starting": starting}
    shares = {name: value / (workers * now) for name, value in shares.items()}
    return {"hours": now / 3600, "restarts": restarts, **shares, "idle": 1 - sum(shares.values())}


def scenarios(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Means over rounds for each number of workers and each failure rate."""
    start = measured["start_seconds"] + RENDEZVOUS
    rows = []
    for label, rate in FAILURES.items():
        for workers in WORKERS:
            rounds = []
            for number in range(ROUNDS if rate else 1):
                random = np.random.default_rng(number)
                durations = random.choice(measured["shard_seconds"], SHARDS)
                check = measured["check_seconds_a_shard"]
                rounds.append(simulate(durations, workers, rate, start, check, random))
            means = {name: round(statistics.fmean(one[name] for one in rounds), 4) for name in rounds[0]}
            rows.append({"failures": label, "workers": workers, **means})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Parse the arguments, measure, simulate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="simulate with what was measured before")
    parser.add_argument("--shards", type=int, default=20, help="how many to measure")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measured = json.loads(arguments.out.read_text())["measured"] if arguments.again else measure(arguments.shards)
    content = {
        "measured": measured,
        "assumed": {"rendezvous_seconds": RENDEZVOUS, "shards": SHARDS, "rounds": ROUNDS},
        "simulated": scenarios(measured),
    }
    write_json(arguments.out, content)


if __name__ == "__main__":
    main()
