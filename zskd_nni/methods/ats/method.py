"""ATS: Effectiveness of Arbitrary Transfer Sets for Data-free KD (Nayak, Mopuri, Chakraborty, WACV 2021, 2011.09113).

A student can be trained on any images, if the teacher predicts all classes for them equally often.

We had neither the paper's full text nor code of the authors. Its abstract says: transfer sets of random noise, of
synthetic images and of natural data sets were compared on MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100, and those that
are *target-class balanced* work well. The rest is our reading:

1. Label: ``k(u) = argmax T(u)`` for every candidate ``u``; labels that come with the images are ignored.
2. Quota: ``q = floor(N / K)`` for each class; the set has ``K q`` images.
3. Candidates are taken in order, each into its class, as long as the class has room.
4. Scarce classes (``fill``): with ``augment``, the class's images are augmented in turn, and those that the teacher
   still puts into the class are taken. What is missing then, and with ``confidence`` all that is missing, is filled
   with the candidates that were not taken and have the highest probability of the class (one candidate may serve
   several classes). With ``none`` the class stays short.
5. Without balancing: the first ``K q`` candidates.
6. The student is distilled on the set with the teacher's logits, as on any other.

Classes can miss the quota in different ways. The description of the set therefore counts for every class how many
images are its own, how many are augmented repeats, and how many are only the nearest. A teacher that
puts all candidates into one class cannot balance a source: that is an error, which gives the counts.

Sources are those of :mod:`zskd_nni.data.candidates`: procedural ones, or real images by name or path. Only the latter
read images. Several sources take turns. Steps 1 to 5 are :mod:`zskd_nni.methods.ats.balance`.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from zskd_nni.data.candidates import Candidates, ImageLocation
from zskd_nni.data.sources import StoredSource
from zskd_nni.methods.ats.balance import ORIGINS, AtsSettings, CandidateSelection, balance
from zskd_nni.methods.ats.transfer_set import DESCRIPTION, FORMAT, IMAGES, TransferSet
from zskd_nni.methods.registry import PresetMethod, TransferRequest
from zskd_nni.models.teacher import Teacher
from zskd_nni.runtime import signals
from zskd_nni.runtime.distributed import team
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import fingerprint_of, make_folder, plain, write_json
from zskd_nni.runtime.locks import only_writer
from zskd_nni.runtime.progress import Progress
from zskd_nni.runtime.run_identity import describe_difference
from zskd_nni.runtime.tensors import load_sealed, save_sealed, save_tensors

PROGRESS = "progress.pt"
SAVE_EVERY = 30.0  # seconds between two writes of it


def make_transfer_set(
    teacher: Teacher,
    settings: AtsSettings,
    *,
    size: int,
    seed: int,
    folder: str | Path,
    label: str = "transfer set",
    where: ImageLocation | None = None,
    quiet: bool = False,
) -> TransferSet:
    """Make a set of ``K * floor(size / K)`` images in ``folder``, or resume it.

    Args:
        teacher: labels the candidates.
        settings: sources and balancing.
        size: N.
        seed: names the random streams.
        folder: made if need be.
        label: shown beside the progress.
        where: real images are, and which part of them to use.
        quiet: no progress.

    Raises:
        UserError: the folder holds another set, another run is at work there, images cannot be read, the size is
            below the number of classes, or the teacher puts all candidates into one class.
    """
    if size < teacher.num_classes:
        raise UserError(
            f"A transfer set of {size} images has less than one for each of the teacher's {teacher.num_classes} "
            f"classes; ask for at least {teacher.num_classes}."
        )
    torch.set_flush_denormal(True)
    folder = make_folder(folder)

    def description() -> dict[str, Any]:
        with only_writer(folder):
            candidates = Candidates(
                settings.sources,
                teacher.spec,
                settings.candidates * size,
                seed,
                where,
                split=settings.split,
                deviation=settings.deviation,
            )
            identity = {
                "method": "ats",
                "teacher": teacher.fingerprint,
                "settings": plain(asdict(settings)),
                "data": candidates.data,
                "size": size,
                "seed": seed,
            }
            finished = _finished_set(folder, identity)
            return (finished or _make(teacher, settings, candidates, identity, folder, label, quiet)).description

    return TransferSet(folder, team().first(description))  # one of several processes makes it, all read it


def _finished_set(folder: Path, identity: dict[str, Any]) -> TransferSet | None:
    """The set in the folder, if it is finished and intact.

    Raises:
        UserError: the folder holds another set, or a store of impressions.
    """
    if (folder / "manifest.json").exists():
        raise UserError(f"{folder} holds data impressions. Use another folder.")
    if not (folder / DESCRIPTION).exists():
        return None
    found = TransferSet.open(folder)
    difference = describe_difference(found.description["identity"], identity)
    if difference:
        raise UserError(f"{folder} holds another transfer set ({difference}). Use another folder.")
    return found if found.is_intact() else None


def _make(
    teacher: Teacher,
    settings: AtsSettings,
    candidates: Candidates,
    identity: dict[str, Any],
    folder: Path,
    label: str,
    quiet: bool,
) -> TransferSet:
    classes = teacher.num_classes
    selection = CandidateSelection(classes, identity["size"] // classes, teacher.spec.shape, settings.balanced)
    fingerprint, saved, saved_at = fingerprint_of(identity), folder / PROGRESS, time.monotonic()
    if saved.exists():
        _resume(selection, saved, fingerprint)
    done = sum(count for _, _, count in candidates.blocks[: selection.block])
    with Progress(label, candidates.total, "candidates", done=done, quiet=quiet) as progress:

        def on_block(images: int) -> None:
            nonlocal saved_at
            progress.advance(images, f"{int((selection.counts >= selection.quota).sum())} classes full")
            try:
                signals.check()
            except signals.Interrupted:
                save_sealed(saved, {"fingerprint": fingerprint, "classes": selection.state_dict()})
                raise
            if time.monotonic() - saved_at >= SAVE_EVERY:
                save_sealed(saved, {"fingerprint": fingerprint, "classes": selection.state_dict()})
                saved_at = time.monotonic()

        images, labels, origins = balance(teacher, candidates, settings, selection, on_block)
    checksum = save_tensors(folder / IMAGES, {"images": images, "labels": labels, "origins": origins})
    counts = {"candidates": selection.seen.tolist()}
    for code, name in enumerate(ORIGINS):
        counts[name] = torch.bincount(labels[origins == code], minlength=classes).tolist()
    description = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "identity": identity,
        "quota": selection.quota,
        "images": len(images),
        "counts": counts,
        "sha256": checksum,
    }
    write_json(folder / DESCRIPTION, description)
    saved.unlink(missing_ok=True)
    return TransferSet(folder, description)


def _resume(selection: CandidateSelection, saved: Path, fingerprint: str) -> None:
    """Restore the selection of an unfinished set, if the file belongs to the same set.

    Raises:
        UserError: the file is damaged.
    """
    try:
        state = load_sealed(saved)
    except UserError as error:
        raise UserError(f"{error} Remove {saved} to begin the set anew.") from error
    if state.get("fingerprint") == fingerprint:
        selection.load_state_dict(state["classes"])


PRESETS: dict[str, dict[str, Any]] = {
    # Data-free, from the source that the paper's abstract names second; how the paper fills classes is not known.
    "paper": {"sources": ("shapes",), "balanced": True, "fill": "augment"},
    "unbalanced": {"sources": ("shapes",), "balanced": False, "fill": "none"},
}


class Ats(PresetMethod):
    """ATS as a method of recipes."""

    def source(self, teacher: Teacher, request: TransferRequest) -> StoredSource:
        """Make the set, or resume it, and draw batches from it."""
        part = "held-out" if request.held_out else "other"
        where = ImageLocation(request.root, request.download, request.base, part)
        found = make_transfer_set(teacher, request.options, where=where, **request.set_arguments())
        return StoredSource(found.images(), request.batch_size, request.seed, found.fingerprint, teacher.device)


METHOD = Ats("ats", AtsSettings, PRESETS)
