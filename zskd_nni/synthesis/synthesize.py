"""Making a store of impressions: the missing shards are synthesised one by one."""

from __future__ import annotations

import dataclasses
import platform
import sys
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from zskd_nni.data.procedural import start_images
from zskd_nni.models.input_spec import InputSpec
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime.allocator import keep_freed_memory
from zskd_nni.runtime.distributed import only_writers
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import make_folder, plain
from zskd_nni.runtime.gradients import with_gradients
from zskd_nni.runtime.progress import Progress
from zskd_nni.runtime.rng import derive_seed, generator
from zskd_nni.synthesis.batch_norm_statistics import batch_norms
from zskd_nni.synthesis.engine import FeatureTerm, ShardInputs, synthesize_shard
from zskd_nni.synthesis.settings import SynthesisSettings
from zskd_nni.synthesis.store import MOST_SHARDS, ImpressionStore


class TargetPlan(Protocol):
    """The soft target of each impression of a set.

    A plan may also have an attribute ``term``, a further term of the images' objective (a
    :class:`~zskd_nni.synthesis.engine.FeatureTerm`, or None). Its identity must then describe the term.

    Attributes:
        identity: JSON-able; describes the targets.
    """

    identity: dict[str, Any]

    def targets(self, first: int, count: int, total: int, seed: int) -> Tensor:
        """``(count, K)`` soft targets of impressions ``first`` to ``first + count`` out of ``total``."""


@with_gradients()
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
    """Make ``size`` impressions in ``folder``, or those of them that are missing.

    The same arguments give the same impressions; on the CPU, and with as many threads, bit by bit. A finished shard
    is never made again, a damaged one is.

    Processes of one ``torch.distributed`` process group share the work: all call this with the same arguments, each
    makes its part of the missing shards, and each returns when all are made.

    Args:
        teacher: on the device to use.
        plan: which soft targets the impressions have.
        settings: how images are optimised.
        size: number of impressions.
        seed: names the random streams.
        folder: of the store; made if need be.
        label: shown beside the progress.
        quiet: no progress.

    Raises:
        UserError: the folder holds something else, another run is at work there, or it cannot be written.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from zskd_nni import InputSpec, Teacher
        >>> from zskd_nni.methods.zskd import ZskdSettings, ZskdTargets
        >>> teacher = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), InputSpec((1, 8, 8)))
        >>> plan, settings = ZskdTargets(teacher, ZskdSettings()), SynthesisSettings(max_steps=5)
        >>> store = synthesize(teacher, plan, settings, size=12, seed=0, folder=tempfile.mkdtemp(), quiet=True)
        >>> store.images().shape
        torch.Size([12, 1, 8, 8])
    """
    keep_freed_memory()
    shard_sizes = _shard_sizes(size, settings.shard)
    if not batch_norms(teacher.model):
        settings = dataclasses.replace(settings, batch_statistics=0.0)
    identity = plain(
        {
            "teacher": teacher.fingerprint,
            "input": dataclasses.asdict(teacher.spec),
            "targets": plan.identity,
            "synthesis": dataclasses.asdict(settings),
            "size": size,
            "seed": seed,
        }
    )
    environment = _environment(teacher)
    folder = make_folder(folder)
    with only_writers(folder) as team:
        manifest = team.first(lambda: ImpressionStore.create(folder, identity, shard_sizes, environment).manifest)
        store = ImpressionStore(folder, manifest)
        store.check_identity(identity, shard_sizes)  # another machine's teacher may be another one
        missing = sorted(chain.from_iterable(team.collect(store.missing(team.share(range(len(shard_sizes)))))))
        mine = team.share(missing)
        total, done = size, size - sum(shard_sizes[index] for index in missing)
        if not team.alone:
            total, done, quiet = sum(shard_sizes[index] for index in mine), 0, quiet or not team.leads
            label = f"{label} (1 of {team.size} parts)"
        with Progress(label, total, "impressions", done=done, quiet=quiet) as progress:
            _make_shards(teacher, plan, settings, store, mine, progress.advance, notes=not team.alone)
        for entries in team.collect({str(index): store.manifest["shards"][str(index)] for index in mine}):
            store.manifest["shards"].update(entries)
        if team.leads:
            store.merge_notes()
    return store


def _make_shards(
    teacher: Teacher,
    plan: TargetPlan,
    settings: SynthesisSettings,
    store: ImpressionStore,
    shards: Sequence[int],
    on_finished: Callable[[int], None],
    notes: bool,
) -> None:
    """Make these shards one by one, with as many threads as the store was begun with: the bits depend on it."""
    environment, seed = _environment(teacher), store.manifest["identity"]["seed"]
    term: FeatureTerm | None = getattr(plan, "term", None)
    if shards:
        _tell_changed_environment(store, environment)
    # Denormals slow a CPU by a factor of up to a hundred, and the bits depend on flushing them. Other libraries
    # sometimes switch it off.
    torch.set_flush_denormal(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(store.manifest["environment"]["threads"])
    try:
        for index in shards:
            started = time.monotonic()
            inputs = _shard_inputs(teacher.spec, plan, settings, store.shard_sizes, index, seed)
            impressions = synthesize_shard(teacher, inputs, settings, on_finished, term)
            store.write(index, impressions, time.monotonic() - started, environment, note=notes)
    finally:
        torch.set_num_threads(threads)


def _environment(teacher: Teacher) -> dict[str, Any]:
    return {
        "device": teacher.device.type,
        "threads": torch.get_num_threads(),
        "precision": "float32",
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _shard_sizes(size: int, shard: int) -> list[int]:
    if size < 1:
        raise UserError(f"A store holds at least 1 impression, not {size}.")
    if size > MOST_SHARDS * shard:
        raise UserError(
            f"{size:,} impressions in shards of {shard:,} are more than {MOST_SHARDS:,} files; "
            "ask for fewer (transfer.size), or for larger shards (transfer.synthesis.shard)."
        )
    return [min(shard, size - first) for first in range(0, size, shard)]


def _shard_inputs(
    spec: InputSpec, plan: TargetPlan, settings: SynthesisSettings, shard_sizes: list[int], index: int, seed: int
) -> ShardInputs:
    """Targets, starts and weights of shard ``index``; they depend on the seed and the index alone."""
    count = shard_sizes[index]
    targets = plan.targets(sum(shard_sizes[:index]), count, sum(shard_sizes), derive_seed(seed, "targets", index))
    random = generator(seed, "start", index)
    starts, free = start_images(settings.start, count, spec, random, settings.hold)
    prior = _log_uniform(*settings.total_variation, count, random)
    temperatures = _log_uniform(*settings.temperatures, count, random).unsqueeze(1)
    limits = _log_uniform(*settings.step_limits, count, random).round()
    return ShardInputs(targets, starts, temperatures, prior, limits, free)


def _log_uniform(low: float, high: float, count: int, random: torch.Generator) -> Tensor:
    if low == high:
        return torch.full((count,), float(low))
    return low * (high / low) ** torch.rand(count, generator=random)


def _tell_changed_environment(store: ImpressionStore, environment: dict[str, Any]) -> None:
    changed = store.changed_environment(environment)
    if changed and store.manifest["shards"]:
        before = ", ".join(f"{key} {store.manifest['environment'].get(key)}" for key in changed)
        print(
            f"{store.folder} was begun with {before}, and continues with {', '.join(map(str, changed.values()))}. The "
            "new shards are as good, but not identical bit for bit. The manifest names them.",
            file=sys.stderr,
        )
