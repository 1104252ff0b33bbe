"""Running cells: transfer sets that cells share, students that are taken up where they stopped, one record a run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zskd_nni.data.datasets import LabelledImages, load_images
from zskd_nni.data.sources import Images, NoiseSource, StoredSource, TransferSource
from zskd_nni.methods.ats.method import CannotBalanceError
from zskd_nni.methods.ats.transfer_set import TransferSet
from zskd_nni.methods.registry import TransferRequest, find_method, is_data_free
from zskd_nni.methods.zskt.source import ZsktSource
from zskd_nni.methods.zskt.train import train_zskt
from zskd_nni.models.build import build_network, load_into
from zskd_nni.models.teacher import Teacher, first_tensor, load_teacher
from zskd_nni.research.baselines.kd_at import train_kd_at
from zskd_nni.research.baselines.labelled import few_of_each
from zskd_nni.research.baselines.real_labels import train_on_labels
from zskd_nni.research.reproduction.cells import IMPRESSIONS, SOURCES, Plan
from zskd_nni.research.reproduction.pairs import PAIRS
from zskd_nni.research.reproduction.records import FORMAT, read_record
from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import fingerprint_of, make_folder, plain, read_json, sha256_of_file, write_json
from zskd_nni.runtime.locks import FolderInUseError, only_writer
from zskd_nni.runtime.provenance import provenance
from zskd_nni.runtime.rng import derive_seed
from zskd_nni.runtime.tensors import load_tensors, save_tensors
from zskd_nni.synthesis import ImpressionStore
from zskd_nni.synthesis.lazy_images import StoredImages, joined
from zskd_nni.training.checkpoint import History
from zskd_nni.training.distillation import distill
from zskd_nni.training.inference import logits_on
from zskd_nni.training.metrics import accuracy, agreement, expected_calibration_error, mean_transition_error


@dataclass(frozen=True)
class Place:
    """Where things are, and where they are made.

    Attributes:
        runs: folder of transfer sets and students.
        results: folder of records.
        root: of real data.
        download: let torchvision fetch it.
        device: cpu or cuda.
        quiet: no progress.
    """

    runs: Path
    results: Path
    root: Path | None = None
    download: bool = False
    device: str = "cpu"
    quiet: bool = False


class Bench:
    """What the runs of a pair have in common: the teacher, its data, its answers. Each is read when first needed.

    Args:
        pair: its name.
        place: folders and device.
    """

    def __init__(self, pair: str, place: Place) -> None:
        self.pair, self.place = PAIRS[pair], place

    @cached_property
    def teacher(self) -> Teacher:
        """The trained teacher, on the device.

        Raises:
            UserError: its weights are not there; says how to make them.
        """
        recipe = self.pair.recipe
        weights = f"zoo:{self.pair.teacher}"
        return load_teacher(recipe.network, recipe.spec, weights, recipe.arguments).to(self.place.device)

    @cached_property
    def test(self) -> LabelledImages:
        """The test split."""
        classes = self.teacher.num_classes  # a missing teacher is the longer work, so it is named first
        data = load_images(self.pair.recipe.data, "test", self.place.root, self.place.download)
        data.require_labels(classes)
        return data

    @cached_property
    def answers(self) -> Tensor:
        """The teacher's logits on the test split."""
        return logits_on(self.teacher, self.test, self.teacher.spec, self.place.device)

    def training(self, most: int | None) -> LabelledImages:
        """The training split, or its first ``most`` images: for baselines that read real data."""
        data = load_images(self.pair.recipe.data, "train", self.place.root, self.place.download)
        return data if most is None else data.subset(slice(0, most))


def teachers_here(pairs: Iterable[str]) -> dict[str, str]:
    """Fingerprints of the teachers of those pairs whose weights are there."""
    found = {}
    for pair in pairs:
        with contextlib.suppress(UserError):
            found[pair] = Bench(pair, Place(Path(), Path())).teacher.fingerprint
    return found


# Transfer sets. Cells that need the same images share them: their folder is named after what they are.


@contextlib.contextmanager
def _waiting_for(folder: Path, what: str, quiet: bool) -> Iterator[None]:
    """Within the block the folder is ours; another run that is at work there is waited for."""
    make_folder(folder)
    told = False
    with contextlib.ExitStack() as stack:
        while True:
            signals.check()
            try:
                stack.enter_context(only_writer(folder))
                break
            except FolderInUseError:
                if not (told or quiet):
                    print(f"waiting for another run that makes {what} in {folder}")
                    told = True
                time.sleep(1)
        yield


@dataclass(frozen=True)
class Made:
    """A transfer set and what it cost.

    Attributes:
        source: of the student's images; None where it has none.
        seconds: that making this many took, in whichever run.
        facts: about the set, for the record.
    """

    source: TransferSource | None
    seconds: float
    facts: dict[str, Any]


def make_source(plan: Plan, bench: Bench, seed: int) -> Made:
    """Make a cell's transfer set, take it up again, or find it made by another cell.

    Impressions are made in blocks, the first by the run's seed as a recipe would, the others by seeds of their own, so
    that n of N images are the first n of them.

    Raises:
        CannotBalanceError: ATS's teacher puts everything into one class.
        UserError: anything else that the user can mend.
    """
    cell, teacher, batch = plan.cell, bench.teacher, plan.student.batch
    if cell.method == "noise":
        return Made(NoiseSource(teacher.spec, batch), 0.0, {})
    assert plan.size is not None
    if cell.method == "real-kd":
        return _real_images(plan, bench, seed)
    in_blocks = cell.method in IMPRESSIONS and getattr(plan.options.targets, "order", "interleaved") != "rows"
    block = plan.scale.block if in_blocks else plan.size
    key = fingerprint_of(
        [
            teacher.fingerprint,
            cell.method,
            plain(asdict(plan.options)),
            seed,
            block,
            bench.place.device.split(":")[0],
        ]
    )
    folder = bench.place.runs / "transfer" / f"{cell.pair}-{cell.method}-{key[:16]}"
    parts, prints, seconds = [], [], 0.0
    numbers = range(-(-plan.size // block))
    facts: dict[str, Any] = {}
    for number in numbers:
        home = folder / f"block-{number:03d}"
        request = TransferRequest(
            size=block,
            batch_size=batch,
            seed=seed if number == 0 else derive_seed(seed, "block", number) % 2**31,
            folder=home / "set",
            options=plan.options,
            label=f"{plan.name} seed {seed}, images {number + 1} of {len(numbers)}",
            quiet=bench.place.quiet,
            root=bench.place.root,
            download=bench.place.download,
        )
        with _waiting_for(home, "the same images", bench.place.quiet):
            source, spent = _timed_source(plan, teacher, request, home)
        assert isinstance(source, StoredSource)
        parts.append(source.images)
        prints.append(source.fingerprint)
        seconds += spent
        facts = _facts_of(home / "set", facts)
    images = _first_of(parts, plan.size)
    share = len(images) / (block * len(numbers)) if in_blocks else 1.0
    printed = fingerprint_of([prints, len(images)]) if in_blocks else prints[0]
    source = StoredSource(images, batch, seed, printed, teacher.device)
    return Made(source, round(seconds * share, 2), facts)


def _first_of(parts: list[Images], count: int) -> Images:
    """The first images of several sets, read when they are asked for where they lie on disk."""
    on_disk = [part for part in parts if isinstance(part, StoredImages)]
    if len(on_disk) == len(parts):
        return joined(on_disk).first(count)
    return torch.cat([part for part in parts if isinstance(part, Tensor)])[:count]


def _timed_source(plan: Plan, teacher: Teacher, request: TransferRequest, home: Path) -> tuple[TransferSource, float]:
    """The source, and the seconds that making it took, which are added up over interrupted runs."""
    clock = home / "seconds.json"
    known: dict[str, Any] = {"seconds": 0.0, "finished": False}
    if clock.exists():
        known = _whole(clock, {"seconds": float, "finished": bool})
    started, finished = time.monotonic(), False
    try:
        source = find_method(SOURCES[plan.cell.method]).source(teacher, request)
        finished = True
    finally:
        if not known["finished"]:
            known = {"seconds": round(known["seconds"] + time.monotonic() - started, 3), "finished": finished}
            write_json(clock, known)
    # A process that is killed leaves no clock, but its finished shards tell what they took.
    shards = home / "set"
    of_shards = ImpressionStore.open(shards).summary()["seconds"] if (shards / "manifest.json").exists() else 0.0
    return source, max(known["seconds"], of_shards)


def _whole(path: Path, kinds: dict[str, type]) -> dict[str, Any]:
    """A file of a run with these keys.

    Raises:
        UserError: it lacks one.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not all(
        key in content and isinstance(content[key], kinds[key]) for key in kinds
    ):
        raise UserError(f"{path} is not whole. Remove it, and run its cell again.")
    return content


def _facts_of(folder: Path, before: dict[str, Any]) -> dict[str, Any]:
    """Mean fit and steps over the blocks so far, or the counts of an arbitrary set by class and origin."""
    if (folder / "set.json").exists():
        return {"counts": TransferSet.open(folder).counts}
    if not (folder / "manifest.json").exists():
        return before
    summary = ImpressionStore.open(folder).summary()
    number = before.get("blocks", 0)
    return {
        "blocks": number + 1,
        **{
            name: round((before.get(name, 0.0) * number + summary[name]) / (number + 1), 6)
            for name in ("mean_fit", "mean_steps")
        },
    }


def _real_images(plan: Plan, bench: Bench, seed: int) -> Made:
    """The training images without their labels, in an order that is the same for every size."""
    data = bench.training(plan.scale.training_images)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(derive_seed(0, "real", len(data))))
    images = data.pixels(order[: plan.size], bench.teacher.spec)
    prints = fingerprint_of(["real", data.name, len(data), len(images)])
    return Made(StoredSource(images, plan.student.batch, seed, prints, bench.teacher.device), 0.0, {})


# Students.


def fresh_student(plan: Plan, seed: int) -> nn.Module:
    """The student before it has learnt anything, as a recipe of that seed begins with it."""
    reference, arguments = plan.network
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "student"))
        return build_network(reference, arguments).float()


@dataclass(frozen=True)
class Taught:
    """A student that has learnt.

    Attributes:
        network: in ``eval()`` mode.
        history: its loss, and the seconds.
        images: how many distinct images it learnt on; None for a stream, or nothing at all.
    """

    network: nn.Module
    history: History
    images: int | None


def train_student(plan: Plan, bench: Bench, seed: int, source: TransferSource | None, checkpoint: Path) -> Taught:
    """Teach a fresh student as the cell says; its last step is the result.

    Raises:
        UserError: divergence, layers that do not match, a checkpoint of another run.
    """
    cell, teacher, device = plan.cell, bench.teacher, bench.place.device
    student = fresh_student(plan, seed).to(device)
    drawn = derive_seed(seed, "distillation") % 2**31
    common: dict[str, Any] = {"checkpoint": checkpoint, "label": f"{plan.name} seed {seed}", "quiet": bench.place.quiet}
    if cell.method == "none":
        return Taught(student.eval(), History(), None)
    if plan.plays_alone:
        return Taught(student, train_zskt(student, teacher, plan.options, seed=drawn, **common), None)
    if cell.method == "real-labels":
        data = bench.training(plan.scale.training_images)
        history = train_on_labels(student, data, teacher.spec, plan.student, seed=drawn, device=device, **common)
        return Taught(student, history, len(data))
    if cell.method == "kd-at":
        assert cell.shots is not None
        data = bench.training(plan.scale.training_images)
        few = few_of_each(data, cell.shots, teacher.num_classes, seed)
        history = train_kd_at(student, teacher, few, plan.options, plan.student, seed=drawn, **common)
        return Taught(student, history, len(few))
    if cell.method == "zskt":  # with a memory the student has the recipe of all others
        source = ZsktSource(teacher, plan.options, plan.student.batch, drawn)
    assert source is not None
    return Taught(student, distill(student, teacher, source, plan.student, seed=drawn, **common), source.size)


# Records.


def run_identity(plan: Plan, bench: Bench, seed: int) -> str:
    """Fingerprint of everything that shapes a run."""
    return plan.fingerprint(bench.teacher.fingerprint, seed)


def run_cell(plan: Plan, bench: Bench, seed: int) -> dict[str, Any] | None:
    """Run a cell with a seed, or go on with it, and write its record; None where another process is at it.

    Raises:
        UserError: anything the user can mend.
    """
    place = bench.place
    identity = run_identity(plan, bench, seed)
    home = make_folder(_home(plan, bench, seed, identity))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(only_writer(home))
        except FolderInUseError:
            return None
        if _finished(place.results / plan.record_name(seed), identity, plan):  # by another process, a moment ago
            return None
        record = _record(plan, bench, seed, home)
        record["fingerprint"] = identity
        make_folder(place.results)
        write_json(place.results / plan.record_name(seed), record)
    return record


def _record(plan: Plan, bench: Bench, seed: int, home: Path) -> dict[str, Any]:
    cell, place = plan.cell, bench.place
    record: dict[str, Any] = {
        "format": FORMAT,
        "cell": cell.name,
        "pair": cell.pair,
        "method": cell.method,
        "preset": cell.preset or None,
        "variant": "-".join(part for part in (cell.network, cell.variant) if part) or None,
        "seed": seed,
        "scale": plan.scale_name,
        "data_free": _data_free(plan),
        "impressions": None,
        "accuracy": None,  # these when the student is there: nothing is scored on the test split before
        "agreement": None,
        "calibration_error": None,
        "mte": None,
        "measured_on": f"test split of {bench.test.name}, {len(bench.test)} images, the last step, once",
        "networks": {"teacher": bench.pair.teacher, "student": plain(list(plan.network))},
        "ingredients": plan.ingredients,
    }
    finished = home / "student.json"
    if finished.exists() and _damaged(home):
        finished.unlink()  # it is trained again
    if not finished.exists():
        try:
            _train(plan, bench, seed, home)
        except CannotBalanceError as error:
            scores = _teacher_scores(bench)
            record.update(
                accuracy={"teacher": scores[0], "student": None},
                calibration_error={"teacher": scores[1]},
                outcome=str(error),
                transfer={"counts": {"candidates": error.counts}},
            )
            return {**record, **_ending(plan, bench, seed, {"synthesis": 0.0, "student": 0.0, "evaluation": 0.0})}
    known = _whole(finished, {"impressions": object, "transfer": object, "history": object, "seconds": dict})
    student = fresh_student(plan, seed)
    load_into(student, load_tensors(home / "student.safetensors")[0], str(home))
    started = time.monotonic()
    student = student.eval().to(place.device).to(memory_format=torch.channels_last)  # on the CPU twice as fast
    record.update(_measured(plan, bench, student))
    record["impressions"] = known["impressions"]
    record["transfer"] = known["transfer"]
    record["history"] = known["history"]
    seconds = {**known["seconds"], "evaluation": round(time.monotonic() - started, 2)}
    return {**record, **_ending(plan, bench, seed, seconds)}


def _damaged(home: Path) -> bool:
    """Whether a finished student is not what was written; those of an earlier version carry no checksum."""
    weights, known = home / "student.safetensors", read_json(home / "student.json")
    wanted = known.get("sha256") if isinstance(known, dict) else None
    return wanted is not None and (not weights.is_file() or sha256_of_file(weights) != wanted)


def _data_free(plan: Plan) -> bool:
    if plan.cell.method in ("real-kd", "real-labels", "kd-at"):
        return False
    return plan.cell.method not in SOURCES or is_data_free(find_method(SOURCES[plan.cell.method]), plan.options)


def _ending(plan: Plan, bench: Bench, seed: int, seconds: dict[str, float]) -> dict[str, Any]:
    where = provenance(bench.place.device, seed)
    return {
        "seconds": {**seconds, "total": round(sum(seconds.values()), 2)},
        "device": where["device"],
        "selected_on": plan.selected_on,
        "provenance": {**where, "teacher": bench.teacher.fingerprint},
    }


def _train(plan: Plan, bench: Bench, seed: int, home: Path) -> None:
    """Everything up to a finished student in ``home``."""
    made = Made(None, 0.0, {})
    if plan.cell.method in SOURCES or plan.cell.method == "noise":
        made = make_source(plan, bench, seed)
    checkpoint = home / "checkpoint.safetensors"
    taught = train_student(plan, bench, seed, made.source, checkpoint)
    history = taught.history
    save_tensors(home / "student.safetensors", taught.network.state_dict())
    write_json(
        home / "student.json",
        {
            "sha256": sha256_of_file(home / "student.safetensors"),
            "impressions": taught.images,
            "transfer": made.facts or None,
            "seconds": {"synthesis": made.seconds, "student": round(history.seconds, 2)},
            "history": {"steps": history.steps[::10], "losses": [round(loss, 6) for loss in history.losses[::10]]},
        },
    )
    checkpoint.unlink(missing_ok=True)


def _teacher_scores(bench: Bench) -> tuple[float, float]:
    """The teacher's accuracy in percent and its expected calibration error."""
    labels = bench.test.labels
    return round(accuracy(bench.answers, labels), 3), round(expected_calibration_error(bench.answers, labels), 6)


def _measured(plan: Plan, bench: Bench, student: nn.Module) -> dict[str, Any]:
    """The one look at the test split."""
    teacher, test = bench.teacher, bench.test
    spec, device = teacher.spec, bench.place.device
    logits = logits_on(lambda images: first_tensor(student(spec.normalise(images))), test, spec, device)
    teacher_accuracy, teacher_error = _teacher_scores(bench)
    result: dict[str, Any] = {
        "accuracy": {
            "teacher": teacher_accuracy,
            "student": round(accuracy(logits, test.labels), 3),
        },
        "agreement": round(agreement(logits, bench.answers), 6),
        "calibration_error": {
            "teacher": teacher_error,
            "student": round(expected_calibration_error(logits, test.labels), 6),
        },
    }
    if plan.cell.transition:
        result["mte_asked"] = {"images": plan.scale.mte_images, "steps": plan.scale.mte_steps}
    if plan.cell.transition and agreement(logits, bench.answers) > 0:
        agreed = (logits.argmax(1) == bench.answers.argmax(1)).nonzero().flatten()[: plan.scale.mte_images]
        images = spec.normalise(test.pixels(agreed, spec).to(device))
        error = mean_transition_error(student, teacher, images, steps=plan.scale.mte_steps, batch=250)
        result["mte"] = round(error.error, 6)
        result["mte_measured_on"] = {"images": error.images, "steps": error.steps, "step_size": error.step_size}
        curves = {"student": error.followed, "teacher": error.other}
        result["transition_curves"] = {name: [round(p, 5) for p in curve.tolist()] for name, curve in curves.items()}
    return result


def _finished(path: Path, identity: str, plan: Plan) -> bool:
    """Whether the record at ``path`` is this run's, and measured as it is to be."""
    try:
        record = read_json(path) if path.exists() else None
    except UserError as error:
        raise UserError(f"{error} Remove the file, and run its cell again.") from error
    if not isinstance(record, dict) or record.get("fingerprint") != identity:
        return False
    record = read_record(path)
    if not plan.cell.transition or record["accuracy"]["student"] is None:
        return True
    asked = record.get("mte_asked") or record.get("mte_measured_on") or {}
    return (asked.get("images"), asked.get("steps")) == (plan.scale.mte_images, plan.scale.mte_steps)


def _home(plan: Plan, bench: Bench, seed: int, identity: str) -> Path:
    """Where a run keeps its student; what was begun on another kind of device is not gone on with."""
    kind = bench.place.device.split(":")[0]
    name = f"{plan.name}-seed{seed}-{identity[:12]}" + ("" if kind == "cpu" else f"-{kind}")
    return bench.place.runs / "students" / name


def status(plan: Plan, bench: Bench, seed: int) -> str:
    """``finished``, ``other settings`` (a record of them is there), ``begun`` or ``not run``."""
    path = bench.place.results / plan.record_name(seed)
    try:
        identity = run_identity(plan, bench, seed)
    except UserError:
        return "no teacher"
    if _finished(path, identity, plan):
        return "finished"
    home = _home(plan, bench, seed, identity)
    if any((home / name).exists() for name in ("checkpoint.safetensors", "student.json")):
        return "begun"
    return "other settings" if path.exists() else "not run"


def estimate(plan: Plan) -> float:
    """Seconds that a run takes on one CPU core, very roughly: synthesis, student, transition error."""
    synthesis, student, rounds = plan.pair.speed
    classes = plan.pair.recipe.arguments.get("num_classes", 10)
    if plan.cell.method == "none":
        return 5.0
    transition = (
        plan.scale.mte_images * plan.scale.mte_steps * (classes - 1) / synthesis if plan.cell.transition else 0.0
    )
    if plan.cell.method == "zskt":
        game, width = plan.options, plan.options.width / 32
        if plan.plays_alone:
            return game.rounds / rounds * max(0.6, width**2) * game.batch / 128 + transition
        turns = plan.student.steps / game.student_steps + game.filling
        made = turns * game.generator_steps / rounds * max(0.6, width**2) * (game.new_images or game.batch) / 128 / 4
        return made + plan.student.steps * plan.student.batch / 128 / student + transition
    made = 0.0
    if plan.cell.method in IMPRESSIONS and plan.size is not None:
        low, high = plan.options.synthesis.step_limits
        made = plan.size * (low * high) ** 0.5 / synthesis
    return made + plan.student.steps * plan.student.batch / 128 / student + transition


def as_minutes(seconds: float) -> str:
    """``40 s``, ``3 min``, ``2.5 h``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"


def describe(plan: Plan) -> str:
    """Size and schedule in a few words."""
    if plan.cell.method == "none":
        return "untaught"
    if plan.plays_alone:
        return f"{plan.options.rounds:,} rounds"
    images = "" if plan.size is None else f"{plan.size:,} images, "
    shots = "" if plan.cell.shots is None else f"{plan.cell.shots} a class, "
    return f"{images}{shots}{plan.student.steps:,} steps"
