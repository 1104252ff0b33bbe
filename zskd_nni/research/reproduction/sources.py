"""Transfer sets of cells. Cells that need the same images share them: the folder is named after what they are."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from zskd_nni.data.lazy_images import LazyImages
from zskd_nni.data.sources import NoiseSource, StoredSource, TransferSource
from zskd_nni.methods.ats.transfer_set import TransferSet
from zskd_nni.methods.registry import TransferRequest, find_method
from zskd_nni.models.teacher import Teacher
from zskd_nni.research.reproduction.cells import IMPRESSIONS, SOURCES, Plan
from zskd_nni.research.reproduction.context import PairContext
from zskd_nni.research.reproduction.records import read_run_file
from zskd_nni.runtime import signals
from zskd_nni.runtime.files import fingerprint_of, make_folder, plain, write_json
from zskd_nni.runtime.locks import FolderInUseError, only_writer
from zskd_nni.runtime.rng import derive_seed
from zskd_nni.synthesis import ImpressionStore


@dataclass(frozen=True)
class BuiltSource:
    """A transfer source and what it cost.

    Attributes:
        source: of the student's images; None for a cell that has none.
        seconds: that making the images took, in whichever run.
        facts: about the images, for the record.
    """

    source: TransferSource | None
    seconds: float = 0.0
    facts: dict[str, Any] | None = None


def make_source(plan: Plan, context: PairContext, seed: int) -> BuiltSource:
    """Make a cell's transfer set, resume it, or load the one that another cell made.

    Impressions are made in blocks. The first has the run's seed, as in a recipe, the others have derived ones, so that
    n of N images are the first n of them.

    Raises:
        CannotBalanceError: the teacher puts all candidates of ATS into one class.
        UserError: anything else that the user can correct.
    """
    cell, teacher, batch = plan.cell, context.teacher, plan.student.batch
    if cell.method == "noise":
        return BuiltSource(NoiseSource(teacher.spec, batch))
    if cell.method not in SOURCES:
        return BuiltSource(None)
    assert plan.size is not None
    if cell.method == "real-kd":
        return _real_images(plan, context, seed)
    in_blocks = cell.method in IMPRESSIONS and getattr(plan.options.targets, "order", "interleaved") != "rows"
    block = plan.scale.block if in_blocks else plan.size
    folder = _folder(plan, context, seed, block)
    images: list[Any] = []
    fingerprints, seconds = [], 0.0
    facts: dict[str, Any] = {}
    blocks = -(-plan.size // block)
    for number in range(blocks):
        request = TransferRequest(
            size=block,
            batch_size=batch,
            seed=seed if number == 0 else derive_seed(seed, "block", number) % 2**31,
            folder=folder / f"block-{number:03d}" / "set",
            options=plan.options,
            label=f"{plan.name} seed {seed}, images {number + 1} of {blocks}",
            quiet=context.workspace.quiet,
            root=context.workspace.root,
            download=context.workspace.download,
        )
        source, spent = _make_block(plan, teacher, request)
        images.append(source.images)
        fingerprints.append(source.fingerprint)
        seconds += spent
        facts = _facts_of(request.folder, facts)
    if not in_blocks:
        return BuiltSource(source, round(seconds, 2), facts)
    first = LazyImages.concatenate(images).first(plan.size)
    source = StoredSource(first, batch, seed, fingerprint_of([fingerprints, len(first)]), teacher.device)
    return BuiltSource(source, round(seconds * len(first) / (block * blocks), 2), facts)


def _folder(plan: Plan, context: PairContext, seed: int, block: int) -> Path:
    method, options = plan.cell.method, plain(asdict(plan.options))
    identity = [context.teacher.fingerprint, method, options, seed, block, context.workspace.device_kind]
    name = f"{plan.cell.pair}-{method}-{fingerprint_of(identity)[:16]}"
    return context.workspace.runs / "transfer" / name


def _make_block(plan: Plan, teacher: Teacher, request: TransferRequest) -> tuple[StoredSource, float]:
    """The source of a block, and the seconds that making it took, summed over interrupted runs."""
    home = make_folder(request.folder.parent)
    clock = home / "seconds.json"
    known: dict[str, Any] = {"seconds": 0.0, "finished": False}
    with _wait_for_lock(home, request.quiet):
        if clock.exists():
            known = read_run_file(clock, {"seconds": float, "finished": bool})
        started, finished = time.monotonic(), False
        try:
            source = find_method(SOURCES[plan.cell.method]).source(teacher, request)
            finished = True
        finally:
            if not known["finished"]:
                known = {"seconds": round(known["seconds"] + time.monotonic() - started, 3), "finished": finished}
                write_json(clock, known)
    assert isinstance(source, StoredSource)
    # A killed process leaves no time, but its finished shards have theirs.
    has_shards = (request.folder / "manifest.json").exists()
    of_shards = ImpressionStore.open(request.folder).summary()["seconds"] if has_shards else 0.0
    return source, max(known["seconds"], of_shards)


@contextlib.contextmanager
def _wait_for_lock(folder: Path, quiet: bool) -> Iterator[None]:
    """Hold the folder's lock within the block; waits for another run that holds it."""
    announced = quiet
    with contextlib.ExitStack() as stack:
        while True:
            signals.check()
            try:
                stack.enter_context(only_writer(folder))
                break
            except FolderInUseError:
                if not announced:
                    print(f"waiting for another run that makes the same images in {folder}")
                    announced = True
                time.sleep(1)
        yield


def _facts_of(folder: Path, before: dict[str, Any]) -> dict[str, Any]:
    """Mean fit and steps over the blocks so far, or the counts of an arbitrary set by class and origin."""
    if (folder / "set.json").exists():
        return {"counts": TransferSet.open(folder).counts}
    if not (folder / "manifest.json").exists():
        return before
    summary, number = ImpressionStore.open(folder).summary(), before.get("blocks", 0)
    means = {
        name: round((before.get(name, 0.0) * number + summary[name]) / (number + 1), 6)
        for name in ("mean_fit", "mean_steps")
    }
    return {"blocks": number + 1, **means}


def _real_images(plan: Plan, context: PairContext, seed: int) -> BuiltSource:
    """The training images without their labels, in an order that is the same for every size."""
    data, spec = context.training_images(plan.scale.training_images), context.teacher.spec
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(derive_seed(0, "real", len(data))))
    images = data.pixels(order[: plan.size], spec)
    fingerprint = fingerprint_of(["real", data.name, len(data), len(images)])
    return BuiltSource(StoredSource(images, plan.student.batch, seed, fingerprint, context.teacher.device))
