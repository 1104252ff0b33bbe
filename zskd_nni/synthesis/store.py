"""The store: nothing finished is ever lost, nothing damaged is ever used.

A folder of safetensors shards and one ``manifest.json`` that says what they are: the teacher's fingerprint, the
recipe, the seed, versions, and every shard's checksum. Files are written under another name, flushed and renamed. A
shard that is missing or damaged is made again from its own seed.

Where several processes make a store, each writes its shards' lines into notes beside them; the first of them puts all
into the manifest when everything is made, or when the work is taken up again.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import fingerprint_of, make_folder, read_json, sha256_of_file, write_json
from zskd_nni.runtime.run_identity import describe_difference
from zskd_nni.runtime.tensors import load_tensors, save_tensors
from zskd_nni.synthesis.engine import Impressions
from zskd_nni.synthesis.lazy_images import ShardImages, StoredImages

MANIFEST = "manifest.json"
FORMAT = "zskd_nni impressions 1"
_SHARD_NAME = re.compile(r"shard-\d{5}\.safetensors")
_NOTE_NAME = re.compile(r"shard-(\d{5})\.json")
MOST_SHARDS, MOST_THREADS = 100_000, 4096
_FIELDS = ("images", "targets", "logits", "fit", "steps")


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.safetensors"


def note_name(index: int) -> str:
    """File name of a shard's line of the manifest while that is not in the manifest."""
    return f"shard-{index:05d}.json"


class ImpressionStore:
    """A folder of impressions.

    Use :meth:`create` to make or resume one and :meth:`open` to read one.

    Attributes:
        folder: where it is.
        manifest: the content of ``manifest.json``.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def create(
        cls, folder: str | Path, identity: dict[str, Any], plan: list[int], environment: dict[str, Any]
    ) -> ImpressionStore:
        """Make a store, or take one up again.

        Args:
            folder: made if need be.
            identity: JSON-able; what these impressions are (teacher, method, settings, seed). A store of another
                identity is refused.
            plan: number of impressions of each shard.
            environment: JSON-able; how they are made (threads, slots, versions). The first run's stays in force.

        Raises:
            UserError: the folder holds another store, or something that is not one.
        """
        folder = make_folder(folder)
        path = folder / MANIFEST
        if path.exists():
            store = cls.open(folder)
            store.require(identity, plan)
            store.settle()
            return store
        if (folder / "set.json").exists():
            raise UserError(f"{folder} holds an arbitrary transfer set. Use another folder.")
        if any(_SHARD_NAME.fullmatch(entry.name) for entry in folder.iterdir()):
            raise UserError(
                f"{folder} holds shards but no {MANIFEST}, so that nobody can say what they are. "
                "Put the manifest back, or remove the folder."
            )
        manifest = {
            "format": FORMAT,
            "fingerprint": fingerprint_of(identity),
            "identity": identity,
            "environment": environment,
            "plan": plan,
            "shards": {},
        }
        store = cls(folder, manifest)
        store._write_manifest()
        return store

    @classmethod
    def open(cls, folder: str | Path) -> ImpressionStore:
        """Read a store's manifest, and the notes on shards that are not in it yet.

        Raises:
            UserError: there is none, or it is not sound.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            inner = folder / "impressions"  # of a whole run's folder
            hint = f" Did you mean {inner}?" if (inner / MANIFEST).is_file() else ""
            raise UserError(f"{folder} is not a store of impressions: it has no {MANIFEST}.{hint}")
        notes = _notes(folder)  # first: the one writer puts them into the manifest, and then removes them
        manifest = read_json(folder / MANIFEST)
        problem = _problem_with(manifest)
        if problem:
            raise UserError(f"{folder / MANIFEST} is not sound ({problem}). Remove the folder to make it anew.")
        known = {index: entry for index, entry in notes.items() if int(index) < len(manifest["plan"])}
        manifest["shards"] |= known
        return cls(folder, manifest)

    def require(self, identity: dict[str, Any], plan: list[int]) -> None:
        """Refuse a store of other impressions; arguments as in :meth:`create`.

        Raises:
            UserError: teacher, method, settings, seed or size differ.
        """
        difference = describe_difference(self.manifest["identity"], identity)
        if difference or self.plan != plan:
            raise UserError(
                f"{self.folder} holds impressions of another run ({difference or 'another number of impressions'}). "
                "Use another folder, or remove this one."
            )

    def settle(self) -> None:
        """Write the manifest, in the order of shards, and remove the notes; only the one writer may call this."""
        notes = [path for path in self.folder.iterdir() if _NOTE_NAME.fullmatch(path.name) and not path.is_dir()]
        if notes:
            shards = self.manifest["shards"]
            self.manifest["shards"] = {index: shards[index] for index in sorted(shards, key=int)}
            self._write_manifest()
        for note in notes:
            note.unlink(missing_ok=True)

    def _write_manifest(self) -> None:
        write_json(self.folder / MANIFEST, self.manifest)

    @property
    def plan(self) -> list[int]:
        """Number of impressions of each shard."""
        return self.manifest["plan"]

    @property
    def fingerprint(self) -> str:
        """Of what these impressions are."""
        return self.manifest["fingerprint"]

    def __len__(self) -> int:
        return sum(self.plan)

    def missing(self, among: Sequence[int] | None = None) -> list[int]:
        """Shards (of those named, or of all) that are not there or not as their checksum says, in order."""
        looked_at = range(len(self.plan)) if among is None else among
        return [index for index in looked_at if self.damage(index) is not None]

    def damage(self, index: int) -> str | None:
        """What is wrong with a shard, or None: ``not made yet``, ``gone``, ``not as written``."""
        entry = self.manifest["shards"].get(str(index))
        if entry is None:
            return "not made yet"
        path = self.folder / shard_name(index)
        if path.is_symlink() or not path.is_file():
            return "gone"
        return None if sha256_of_file(path) == entry["sha256"] else "not as written"

    def write(
        self,
        index: int,
        impressions: Impressions,
        seconds: float,
        environment: dict[str, Any] | None = None,
        note: bool = False,
    ) -> None:
        """Keep a finished shard: first its file, then its line in the manifest.

        Args:
            index: of the shard.
            impressions: what it holds.
            seconds: that it took.
            environment: of this run; what differs from the store's is noted with the shard.
            note: leave the manifest to another process, and put the line into a note beside the shard.
        """
        tensors = {name: getattr(impressions, name) for name in _FIELDS}
        # Half precision is finer than 8-bit images by far; the teacher labels what is stored anew in any case.
        tensors["images"] = tensors["images"].half()
        for name, values in tensors.items():
            if values.is_floating_point() and not torch.isfinite(values).all():
                raise UserError(f"Shard {index} of {self.folder} was not written: its {name} are not finite.")
        checksum = save_tensors(self.folder / shard_name(index), tensors)
        histogram = torch.bincount(impressions.steps.long())
        spent = {str(step): int(count) for step, count in enumerate(histogram) if count}
        self.manifest["shards"][str(index)] = {
            "sha256": checksum,
            "fit": round(float(impressions.fit.double().mean()), 9),
            "steps": spent,
            "seconds": round(seconds, 3),
        }
        other = self.other_environment(environment or {})
        if other:
            self.manifest["shards"][str(index)]["environment"] = other
        if note:
            write_json(self.folder / note_name(index), self.manifest["shards"][str(index)])
        else:
            self._write_manifest()

    def other_environment(self, environment: dict[str, Any]) -> dict[str, Any]:
        """What in ``environment`` is not as in the one that the store was begun in; threads are put back to that."""
        known = self.manifest["environment"]
        return {key: value for key, value in environment.items() if key != "threads" and known.get(key) != value}

    def read(self, index: int) -> Impressions:
        """A shard, checked against its checksum.

        Raises:
            UserError: it is missing or damaged.
        """
        problem = self.damage(index)
        if problem is not None:
            raise UserError(
                f"{self.folder / shard_name(index)} is {problem}. "
                "Run the same synthesis again: it makes that shard anew."
            )
        tensors, _ = load_tensors(self.folder / shard_name(index))
        problem = self._unfit(tensors, self.plan[index])
        if problem:
            planned = f"the {self.plan[index]} impressions planned"
            raise UserError(f"{self.folder / shard_name(index)} does not hold {planned}: {problem}.")
        return Impressions(**tensors)

    def _unfit(self, tensors: dict[str, Tensor], count: int) -> str:
        """What is wrong with a shard whose checksum is right: a manifest can be forged as well."""
        if set(tensors) != set(_FIELDS):
            return f"it has {', '.join(sorted(tensors)) or 'nothing'}"
        shape = self.manifest["identity"].get("input", {}).get("shape", list(tensors["images"].shape[1:]))
        classes = tensors["logits"].shape[1:]
        expected = {"images": tuple(shape), "targets": classes, "logits": classes, "fit": (), "steps": ()}
        for name, value in tensors.items():
            if tuple(value.shape) != (count, *expected[name]) or (name in ("targets", "logits") and value.ndim != 2):
                return f"its {name} are of shape {list(value.shape)}"
            if value.is_floating_point() != (name != "steps") or (name == "images" and value.dtype != torch.float16):
                return f"its {name} are of type {str(value.dtype).removeprefix('torch.')}"
            if value.is_floating_point() and not torch.isfinite(value).all():
                return f"its {name} are not finite"
        return ""

    def images(self) -> Tensor:
        """All images ``(N, C, H, W)``, float16, in order; a copy in memory."""
        return self.images_on_disk()[:]

    def images_on_disk(self) -> StoredImages:
        """All images, to be read when they are asked for. Every shard is checked here, one at a time.

        Raises:
            UserError: a shard is missing or damaged.
        """
        shards, shape = [], torch.Size()
        for index, count in enumerate(self.plan):
            shape = self.read(index).images.shape[1:]
            shards.append(ShardImages.of(self.folder / shard_name(index), count))
        return StoredImages(shards, shape)

    def steps_histogram(self) -> dict[int, int]:
        """How many impressions left after how many steps."""
        total: dict[int, int] = {}
        for entry in self.manifest["shards"].values():
            for step, count in entry["steps"].items():
                total[int(step)] = total.get(int(step), 0) + count
        return dict(sorted(total.items()))

    def summary(self) -> dict[str, Any]:
        """Counts, mean fit, seconds and rate, for reports."""
        shards = self.manifest["shards"]
        made = sum(self.plan[int(index)] for index in shards)
        seconds = sum(entry["seconds"] for entry in shards.values())
        fit = sum(entry["fit"] * self.plan[int(index)] for index, entry in shards.items()) / max(1, made)
        steps = self.steps_histogram()
        image_steps = sum(step * count for step, count in steps.items())
        return {
            "impressions": made,
            "mean_fit": fit,
            "mean_steps": image_steps / max(1, made),
            "seconds": seconds,
            "impressions_per_second": made / seconds if seconds else None,
            "image_steps_per_second": image_steps / seconds if seconds else None,
            "steps": {str(step): count for step, count in steps.items()},
        }


def _problem_with(manifest: Any) -> str | None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return f"its format is not {FORMAT!r}"
    plan, shards = manifest.get("plan"), manifest.get("shards")
    if not isinstance(plan, list) or not all(type(count) is int and 0 < count < 2**31 for count in plan) or not plan:
        return "'plan' is not a list of counts"
    if not isinstance(manifest.get("identity"), dict) or not isinstance(manifest.get("environment"), dict):
        return "'identity' or 'environment' is missing"
    if type(manifest["environment"].get("threads")) is not int or manifest["environment"]["threads"] < 1:
        return "'environment' does not say how many threads"
    if manifest["environment"]["threads"] > MOST_THREADS:
        return f"'environment' says more than {MOST_THREADS} threads"
    if manifest.get("fingerprint") != fingerprint_of(manifest["identity"]):
        return "its fingerprint is not that of its identity: it was edited"
    if not isinstance(shards, dict):
        return "'shards' is missing"
    problems = (_problem_with_line(index, entry, len(plan)) for index, entry in shards.items())
    return next((problem for problem in problems if problem), None)


def _problem_with_line(index: str, entry: Any, shards: int) -> str | None:
    if not (re.fullmatch(r"0|[1-9][0-9]{0,4}", index) and int(index) < shards and isinstance(entry, dict)):
        return f"there is no shard {index!r} in its plan"
    if not isinstance(entry.get("sha256"), str) or not isinstance(entry.get("steps"), dict):
        return f"shard {index} has no checksum"
    counts = entry["steps"].items()
    if not all(re.fullmatch(r"[0-9]{1,9}", step) and type(count) is int for step, count in counts):
        return f"the steps of shard {index} are no counts"
    if not _is_figure(entry.get("fit")) or not _is_figure(entry.get("seconds")):
        return f"shard {index} has no figures"
    return None


def _notes(folder: Path) -> dict[str, Any]:
    """Sound notes; a shard whose note is not is made again."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        name = _NOTE_NAME.fullmatch(path.name)
        if name is None or path.is_symlink() or not path.is_file():
            continue
        index = str(int(name[1]))
        with contextlib.suppress(UserError):
            entry = read_json(path)
            if _problem_with_line(index, entry, int(index) + 1) is None:
                found[index] = entry
    return found


def _is_figure(value: Any) -> bool:
    return isinstance(value, float | int) and abs(value) < math.inf
