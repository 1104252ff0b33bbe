"""Making a store: what is missing is made, shard by shard."""

from __future__ import annotations

import dataclasses
import platform
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from zskd_nni.data.procedural import start_images
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.distributed import only_writers
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import make_folder, plain
from zskd_nni.runtime.progress import Progress
from zskd_nni.runtime.rng import derive_seed, generator
from zskd_nni.runtime.run_identity import settings_identity
from zskd_nni.synthesis.batch_norm_statistics import batch_norms
from zskd_nni.synthesis.engine import FeatureTerm, Orders, synthesize_shard
from zskd_nni.synthesis.settings import SynthesisSettings
from zskd_nni.synthesis.store import MOST_SHARDS, ImpressionStore


class TargetPlan(Protocol):
    """Which soft target impression number ``i`` of a set shall have.

    A plan may also have an attribute ``term``, a further term of the images' objective (a
    :class:`~zskd_nni.synthesis.engine.FeatureTerm`, or None); its identity must tell of it.

    Attributes:
        identity: JSON-able; says which targets these are.
    """

    identity: dict[str, Any]

    def targets(self, first: int, count: int, total: int, seed: int) -> Tensor:
        """``(count, K)`` soft targets of impressions ``first`` to ``first + count`` out of ``total``."""
        ...


def synthesize(
    teacher: Teacher,
    plan: TargetPlan,
    settings: SynthesisSettings,
    *,
    size: int,
    seed: int,
    folder: str | Path,
    label: str = "impressions",
    quiet: bool = False,
) -> ImpressionStore:
    """Make ``size`` impressions in ``folder``, or what is missing of them.

    The same arguments give the same impressions; on the CPU, and with as many threads, bit by bit. A finished shard
    is never made again, a damaged one is.

    Processes that share a process group of ``torch.distributed`` share the work: all of them call this with the same
    arguments, each makes its part of what is missing, and each returns when all is made.

    Raises:
        UserError: the folder holds something else, another run is at work there, or it cannot be written.
    """
    if size < 1:
        raise UserError(f"A store holds at least 1 impression, not {size}.")
    if size > MOST_SHARDS * settings.shard:
        raise UserError(
            f"{size:,} impressions in shards of {settings.shard:,} are more than {MOST_SHARDS:,} files; "
            "ask for fewer (transfer.size), or for larger shards (transfer.synthesis.shard)."
        )
    counts = [min(settings.shard, size - first) for first in range(0, size, settings.shard)]
    if not batch_norms(teacher.model):
        settings = dataclasses.replace(settings, batch_statistics=0.0)
    identity = {
        "teacher": teacher.fingerprint,
        "input": {**dataclasses.asdict(teacher.spec), "shape": list(teacher.spec.shape)},
        "targets": plan.identity,
        "synthesis": settings_identity(settings),
        "size": size,
        "seed": seed,
    }
    identity = plain(identity)
    term: FeatureTerm | None = getattr(plan, "term", None)
    environment = {
        "device": teacher.device.type,
        "threads": torch.get_num_threads(),
        "precision": "float32",
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    # Denormals slow a CPU by a factor of up to a hundred; other libraries switch the flushing off again at times, and
    # the bits depend on it.
    torch.set_flush_denormal(True)
    folder = make_folder(folder)
    with only_writers(folder) as team:
        manifest = team.first(lambda: ImpressionStore.create(folder, identity, counts, environment).manifest)
        store = ImpressionStore(folder, manifest)
        store.require(identity, counts)  # another machine's teacher may be another one
        every = range(len(counts))
        missing = sorted(chain.from_iterable(team.collect(store.missing(team.share(every)))))
        mine = team.share(missing)
        other = store.other_environment(environment)
        if other and mine and store.manifest["shards"]:
            differing = ", ".join(f"{key} {store.manifest['environment'].get(key)}" for key in other)
            print(
                f"{folder} was begun with {differing}, and goes on with {', '.join(map(str, other.values()))}: what is "
                "missing is as good, but not the same to the bit. The manifest tells which shards these are.",
                file=sys.stderr,
            )
        total, done = size, size - sum(counts[index] for index in missing)
        if not team.alone:
            total, done, quiet = sum(counts[index] for index in mine), 0, quiet or not team.leads
            label = f"{label} (1 of {team.size} parts)"
        threads = torch.get_num_threads()
        torch.set_num_threads(int(store.manifest["environment"]["threads"]))  # the bits depend on it
        try:
            with Progress(label, total, "impressions", done=done, quiet=quiet) as progress:
                for index in mine:
                    started = time.monotonic()
                    first = sum(counts[:index])
                    targets = plan.targets(first, counts[index], size, derive_seed(seed, "targets", index))
                    random = generator(seed, "start", index)
                    starts, free = start_images(settings.start, counts[index], teacher.spec, random, settings.hold)
                    prior = _log_uniform(*settings.total_variation, counts[index], random)
                    temperatures = _log_uniform(*settings.temperatures, counts[index], random).unsqueeze(1)
                    limits = _log_uniform(*settings.step_limits, counts[index], random).round()
                    orders = Orders(targets, starts, temperatures, prior, limits, free)
                    impressions = synthesize_shard(teacher, orders, settings, progress.advance, term)
                    store.write(index, impressions, time.monotonic() - started, environment, note=not team.alone)
        finally:
            torch.set_num_threads(threads)
        for lines in team.collect({str(index): store.manifest["shards"][str(index)] for index in mine}):
            store.manifest["shards"].update(lines)
        if team.leads:
            store.settle()
    return store


def _log_uniform(low: float, high: float, count: int, random: torch.Generator) -> Tensor:
    if low == high:
        return torch.full((count,), float(low))
    return low * (high / low) ** torch.rand(count, generator=random)
