"""The store of impressions: finished shards are never lost, and damaged ones are never used.

A folder of safetensors shards and one ``manifest.json`` that describes them: the teacher's fingerprint, the settings,
the seed, versions, and a checksum of each shard. Files are written under a temporary name, flushed and renamed. A
shard that is missing or damaged is made again from its own seed.

Several processes may make one store together. Each writes the manifest entries of its shards into notes beside them.
The leading process merges the notes into the manifest when all shards are made, or when the work is resumed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from torch import Tensor

from zskd_nni.data.lazy_images import ImageFile, LazyImages
from zskd_nni.data.sources import StoredSource
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import fingerprint_of, make_folder, read_json, sha256_of_file, write_json
from zskd_nni.runtime.run_identity import check_format, describe_difference
from zskd_nni.runtime.tensors import load_tensors, save_tensors
from zskd_nni.runtime.validation import describe_validation
from zskd_nni.synthesis.engine import Impressions

MANIFEST = "manifest.json"
FORMAT = "zskd_nni impressions 2"  # raise the number when an identity or the content of shards changes its meaning
MOST_SHARDS, MOST_THREADS = 100_000, 4096
_SHARD_NAME = re.compile(r"shard-\d{5}\.safetensors")
_NOTE_NAME = re.compile(r"shard-(\d{5})\.json")
_FIELDS = ("images", "targets", "logits", "fit", "steps")


class _ShardEntry(BaseModel):
    """The manifest's entry of a finished shard."""

    model_config = ConfigDict(strict=True)

    sha256: str
    fit: FiniteFloat
    seconds: FiniteFloat
    steps: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], int]


class _Environment(BaseModel):
    model_config = ConfigDict(strict=True)

    threads: int = Field(ge=1, le=MOST_THREADS)


class _Manifest(BaseModel):
    """The content of ``manifest.json``."""

    model_config = ConfigDict(strict=True)

    fingerprint: str
    identity: dict[str, Any]
    environment: _Environment
    plan: list[Annotated[int, Field(gt=0, lt=2**31)]] = Field(min_length=1)
    shards: dict[Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,4})$")], _ShardEntry]


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.safetensors"


def note_name(index: int) -> str:
    """File name of the note that keeps a shard's manifest entry until it is merged into the manifest."""
    return f"shard-{index:05d}.json"


class ImpressionStore:
    """A folder of impressions. :meth:`create` makes or resumes one, :meth:`open` reads one.

    Attributes:
        folder: where it is.
        manifest: the content of ``manifest.json``.

    Example:
        >>> import tempfile, torch
        >>> from zskd_nni.synthesis import Impressions
        >>> folder = tempfile.mkdtemp()
        >>> store = ImpressionStore.create(folder, {"seed": 0}, shard_sizes=[2, 3], environment={"threads": 1})
        >>> images, logits = torch.rand(2, 1, 8, 8), torch.rand(2, 10)
        >>> fit, steps = torch.zeros(2), torch.tensor([5, 7])
        >>> store.write(0, Impressions(images, logits.softmax(1), logits, fit, steps), seconds=1.0)
        >>> store = ImpressionStore.open(folder)
        >>> len(store), store.missing(), store.steps_histogram()
        (5, [1], {5: 1, 7: 1})
        >>> store.read(0).images.shape, store.read(0).images.dtype
        (torch.Size([2, 1, 8, 8]), torch.float16)
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def create(
        cls, folder: str | Path, identity: dict[str, Any], shard_sizes: list[int], environment: dict[str, Any]
    ) -> ImpressionStore:
        """Make a store, or resume one.

        Args:
            folder: made if need be.
            identity: JSON-able; what these impressions are (teacher, method, settings, seed). A store with another
                identity is refused.
            shard_sizes: number of impressions of each shard.
            environment: JSON-able; how they are made (device, threads, versions). The manifest keeps that of the
                first run.

        Raises:
            UserError: the folder holds another store, or something else.
        """
        folder = make_folder(folder)
        if (folder / MANIFEST).exists():
            store = cls.open(folder)
            store.check_identity(identity, shard_sizes)
            store.merge_notes()
            return store
        if (folder / "set.json").exists():
            raise UserError(f"{folder} holds an arbitrary transfer set. Use another folder.")
        if any(_SHARD_NAME.fullmatch(entry.name) for entry in folder.iterdir()):
            raise UserError(
                f"{folder} holds shards but no {MANIFEST} that describes them. Put the manifest back, or remove the "
                "folder."
            )
        manifest = {
            "format": FORMAT,
            "fingerprint": fingerprint_of(identity),
            "identity": identity,
            "environment": environment,
            "plan": shard_sizes,
            "shards": {},
        }
        store = cls(folder, manifest)
        store._write_manifest()
        return store

    @classmethod
    def open(cls, folder: str | Path) -> ImpressionStore:
        """Read a store's manifest, and the notes that are not merged into it yet.

        Raises:
            UserError: there is no manifest, another version wrote it, or it is damaged.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            inner = folder / "impressions"  # of a whole run's folder
            hint = f" Did you mean {inner}?" if (inner / MANIFEST).is_file() else ""
            raise UserError(f"{folder} is not a store of impressions: it has no {MANIFEST}.{hint}")
        notes = _notes(folder)  # first: merging writes the manifest, and only then removes the notes
        manifest = read_json(path)
        if isinstance(manifest, dict):
            check_format(manifest, FORMAT, path, f"Remove {folder} and run the command again to make it anew.")
        problem = _problem_with(manifest)
        if problem:
            raise UserError(f"{path} is not valid ({problem}). Remove the folder to make it again.")
        manifest["shards"] |= {i: entry for i, entry in notes.items() if int(i) < len(manifest["plan"])}
        return cls(folder, manifest)

    def check_identity(self, identity: dict[str, Any], shard_sizes: list[int]) -> None:
        """Refuse a store of other impressions; arguments as in :meth:`create`.

        Raises:
            UserError: teacher, method, settings, seed or size differ.
        """
        difference = describe_difference(self.manifest["identity"], identity)
        if difference or self.shard_sizes != shard_sizes:
            raise UserError(
                f"{self.folder} holds impressions of another run ({difference or 'another number of impressions'}). "
                "Use another folder, or remove this one."
            )

    def merge_notes(self) -> None:
        """Write the manifest with all entries in order, and remove the notes. Only one process may call this."""
        notes = [path for path in self.folder.iterdir() if _NOTE_NAME.fullmatch(path.name) and not path.is_dir()]
        if notes:
            self.manifest["shards"] = dict(sorted(self.manifest["shards"].items(), key=lambda item: int(item[0])))
            self._write_manifest()
        for note in notes:
            note.unlink(missing_ok=True)

    def _write_manifest(self) -> None:
        write_json(self.folder / MANIFEST, self.manifest)

    @property
    def shard_sizes(self) -> list[int]:
        """Number of impressions of each shard."""
        return self.manifest["plan"]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the identity."""
        return self.manifest["fingerprint"]

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def missing(self, among: Sequence[int] | None = None) -> list[int]:
        """Numbers of the shards, of those given or of all, that are missing or differ from their checksum; in order."""
        numbers = range(len(self.shard_sizes)) if among is None else among
        return [index for index in numbers if self.shard_problem(index)]

    def shard_problem(self, index: int) -> str | None:
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
        """Keep a finished shard: first its file, then its entry in the manifest.

        Args:
            index: number of the shard.
            impressions: as many as planned.
            seconds: the time it took.
            environment: that of this shard; the entry keeps what differs from the store's.
            note: write the entry into a note beside the shard, not into the manifest, which another process writes.

        Raises:
            UserError: the impressions are not finite, or the disk refuses.
        """
        tensors = {name: getattr(impressions, name) for name in _FIELDS}
        # Half precision is much finer than 8-bit images, and the teacher labels the stored images again anyway.
        tensors["images"] = tensors["images"].half()
        for name, values in tensors.items():
            if values.is_floating_point() and not torch.isfinite(values).all():
                raise UserError(f"Shard {index} of {self.folder} was not written: its {name} are not finite.")
        checksum = save_tensors(self.folder / shard_name(index), tensors)
        histogram = torch.bincount(impressions.steps.long())
        entry: dict[str, Any] = {
            "sha256": checksum,
            "fit": round(float(impressions.fit.double().mean()), 9),
            "steps": {str(step): int(count) for step, count in enumerate(histogram) if count},
            "seconds": round(seconds, 3),
        }
        if changed := self.changed_environment(environment or {}):
            entry["environment"] = changed
        self.manifest["shards"][str(index)] = entry
        if note:
            write_json(self.folder / note_name(index), entry)
        else:
            self._write_manifest()

    def changed_environment(self, environment: dict[str, Any]) -> dict[str, Any]:
        """What differs from the environment of the first run, except threads: later runs take its number of threads."""
        known = self.manifest["environment"]
        return {key: value for key, value in environment.items() if key != "threads" and known.get(key) != value}

    def read(self, index: int) -> Impressions:
        """Read a shard, and check its checksum and content.

        Raises:
            UserError: it is missing or damaged.
        """
        path = self.folder / shard_name(index)
        if problem := self.shard_problem(index):
            raise UserError(f"{path} is {problem}. Run the same synthesis again: it makes that shard anew.")
        tensors, _ = load_tensors(path)
        if problem := self._wrong_content(tensors, self.shard_sizes[index]):
            raise UserError(f"{path} does not hold the {self.shard_sizes[index]} impressions planned: {problem}.")
        return Impressions(**tensors)

    def _wrong_content(self, tensors: dict[str, Tensor], count: int) -> str:
        """What is wrong with a shard whose checksum is right, because the manifest may be forged too."""
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
        """All images ``(N, C, H, W)``, float16, in order, in memory."""
        return self.lazy_images()[:]

    def lazy_images(self) -> LazyImages:
        """All images, read from disk when they are indexed. Every shard is checked first, one at a time.

        Raises:
            UserError: a shard is missing or damaged.
        """
        files, shape = [], torch.Size()
        for index, count in enumerate(self.shard_sizes):
            shape = self.read(index).images.shape[1:]
            files.append(ImageFile.of(self.folder / shard_name(index), count))
        return LazyImages(files, shape)

    def source(self, batch_size: int, seed: int, device: torch.device | str) -> StoredSource:
        """Batches of these impressions for a student; arguments as in :class:`~zskd_nni.data.sources.StoredSource`."""
        return StoredSource(self.lazy_images(), batch_size, seed, self.fingerprint, device)

    def steps_histogram(self) -> dict[int, int]:
        """How many impressions took how many steps."""
        total: dict[int, int] = {}
        for entry in self.manifest["shards"].values():
            for step, count in entry["steps"].items():
                total[int(step)] = total.get(int(step), 0) + count
        return dict(sorted(total.items()))

    def summary(self) -> dict[str, Any]:
        """Counts, mean fit, seconds and rate, for reports."""
        shards = self.manifest["shards"]
        made = sum(self.shard_sizes[int(index)] for index in shards)
        seconds = sum(entry["seconds"] for entry in shards.values())
        fit = sum(entry["fit"] * self.shard_sizes[int(index)] for index, entry in shards.items()) / max(1, made)
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
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        return describe_validation(error, _Manifest)
    if manifest["fingerprint"] != fingerprint_of(manifest["identity"]):
        return "its fingerprint is not that of its identity: it was edited"
    unplanned = [index for index in manifest["shards"] if int(index) >= len(manifest["plan"])]
    return f"there is no shard {unplanned[0]!r} in its plan" if unplanned else None


def _notes(folder: Path) -> dict[str, Any]:
    """The valid notes; a shard whose note is damaged is made again."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        name = _NOTE_NAME.fullmatch(path.name)
        if name is None or path.is_symlink() or not path.is_file():
            continue
        try:
            entry = read_json(path)
            _ShardEntry.model_validate(entry)
        except (UserError, ValidationError):
            continue
        found[str(int(name[1]))] = entry
    return found
