"""One recipe in one output folder, from its teacher to its report."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zskd_nni.data.datasets import DATA_VARIABLE, NAMED_SETS, LabelledImages, data_root, load_images
from zskd_nni.data.sources import NoiseSource, StoredSource, TransferSource
from zskd_nni.methods.registry import TransferRequest, find_method, is_data_free
from zskd_nni.models.build import code_fingerprint, network_fingerprint
from zskd_nni.pipeline.export import export_student
from zskd_nni.pipeline.preflight import check_work
from zskd_nni.pipeline.report import answering, measure, report_content
from zskd_nni.pipeline.report_html import write_report
from zskd_nni.pipeline.students import StudentResult, Students
from zskd_nni.recipes.load import LoadedRecipe
from zskd_nni.runtime import signals
from zskd_nni.runtime.distributed import only_writers, team
from zskd_nni.runtime.errors import UserError, error_context
from zskd_nni.runtime.files import fingerprint_of, make_folder, plain, read_json, write_json
from zskd_nni.runtime.rng import derive_seed
from zskd_nni.runtime.run_identity import RUN_FORMAT, resume_or_refuse
from zskd_nni.synthesis import ImpressionStore
from zskd_nni.synthesis.image_grid import impressions_picture, some_of_each, spread

RUN = "run.json"


class Run:
    """One recipe in one output folder.

    Processes that share a process group of ``torch.distributed`` share the work: all of them do the same calls. They
    make the impressions and train together; the first of them alone writes, exports and measures.

    Args:
        loaded: the recipe.
        out: made if need be; the folder of another run is refused.
        device: cpu or cuda.
        root: where real test data is.
        download: let torchvision fetch it.
        impressions: a finished store of this teacher's impressions to learn on, instead of making them.
        quiet: no progress.

    Raises:
        UserError: the folder is another run's, or the teacher cannot be had.
    """

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
    ) -> None:
        self.loaded, self.recipe = loaded, loaded.recipe
        self.team = team()
        self.device, self.root, self.download = device, root, download
        self.quiet = quiet or not self.team.leads
        self.out = Path(out)
        self.teacher = loaded.teacher()
        self.students = Students(loaded, self.teacher, self.out / "state", self._timed, device=device, quiet=self.quiet)
        self._check_early()
        self.given = None if impressions is None else self._given_store(impressions)
        self.identity = {
            "recipe": plain(self.recipe.model_dump(mode="json", exclude={"scales", "search"})),
            "teacher": self.teacher.fingerprint,
        }
        if self.recipe.student is not None:  # its weights, or what its factory makes of the seed
            self.identity["student"] = network_fingerprint(self.students.fresh())
        code = {
            reference: digest
            for reference in sorted({section.model for section in (self.recipe.teacher, self.students.network)})
            if (digest := code_fingerprint(reference, self.loaded.base)) is not None
        }
        if code:
            self.identity["code"] = code
        if self.given is not None:
            self.identity["impressions"] = self.given.fingerprint
        self.seconds: dict[str, float] = {}

    def _given_store(self, folder: Path) -> ImpressionStore:
        store = ImpressionStore.open(folder)
        if store.manifest["identity"].get("teacher") != self.teacher.fingerprint:
            raise UserError(f"{folder} holds impressions of another teacher than the recipe's.")
        section = self.recipe.transfer
        if not is_data_free(find_method(section.method), section.options()):
            raise UserError(
                f"--impressions: the recipe's transfer.method {section.method} reads real images, and {folder} holds "
                "impressions; leave out one of the two."
            )
        if store.manifest["identity"].get("seed") == self._held_out_seed():
            raise UserError(
                f"{folder} was made with the seed of this run's held-out impressions, on which it is measured; name "
                "another store, or another --seed."
            )
        missing = store.missing()
        if missing:
            raise UserError(f"{folder} is not finished: shard {missing[0]} is {store.damage(missing[0])}.")
        return store

    def _check_early(self) -> None:
        """Everything that can be known to be wrong before the long work begins."""
        check_work(self.students)
        self.measured = self.loaded.data_name() is not None
        if self.loaded.data_name() in NAMED_SETS[1:] and data_root(self.root) is None:
            # A user without data has no test data either; the recipe names where ours were measured.
            self.measured = False
            self._tell(
                f"No folder of test data was named (--data-root, {DATA_VARIABLE}): accuracy on "
                f"{self.loaded.data_name()} is left out, agreement is measured on held-out impressions."
            )
        if self.measured and self.team.leads:
            self._test_data()

    def _tell(self, sentence: str) -> None:
        if self.team.leads:
            print(sentence, file=sys.stderr)

    def _test_data(self) -> LabelledImages:
        assert self.recipe.evaluation is not None
        name = self.loaded.data_name()
        assert name is not None
        with error_context("evaluation.data"):
            data = load_images(name, self.recipe.evaluation.split, self.root, self.download)
            data.require_labels(self.teacher.num_classes)
            data.pixels(slice(0, 1), self.teacher.spec)  # channels that do not fit are refused now, not at the end
        return data

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Be the one writer of the output folder, taken over from where it was left.

        Raises:
            UserError: it is another run's, or another process is at it.
        """
        make_folder(self.out)
        with only_writers(self.out):
            self.team.first(self._take_over)
            yield

    def _take_over(self) -> None:
        known = resume_or_refuse(self.out, RUN, "run", self.identity)
        if known:
            self.seconds = _figures(known.get("seconds"))
        self._write_run()

    def _write_run(self) -> None:
        if self.team.leads:
            write_json(self.out / RUN, {"format": RUN_FORMAT, "identity": self.identity, "seconds": self.seconds})

    @contextmanager
    def _timed(self, stage: str, again: bool = True) -> Iterator[None]:
        """Count a stage's seconds; those of a stage that every run repeats (``again`` false) are not added up."""
        signals.check()
        before = self.seconds.get(stage, 0.0) if again else 0.0
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = round(before + time.monotonic() - started, 2)
            if self.out.is_dir():
                self._write_run()

    # The stages.

    def compress(self) -> dict[str, Any]:
        """Run what is missing of all stages; returns the content of ``report.json``.

        Raises:
            UserError: anything the user can mend.
        """
        with self.owned():
            finished = self._measured_before()
            if finished is not None:
                return finished
            held_out = self.held_out()  # first: what is wrong with its size is said before the long work
            source = self.transfer()
            made = {"student": self.students.make("student", source)}
            if "none" in self.recipe.controls:
                made["none"] = self.students.make("control-none", source, train=False)
            if "noise" in self.recipe.controls:
                noise = NoiseSource(self.teacher.spec, self.recipe.distillation.batch)
                made["noise"] = self.students.make("control-noise", noise)
            return self.team.first(lambda: self._finish(made, held_out))

    def _measured_before(self) -> dict[str, Any] | None:
        """The report of this very run, if it tells accuracies on test data that are not here now."""
        path = self.out / "report.json"
        report = read_json(path) if not self.measured and path.exists() else None
        if not isinstance(report, dict) or report.get("fingerprint") != fingerprint_of(self.identity):
            return None
        files = ("student.json", "student.safetensors", "student.onnx")
        if (report.get("accuracy") or {}).get("teacher") is None or not all((self.out / f).exists() for f in files):
            return None
        self._tell(f"{path} has the accuracies already, and is left as it is.")
        return report

    def _finish(self, made: dict[str, StudentResult], held_out: Tensor) -> dict[str, Any]:
        self.teacher.to("cpu")
        with self._timed("export", again=False):
            self.save_student(made["student"])
            section = self.recipe.compression.quantization
            fold_asked = section is not None and section.fuse_batch_norm
            exported = export_student(made["student"], self.teacher, self.out, held_out, fold_asked)
        with self._timed("evaluation", again=False):
            report = self._report(made, held_out, exported)
        report["seconds"] = {**self.seconds, "total": round(sum(self.seconds.values()), 2)}
        write_report(self.out, report)
        return report

    def save_student(self, made: StudentResult) -> None:
        """Write ``student.json`` and ``student.safetensors``."""
        self.students.save(StudentResult(made.network), self.out / "student.json", recipe=self.recipe.name)

    def _report(self, made: dict[str, StudentResult], held_out: Tensor, exported: dict[str, Any]) -> dict[str, Any]:
        test = self._test_data() if self.measured else None
        figures = measure(answering(self.teacher, made, self.out), self.teacher, held_out, test)
        store = self._store()
        if store is not None:
            self._picture(store)
        return report_content(
            self.loaded,
            self.teacher,
            made,
            figures,
            exported,
            test=test,
            impressions=None if store is None else {**store.summary(), **self._origin()},
            identity=self.identity,
            device=self.device,
        )

    def _origin(self) -> dict[str, Any]:
        """Of a store that was handed in: by what it was made, which the recipe does not tell."""
        if self.given is None:
            return {}
        return {"given": {"fingerprint": self.given.fingerprint, **self.given.manifest["identity"]}}

    def _store(self) -> ImpressionStore | None:
        """The impressions that were learnt on, where the method makes some."""
        folder = self.out / "impressions"
        return self.given or (ImpressionStore.open(folder) if (folder / "manifest.json").exists() else None)

    def transfer(self) -> TransferSource:
        """The transfer source of the recipe's method, made or taken up again in ``impressions/``."""
        section = self.recipe.transfer
        if self.given is not None:
            return self.given.source(self.recipe.distillation.batch, self.recipe.seed, self.device)
        with self._timed("synthesis"):
            self.teacher.to(self.device)
            request = TransferRequest(
                size=section.size,
                batch_size=self.recipe.distillation.batch,
                seed=self.recipe.seed,
                folder=self.out / "impressions",
                options=section.options(),
                quiet=self.quiet,
                root=self.root,
                download=self.download,
                base=self.loaded.base,
                reserved=section.held_out,
            )
            source = find_method(section.method).source(self.teacher, request)
            self.team.first(lambda: self._require_same_images(source))
            return source

    def _require_same_images(self, source: TransferSource) -> None:
        """What a finished stage learnt on cannot be told from its files, if real images have changed since."""
        path = make_folder(self.out / "state") / "transfer.json"
        known = read_json(path) if path.exists() else None
        if isinstance(known, dict) and known.get("fingerprint") != source.fingerprint:
            raise UserError(
                f"transfer: the images are others than when {self.out} was begun, and what is finished there learnt on "
                "those. Use another output folder, or put the images back."
            )
        if known is None:
            write_json(path, {"fingerprint": source.fingerprint})

    def _held_out_seed(self) -> int:
        return derive_seed(self.recipe.seed, "held-out") % 2**31

    def held_out(self) -> Tensor:
        """Images ``(N, C, H, W)`` of another seed, on which agreement is measured and the export checked."""
        section = self.recipe.transfer
        with self._timed("synthesis"):
            self.teacher.to(self.device)
            request = TransferRequest(
                size=section.held_out,
                batch_size=section.held_out,
                seed=self._held_out_seed(),
                folder=self.out / "impressions-held-out",
                options=section.options(),
                label="held-out impressions",
                quiet=self.quiet,
                held_out=True,
                root=self.root,
                download=self.download,
                base=self.loaded.base,
            )
            source = find_method(section.method).source(self.teacher, request)
            return source.batch(0, torch.Generator().manual_seed(0)).cpu()

    def _picture(self, store: ImpressionStore) -> None:
        shards = (store.read(index) for index in spread(len(store.plan)))
        each = max(1, 60 // self.teacher.num_classes)
        images, logits = some_of_each(((one.images, one.logits) for one in shards), each)
        impressions_picture(
            images[:100],
            logits[:100],
            self.teacher.spec,
            self.out / "impressions.png",
            title="Data impressions, with the class and confidence the teacher sees",
        )


def _figures(seconds: Any) -> dict[str, float]:
    entries = seconds.items() if isinstance(seconds, dict) else ()
    return {stage: value for stage, value in entries if type(value) in (int, float) and math.isfinite(value)}
