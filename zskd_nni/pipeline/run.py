"""One recipe in one output folder, from its teacher to its report."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zskd_nni.data.candidates import PROCEDURAL
from zskd_nni.data.datasets import DATA_VARIABLE, NAMED_SETS, LabelledImages, data_root
from zskd_nni.data.sources import ProceduralSource, TransferSource
from zskd_nni.models.build import code_fingerprint, network_fingerprint
from zskd_nni.pipeline.export import export_student
from zskd_nni.pipeline.first_look import FirstLook, look_at, near_chance
from zskd_nni.pipeline.forecast import Forecast
from zskd_nni.pipeline.preflight import check_work
from zskd_nni.pipeline.rehearsal import forecast_run
from zskd_nni.pipeline.report import CONTROL_IMAGES, build_report, measure
from zskd_nni.pipeline.report_html import write_report
from zskd_nni.pipeline.resumed import taken_up
from zskd_nni.pipeline.steps import EVALUATION, EXPORT, HELD_OUT, TRANSFER, headings, students_of
from zskd_nni.pipeline.students import StudentResult, Students
from zskd_nni.pipeline.twin import Twin, read_twin
from zskd_nni.recipes.load import LoadedRecipe
from zskd_nni.recipes.schema import completed
from zskd_nni.runtime import signals
from zskd_nni.runtime.distributed import only_writers, team
from zskd_nni.runtime.errors import UserError, error_context
from zskd_nni.runtime.files import fingerprint_of, make_folder, read_json, write_json
from zskd_nni.runtime.memory import peak_memory
from zskd_nni.runtime.progress import say, stage
from zskd_nni.runtime.rng import derive_seed
from zskd_nni.runtime.run_identity import RUN_FORMAT, resume_or_refuse
from zskd_nni.synthesis import ImpressionStore
from zskd_nni.synthesis.image_grid import impressions_picture, some_of_each, spread

RUN = "run.json"


class Run:
    """One recipe in one output folder.

    Processes that share a process group of ``torch.distributed`` share the work: all of them do the same calls. They
    make the impressions and train together. Only the first of them writes, exports and measures.

    Args:
        loaded: the recipe.
        out: created if it is not there; the folder of another run is refused.
        device: cpu or cuda.
        root: where real test data is.
        download: let torchvision fetch it.
        impressions: a finished store of this teacher's impressions to train on, instead of making them.
        quiet: no progress.
        twin: folder of a finished run of the same recipe on real images, to stand beside this one in the report.

    Attributes:
        looks: whether the teacher is measured and time and memory forecast first; the trials of a search do without.
        forecast: of time and memory, where :meth:`compress` or :meth:`foresee` has made one.

    Raises:
        UserError: the recipe cannot be run as it is.
    """

    looks = True

    def __init__(
        self,
        loaded: LoadedRecipe,
        out: str | Path,
        *,
        device: str = "cpu",
        root: Path | None = None,
        download: bool = False,
        impressions: Path | None = None,
        quiet: bool = False,
        twin: Path | None = None,
    ) -> None:
        self.loaded, self.recipe = loaded, loaded.recipe
        self.team = team()
        self.device, self.root, self.download = device, root, download
        self.quiet = quiet or not self.team.leads
        self.out = Path(out)
        self.teacher = loaded.teacher()
        self.look: FirstLook | None = None
        self.forecast: Forecast | None = None
        self.real_images: int | None = None
        self.students = Students(loaded, self.teacher, self.out / "state", self._timed, device=device, quiet=self.quiet)
        with stage("checking the recipe and its teacher", self.quiet, told=False):
            self._check()
            self.given = None if impressions is None else self._given_store(impressions)
            self.identity = self._identity()
            self.twin: Twin | None = None if twin is None else read_twin(twin, self.identity)
        self.seconds: dict[str, float] = {}

    @cached_property
    def headings(self) -> dict[str, str]:
        """What is shown above each step; *step 2 of 6: ...*."""
        return headings(self.recipe, self.given is not None)

    def _identity(self) -> dict[str, Any]:
        """What the run's results depend on."""
        identity = {
            "recipe": self.recipe.described(),
            "teacher": self.teacher.fingerprint,
        }
        if self.recipe.student is not None:  # its weights, or what its factory makes of the seed
            identity["student"] = network_fingerprint(self.students.fresh())
        models = {section.model for section in (self.recipe.teacher, self.students.network)}
        code = {model: code_fingerprint(model, self.loaded.base) for model in sorted(models)}
        if code := {model: digest for model, digest in code.items() if digest is not None}:
            identity["code"] = code
        if self.given is not None:
            identity["impressions"] = self.given.fingerprint
        return identity

    def _given_store(self, folder: Path) -> ImpressionStore:
        store = ImpressionStore.open(folder)
        if store.manifest["identity"].get("teacher") != self.teacher.fingerprint:
            raise UserError(f"{folder} holds impressions of another teacher than the recipe's.")
        if not self.recipe.transfer.method_is_data_free:
            raise UserError(
                f"--impressions: the recipe's transfer.method {self.recipe.transfer.method} reads real images, and "
                f"{folder} holds impressions; leave out one of the two."
            )
        if store.manifest["identity"].get("seed") == self._held_out_seed():
            raise UserError(
                f"{folder} was made with the seed of this run's held-out impressions, on which it is measured; name "
                "another store, or another --seed."
            )
        missing = store.missing()
        if missing:
            raise UserError(f"{folder} is not finished: shard {missing[0]} is {store.shard_problem(missing[0])}.")
        return store

    def _check(self) -> None:
        """Refuse, before the long work begins, what can be known to be wrong."""
        name = self.loaded.data_name()
        self.measured = name is not None
        if name in NAMED_SETS[1:] and data_root(self.root) is None:
            # A user without data has no test data either; the recipe names where ours were measured.
            self.measured = False
            self._print(
                f"No folder of test data was named (--data-root, {DATA_VARIABLE}): accuracy on {name} is left out, "
                "agreement is measured on procedural images."
            )
        test = self._test_data() if self.team.leads else None
        check_work(self.students)
        if self.team.leads:
            self.look = self._look_at_teacher(test) if self.looks else None
        if (own := self.loaded.own_images()) is not None:
            with error_context("transfer.also"):
                own.pixels(slice(0, 1), self.teacher.spec)  # refuses channels that do not fit

    def _look_at_teacher(self, test: LabelledImages | None) -> FirstLook:
        """Measure the teacher before anything else, and say what is seen."""
        look = look_at(self.teacher, test)
        lines, section = look.lines, self.recipe.evaluation
        if self.quiet:  # warnings alone, and none about a teacher that the recipe takes as it is
            accepted = section is not None and section.any_teacher
            lines = [] if accepted else lines[len(lines) - look.warnings :]
        for line in lines:
            self._print(line)
        return look

    def require_a_teacher(self) -> None:
        """Stop where the teacher is hardly better than chance on the test data.

        Raises:
            UserError: it is, and ``evaluation.any_teacher`` does not say to go on.
        """
        refusal = self.team.first(self._refusal_of_teacher)  # all processes stop, not only the one that measured
        if refusal is not None:
            raise UserError(refusal)

    def _refusal_of_teacher(self) -> str | None:
        section = self.recipe.evaluation
        if self.look is None or section is None or section.any_teacher:
            return None
        return near_chance(self.look, self.teacher.num_classes)

    def require_own_folder(self) -> None:
        """Refuse an output folder that is another run's; writes nothing.

        Raises:
            UserError: it is.
        """
        if self.out.is_dir():
            self._known()

    def _known(self) -> dict[str, Any]:
        """What an earlier call wrote; empty in a new folder."""
        return resume_or_refuse(self.out, RUN, "run", self.identity, _with_newer_keys)

    def _print(self, sentence: str) -> None:
        if self.team.leads:
            say(sentence)

    def _test_data(self) -> LabelledImages | None:
        return self.loaded.evaluation_data(self.teacher, self.root, self.download) if self.measured else None

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Be the only writer of the output folder, and resume what is in it.

        Raises:
            UserError: it belongs to another run, or another process writes into it.
        """
        make_folder(self.out)
        with only_writers(self.out):
            self.team.first(self._resume)
            yield

    def _resume(self) -> None:
        known = self._known()
        if known:
            self.identity = known["identity"]  # as it was begun: a finished report is known by it
        self.forecast = Forecast.read(known.get("forecast"))
        seconds = known.get("seconds")
        entries = seconds.items() if isinstance(seconds, dict) else ()
        self.seconds = {stage: n for stage, n in entries if type(n) in (int, float) and math.isfinite(n)}
        if known and not self.quiet:
            for line in taken_up(self.out, self.seconds):
                self._print(line)
        self._write_run()

    def _write_run(self) -> None:
        if self.team.leads:
            content = {"format": RUN_FORMAT, "identity": self.identity, "seconds": self.seconds}
            if self.forecast is not None:
                content["forecast"] = self.forecast.described()
            write_json(self.out / RUN, content)

    @contextmanager
    def _timed(self, work: str, resumed: bool = True, step: str | None = None) -> Iterator[None]:
        """Count the seconds of some work, and add those of earlier calls if it is resumed instead of repeated.

        Args:
            work: as it is called in the report.
            resumed: whether it is.
            step: of the run, where it is not called as the work is.
        """
        signals.check()
        before = self.seconds.get(work, 0.0) if resumed else 0.0
        started = time.monotonic()
        try:
            with stage(self.headings.get(step or work, work), self.quiet):
                yield
        finally:
            self.seconds[work] = round(before + time.monotonic() - started, 2)
            if self.out.is_dir():
                self._write_run()

    def compress(self) -> dict[str, Any]:
        """Run the missing stages; returns the content of ``report.json``.

        Raises:
            UserError: a mistake of the user's, in one sentence.
        """
        with self.owned():
            if (finished := self._finished_report()) is not None:
                return finished
            self._tell_forecast()
            held_out = self.held_out()  # first: a wrong size is refused before the long work
            source = self.transfer()
            students = {}
            for name, files in students_of(self.recipe).items():
                images = self._procedural(name) if name in CONTROL_IMAGES else source
                students[name] = self.students.make(files, images, train=name != "none")
            return self.team.first(lambda: self._finish(students, held_out))

    def foresee(self) -> Forecast:
        """Forecast time and memory of the whole run, from a few real steps of each stage; writes nothing."""
        with stage("forecasting time and memory", self.quiet, told=False):
            self.forecast = forecast_run(self.students, self._test_data(), self.given is not None)
        return self.forecast

    def _tell_forecast(self) -> None:
        """Say how long the run takes, or what is left of it.

        A quiet run has nobody to tell; processes that share the work each do another part of it.
        """
        if self.quiet or not self.looks or not self.team.alone:
            return
        if self.forecast is None:
            self.foresee()
            self._write_run()
        assert self.forecast is not None
        self._print(self.forecast.line(self.seconds))

    def _procedural(self, control: str) -> TransferSource:
        return ProceduralSource(CONTROL_IMAGES[control][0], self.teacher.spec, self.recipe.distillation.batch)

    def _finished_report(self) -> dict[str, Any] | None:
        """The report of this very run, if it has accuracies on test data that is no longer there."""
        path = self.out / "report.json"
        report = read_json(path) if not self.measured and path.exists() else None
        if not isinstance(report, dict) or report.get("fingerprint") != fingerprint_of(self.identity):
            return None
        files = ("student.json", "student.safetensors", "student.onnx")
        if (report.get("accuracy") or {}).get("teacher") is None or not all((self.out / f).exists() for f in files):
            return None
        without = "" if self.twin is None else "; to add the twin, name the folder of test data again"
        self._print(f"{path} has the accuracies already, and is left as it is{without}.")
        return report

    def _finish(self, students: dict[str, StudentResult], held_out: Tensor) -> dict[str, Any]:
        """Export, measure, and write the report."""
        self.teacher.to("cpu")
        with self._timed(EXPORT, resumed=False):
            self.save_student(students["student"])
            section = self.recipe.compression.quantization
            fold_asked = section is not None and section.fuse_batch_norm
            exported = export_student(students["student"], self.teacher, self.out, held_out, fold_asked)
        with self._timed(EVALUATION, resumed=False):
            test, store = self._test_data(), self._store()
            figures = measure(students, self.teacher, self.out, held_out, test, self.quiet)
            if store is not None:
                self._draw(store)
            report = build_report(self, students, figures, exported, test, store)
        report["seconds"] = {**self.seconds, "total": round(sum(self.seconds.values()), 2)}
        report["forecast"] = None if self.forecast is None else self.forecast.described()
        report["peak_memory"] = peak_memory(self.device)
        write_report(self.out, report)
        return report

    def save_student(self, student: StudentResult) -> None:
        """Write ``student.json`` and ``student.safetensors``."""
        self.students.save(StudentResult(student.network), self.out / "student.json", recipe=self.recipe.name)

    def _store(self) -> ImpressionStore | None:
        """The store of the impressions that were trained on, if the method makes one."""
        folder = self.out / "impressions"
        return self.given or (ImpressionStore.open(folder) if (folder / "manifest.json").exists() else None)

    def transfer(self) -> TransferSource:
        """The transfer source of the recipe's method, made or resumed in ``impressions/``."""
        if self.given is None:
            source = self._source("impressions", TRANSFER, reserved=self.recipe.transfer.held_out)
            self._tell_divergence()
        else:
            given = self.given.source(self.recipe.distillation.batch, self.recipe.seed, self.device)
            source = self.loaded.with_further_images(given, self.teacher)
        self.team.first(lambda: self._require_same_images(source))
        self._count_real_images(source)
        return source

    def _tell_divergence(self) -> None:
        """Say how near the impressions came to their targets."""
        store = self._store()
        if store is not None and not self.quiet:
            summary = store.summary()
            fit, steps = summary["mean_fit"], summary["mean_steps"]
            self._print(f"impressions: mean divergence {fit:.4f} from their targets after {steps:.1f} steps")

    def _count_real_images(self, source: TransferSource) -> None:
        """Note and say how many real images the student is trained on, where they are counted."""
        section = self.recipe.transfer
        own = self.loaded.own_images()
        if section.method_is_data_free:
            self.real_images = None if own is None else len(own)
        elif set(getattr(section.options(), "sources", ())) & set(PROCEDURAL):
            self._print(f"{section.method}: the student is trained on {source.size:,} images, procedural and real ones")
        elif source.size is not None:
            self.real_images = source.size + (0 if own is None else len(own))
            few = f", fewer than transfer.size ({section.size:,})" if source.size < section.size else ""
            self._print(f"{section.method}: the student is trained on {source.size:,} images{few}")
        if own is not None:
            self._print(f"transfer.also: {section.also_share:.0%} of each batch is drawn from {len(own):,} own images")

    def _source(self, folder: str, step: str, **changes: Any) -> TransferSource:
        with self._timed("synthesis", step=step):
            where = {"root": self.root, "download": self.download}
            teacher = self.teacher.to(self.device)
            return self.loaded.transfer_source(teacher, self.out / folder, quiet=self.quiet, **where, **changes)

    def _require_same_images(self, source: TransferSource) -> None:
        """Refuse to resume with other images; a finished stage does not show on which it was trained."""
        path = make_folder(self.out / "state") / "transfer.json"
        known = read_json(path) if path.exists() else None
        if isinstance(known, dict) and known.get("fingerprint") != source.fingerprint:
            raise UserError(
                f"transfer: the images have changed since {self.out} was begun, and its finished stages were trained "
                "on the earlier ones. Use another output folder, or put the images back."
            )
        if known is None:
            write_json(path, {"fingerprint": source.fingerprint})

    def _held_out_seed(self) -> int:
        return derive_seed(self.recipe.seed, "held-out") % 2**31

    def held_out(self) -> Tensor:
        """Images ``(N, C, H, W)`` of another seed, on which agreement is measured and the export checked."""
        size, seed = self.recipe.transfer.held_out, self._held_out_seed()
        changes = {"size": size, "batch_size": size, "seed": seed, "label": "held-out impressions", "held_out": True}
        source = self._source("impressions-held-out", HELD_OUT, **changes)
        return source.batch(0, torch.Generator().manual_seed(0)).cpu()

    def _draw(self, store: ImpressionStore) -> None:
        shards = (store.read(index) for index in spread(len(store.shard_sizes)))
        images, logits = some_of_each(((shard.images, shard.logits) for shard in shards), 60)
        title = "Data impressions, with the class and confidence the teacher sees"
        impressions_picture(images[:100], logits[:100], self.teacher.spec, self.out / "impressions.png", title=title)


def _with_newer_keys(identity: dict[str, Any]) -> dict[str, Any]:
    recipe = identity.get("recipe")
    return {**identity, "recipe": completed(recipe)} if isinstance(recipe, dict) else identity
