"""A recipe from its teacher to its report: stages that are taken up where they stopped.

    teacher -> impressions -> student (pruned under NNI, distilled, shrunk, distilled) -> quantized student
            -> export, figures, report

Everything a stage leaves lies in the output folder; a stage whose result is there is not run again.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from zskd_nni import interrupt
from zskd_nni.data import DATA_VARIABLE, NAMED_SETS, data_root, load_images
from zskd_nni.distillation import check_student, distill
from zskd_nni.errors import UserError, said_of
from zskd_nni.evaluation import logits_on
from zskd_nni.export import export_onnx, run_onnx
from zskd_nni.feature_matching import check_paths, feature_pairs
from zskd_nni.files import (
    fingerprint_of,
    load_sealed,
    make_folder,
    plain,
    read_json,
    remove_leftovers,
    save_sealed,
    save_tensors,
    write_json,
)
from zskd_nni.identity import taken_over
from zskd_nni.latency import median_latencies
from zskd_nni.methods.registry import TransferRequest, find_method, is_data_free
from zskd_nni.metrics import accuracy, agreement
from zskd_nni.networks import code_fingerprint, network_fingerprint
from zskd_nni.pictures import impressions_picture, some_of_each, spread
from zskd_nni.provenance import provenance
from zskd_nni.recipe import LoadedRecipe, NetworkSection, PruningSection
from zskd_nni.report import write_report
from zskd_nni.saved_model import load_network, save_network
from zskd_nni.seeds import derive_seed
from zskd_nni.synthesis import ImpressionStore
from zskd_nni.teacher import first_tensor
from zskd_nni.transfer import NoiseSource, StoredSource, TransferSource
from zskd_nni.workers import only_writers, team

if TYPE_CHECKING:
    from zskd_nni.compression.masks import Masks
    from zskd_nni.compression.quantization import Quantization

T = TypeVar("T")
RUN = "run.json"
# Of the held-out images onnxruntime must choose as NNI's simulation does on so many, or there is a warning, an error.
GOOD_AGREEMENT, LEAST_AGREEMENT = 0.995, 0.98


@dataclass
class Made:
    """A finished student and how it came about.

    Attributes:
        network: in ``eval()`` mode, on the CPU.
        record: JSON-able; what pruning and shrinking did, the losses along the way.
        quantization: of the network where the recipe asks for it, and where it can be had for this student.
        masks: weights that pruning silenced and did not remove, which no training may bring back.
    """

    network: nn.Module
    record: dict[str, Any] = field(default_factory=dict)
    quantization: Quantization | None = None
    masks: Masks = field(default_factory=dict)


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
        self._check_early()
        self.given = None if impressions is None else self._given_store(impressions)
        self.identity = {
            "recipe": plain(self.recipe.model_dump(mode="json", exclude={"scales", "search"})),
            "teacher": self.teacher.fingerprint,
        }
        if self.recipe.student is not None:  # its weights, or what its factory makes of the seed
            self.identity["student"] = network_fingerprint(self._fresh_student())
        code = {
            reference: digest
            for reference in sorted({section.model for section in (self.recipe.teacher, self._student_section())})
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
        missing = store.missing()
        if missing:
            raise UserError(f"{folder} is not finished: shard {missing[0]} is {store.damage(missing[0])}.")
        return store

    def _check_early(self) -> None:
        """Everything that can be known to be wrong before the long work begins."""
        check_student(self._fresh_student(), self.teacher)
        features = self.recipe.distillation.features
        if self.recipe.compression.pruning is None:
            feature_pairs(self._fresh_student(), self.teacher, features)
        elif not isinstance(features, str):  # how wide a pruned student's layers are is known when it is shrunk
            check_paths(self._fresh_student(), self.teacher, features)
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
        self._check_compression()

    def _check_compression(self) -> None:
        section = self.recipe.compression
        pruning, quantization = section.pruning, section.quantization
        if quantization is not None and quantization.fused and self.recipe.distillation.features != "none":
            raise UserError(
                "distillation.features: hidden layers are matched where a finished student is distilled, and with "
                "compression.quantization.fused there is no such training; leave the key out, or fused."
            )
        together = None  # the steps of the one training, where it is one
        if pruning is not None and quantization is not None and quantization.fused:
            together = pruning.steps + self.recipe.distillation.steps + quantization.steps
        if pruning is not None:
            from zskd_nni.compression.pruning import check_pruning

            check_pruning(self._fresh_student(), pruning, self.teacher, together)
        if quantization is not None:
            from zskd_nni.compression.student_quantization import check_quantization

            check_quantization(self._fresh_student(), quantization, self.teacher, together)
        if section.distiller is not None:
            from zskd_nni.compression.distillers import check_distiller
            from zskd_nni.compression.quantization import quantizer_class_name

            calibrated = quantization is None or quantizer_class_name(quantization.quantizer) == "PtqQuantizer"
            if calibrated and (pruning is None or pruning.steps == 0):
                raise UserError(
                    "compression.distiller teaches while NNI prunes or quantizes, and nothing is trained there: leave "
                    "it out, give compression.pruning.steps, or take a quantizer that trains, such as QATQuantizer."
                )
            check_distiller(self._fresh_student(), section.distiller, self.teacher)

    def _tell(self, sentence: str) -> None:
        if self.team.leads:
            print(sentence, file=sys.stderr)

    def _test_data(self):  # type: ignore[no-untyped-def]
        assert self.recipe.evaluation is not None
        name = self.loaded.data_name()
        assert name is not None
        with said_of("evaluation.data"):
            data = load_images(name, self.recipe.evaluation.split, self.root, self.download)
            data.require_labels(self.teacher.num_classes)
            data.pixels(slice(0, 1), self.teacher.spec)  # channels that do not fit are refused now, not at the end
        return data

    @contextmanager
    def _owned(self) -> Iterator[None]:
        make_folder(self.out)
        with only_writers(self.out):
            self.team.first(self._take_over)
            yield

    def _take_over(self) -> None:
        known = taken_over(self.out, RUN, "run", self.identity)
        if known:
            self.seconds = _figures(known.get("seconds"))
        self._write_run()

    def _write_run(self) -> None:
        if self.team.leads:
            write_json(self.out / RUN, {"identity": self.identity, "seconds": self.seconds})

    @contextmanager
    def _timed(self, stage: str, again: bool = True) -> Iterator[None]:
        """Count a stage's seconds; those of a stage that every run repeats (``again`` false) are not added up."""
        interrupt.check()
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
        with self._owned():
            held_out = self.held_out()  # first: what is wrong with its size is said before the long work
            source = self.transfer()
            made = {"student": self.student("student", source)}
            if "none" in self.recipe.controls:
                made["none"] = self.student("control-none", None, scores=source)
            if "noise" in self.recipe.controls:
                noise = NoiseSource(self.teacher.spec, self.recipe.distillation.batch)
                made["noise"] = self.student("control-noise", noise)
            return self.team.first(lambda: self._finish(made, held_out))

    def _finish(self, made: dict[str, Made], held_out: Tensor) -> dict[str, Any]:
        with self._timed("export", again=False):
            exported = self._export(made["student"], held_out)
        with self._timed("evaluation", again=False):
            report = self._report(made, held_out, exported)
        report["seconds"] = {**self.seconds, "total": round(sum(self.seconds.values()), 2)}
        write_report(self.out, report)
        return report

    def transfer(self) -> TransferSource:
        """The transfer source of the recipe's method, made or taken up again in ``impressions/``."""
        section = self.recipe.transfer
        if self.given is not None:
            batch = self.recipe.distillation.batch
            return StoredSource(self.given.images_on_disk(), batch, self.recipe.seed, self.given.fingerprint)
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

    def held_out(self) -> Tensor:
        """Images ``(N, C, H, W)`` of another seed, on which agreement is measured and the export checked."""
        section = self.recipe.transfer
        with self._timed("synthesis"):
            self.teacher.to(self.device)
            request = TransferRequest(
                size=section.held_out,
                batch_size=section.held_out,
                seed=derive_seed(self.recipe.seed, "held-out") % 2**31,
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

    def _fresh_student(self) -> nn.Module:
        if self.recipe.student is None:
            return copy.deepcopy(self.teacher.model).cpu().requires_grad_(True)
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.recipe.seed, "student"))
            return self.loaded.network(self.recipe.student).float()

    def _student_section(self) -> NetworkSection:
        return self.recipe.student or self.recipe.teacher

    def student(self, name: str, source: TransferSource | None, scores: TransferSource | None = None) -> Made:
        """Make a student, or load it where it was finished before.

        Args:
            name: of the files in ``state/``.
            source: what it learns on; None leaves it untaught.
            scores: what a pruner scores channels on and a quantizer is calibrated on; ``source`` where absent.
        """
        self.team.first(lambda: remove_leftovers(make_folder(self.out / "state")))
        section = self.recipe.compression.quantization
        if section is not None and section.fused and source is not None:
            return self._in_one_training(name, source)
        made = self._taught(name, source, scores)
        if section is not None:
            images = scores if source is None else source
            assert images is not None
            made.quantization = self._quantized(name, made, images, train=source is not None)
        return made

    def _taught(self, name: str, source: TransferSource | None, scores: TransferSource | None) -> Made:
        """Pruned and distilled, in floating point."""
        state = self.out / "state"
        finished = state / f"{name}.json"
        known = self._load(finished, source)
        if known is not None:
            return known
        made = Made(self._fresh_student())
        if self.recipe.compression.pruning is not None:
            made = self._pruned(name, made.network, source, scores)
        # The teacher itself, not pruned, has nothing to learn from itself before it is quantized.
        something_to_learn = self.recipe.student is not None or self.recipe.compression.pruning is not None
        if source is not None and something_to_learn:
            with self._timed(f"distillation of {name}"):
                network = made.network.to(self.device)
                after_step = None
                if made.masks:
                    from zskd_nni.compression.masks import held_at_zero

                    after_step = held_at_zero(network, made.masks)
                history = distill(
                    network,
                    self.teacher.to(self.device),
                    source,
                    self.recipe.distillation,
                    seed=derive_seed(self.recipe.seed, "distillation") % 2**31,
                    checkpoint=state / f"{name}.checkpoint.safetensors",
                    label=f"distillation of {name}",
                    after_step=after_step,
                    quiet=self.quiet,
                )
                pairs = feature_pairs(network, self.teacher, self.recipe.distillation.features)
                made.record["distillation"] = {
                    "steps": history.steps,
                    "losses": history.losses,
                    "features": [list(pair) for pair in pairs],
                }
        made.network.cpu().eval()
        if "pruning" in made.record:
            from zskd_nni.compression.masks import share_of_zeros

            made.record["pruning"]["zeros"] = share_of_zeros(made.network, made.record["pruning"]["sparsity"])
        self.team.first(lambda: self._save_stage(made, finished, source))
        (state / f"{name}.checkpoint.safetensors").unlink(missing_ok=True)
        # As a later run finds it: training leaves another memory format, whose sums round otherwise.
        return Made(load_network(finished), made.record, masks=made.masks)

    def _pruned(
        self, name: str, network: nn.Module, source: TransferSource | None, scores: TransferSource | None
    ) -> Made:
        """Masks by NNI, trained under them, and the network shrunk to what they leave."""
        from zskd_nni.compression.pruning import prune

        finished = self.out / "state" / f"{name}-pruned.json"
        known = self._load(finished, source)
        if known is not None:
            return known
        section = self.recipe.compression.pruning
        assert section is not None
        checkpoint = self.out / "state" / f"{name}-pruning.checkpoint.safetensors"
        with self._timed(f"pruning of {name}"):
            pruned = prune(
                network.to(self.device),
                section,
                self.teacher.to(self.device),
                source,
                self.recipe.distillation,
                scores=scores,
                distiller=self.recipe.compression.distiller,
                seed=derive_seed(self.recipe.seed, "pruning") % 2**31,
                checkpoint=checkpoint,
                quiet=self.quiet,
            )
            made = Made(pruned.network, {"pruning": pruned.record}, masks=pruned.masks)
            self.team.first(lambda: self._save_stage(made, finished, source))
            checkpoint.unlink(missing_ok=True)
        # What each of many has made by itself may differ in the last bits from one machine to the next.
        return made if self.team.alone else _made(finished)

    def _quantized(self, name: str, made: Made, images: TransferSource, train: bool) -> Quantization | None:
        """A finished student quantized by NNI; None where the quantizer would have to train and may not."""
        from zskd_nni.compression.saved_quantization import load_quantization
        from zskd_nni.compression.student_quantization import quantize_student

        finished = self.out / "state" / f"{name}-quantized.json"
        live = images if train else None

        def load(description: Path) -> Quantization:
            known = load_quantization(description)
            self._put_back(live, description)
            return known

        known = self._reload(load, finished)
        if known is not None:
            return known
        section = self.recipe.compression.quantization
        assert section is not None
        checkpoint = self.out / "state" / f"{name}-quantization.checkpoint.safetensors"
        with self._timed(f"quantization of {name}"):
            quantization = quantize_student(
                made.network.to(self.device),
                section,
                self.teacher.to(self.device),
                images,
                self.recipe.distillation,
                train=train,
                distiller=self.recipe.compression.distiller,
                seed=derive_seed(self.recipe.seed, "quantization") % 2**31,
                checkpoint=checkpoint,
                masks=made.masks,
                quiet=self.quiet,
            )
            made.network.cpu()
            if quantization is not None:
                self.team.first(lambda: self._save_quantized(quantization, finished, live))
            checkpoint.unlink(missing_ok=True)
        return quantization

    def _in_one_training(self, name: str, source: TransferSource) -> Made:
        """Pruned, quantized and distilled in one NNI training, then shrunk."""
        from zskd_nni.compression.saved_quantization import load_quantization
        from zskd_nni.compression.student_quantization import compress_in_one_training

        state = self.out / "state"
        finished, quantized = state / f"{name}.json", state / f"{name}-quantized.json"
        known, known_quantization = self._load(finished, source), self._reload(load_quantization, quantized)
        if known is not None and known_quantization is not None:
            known.quantization = known_quantization
            return known
        compression = self.recipe.compression
        assert compression.pruning is not None and compression.quantization is not None
        checkpoint = state / f"{name}.checkpoint.safetensors"
        with self._timed(f"pruning, quantization and distillation of {name}"):
            pruned, quantization = compress_in_one_training(
                self._fresh_student().to(self.device),
                compression.pruning,
                compression.quantization,
                self.teacher.to(self.device),
                source,
                self.recipe.distillation,
                distiller=compression.distiller,
                seed=derive_seed(self.recipe.seed, "pruning") % 2**31,
                checkpoint=checkpoint,
                quiet=self.quiet,
            )
            record = {"pruning": pruned.record, "distillation": pruned.record["history"]}
            made = Made(pruned.network.cpu().eval(), record, quantization)
            self.team.first(lambda: self._save_quantized(quantization, quantized))
            self.team.first(lambda: self._save_stage(made, finished, source))
            checkpoint.unlink(missing_ok=True)
        return made

    def _load(self, description: Path, source: TransferSource | None = None) -> Made | None:
        """A finished stage's network; None where the stage is to be run, because it never was or its files are bad.

        A live source is put back as the stage left it.
        """

        def load(description: Path) -> Made:
            made = _made(description)
            self._put_back(source, description)
            return made

        return self._reload(load, description)

    def _save_stage(self, made: Made, description: Path, source: TransferSource | None) -> None:
        self._keep(source, description)
        self._save(made, description)

    def _keep(self, source: TransferSource | None, description: Path) -> None:
        """Write what a live source has become: later stages score and calibrate on its images."""
        state = {} if source is None else source.state_dict()
        if state:
            save_sealed(_source_of(description), state, {})

    def _put_back(self, source: TransferSource | None, description: Path) -> None:
        if source is not None and source.state_dict():
            source.load_state_dict(load_sealed(_source_of(description))[0])

    def _reload(self, load: Callable[[Path], T], description: Path) -> T | None:
        if not self.team.first(description.exists):
            return None
        loaded = None
        try:
            loaded = load(description)
        except UserError as error:
            self._tell(f"{error} That stage is run again.")
        # Together, or not at all; and nobody writes these files anew while another reads them.
        return loaded if all(self.team.collect(loaded is not None)) else None

    def _save_quantized(
        self, quantization: Quantization, description: Path, source: TransferSource | None = None
    ) -> None:
        from zskd_nni.compression.saved_quantization import save_calibration

        self._keep(source, description)
        made = Made(quantization.student)
        self._save(made, description, quantization=plain(save_calibration(quantization, description)))

    def _save(self, made: Made, description: Path, **extra: Any) -> None:
        section = self._student_section()
        if made.masks:
            from zskd_nni.compression.masks import save_masks

            extra["masks"] = save_masks(made.masks, description)
        save_network(
            copy.deepcopy(made.network).cpu(),
            section.model,
            section.arguments,
            description.with_suffix(".safetensors"),
            description,
            self.loaded.base,
            {
                "input": plain(dataclasses.asdict(self.teacher.spec)),
                "classes": self.teacher.num_classes,
                "record": made.record,
                **extra,
            },
        )

    def _export(self, made: Made, held_out: Tensor) -> dict[str, Any]:
        """Write the student's files; returns their sizes, how well they agree, and how fast they answer."""
        spec, student = self.teacher.spec, made.network
        self.teacher.to("cpu")
        self._save(Made(student), self.out / "student.json", recipe=self.recipe.name)
        difference = export_onnx(student, spec, self.out / "student.onnx", held_out)
        state = self.out / "state"
        teacher_onnx, teacher_weights = state / "teacher.onnx", state / "teacher.safetensors"
        export_onnx(self.teacher.model, spec, teacher_onnx, held_out)  # anew: one from before may be damaged
        save_tensors(teacher_weights, self.teacher.model.state_dict())
        integers = self.out / "student-int8.onnx"
        quantization = self._export_integers(made.quantization, held_out, integers)
        files = {"teacher": teacher_onnx, "student": self.out / "student.onnx"}
        if quantization is not None and quantization["exported"]:
            files["student_int8"] = integers
        latencies = median_latencies(files, held_out[:1])
        return {
            "bytes": {
                "teacher": {"safetensors": teacher_weights.stat().st_size, "onnx": teacher_onnx.stat().st_size},
                "student": {
                    "safetensors": (self.out / "student.safetensors").stat().st_size,
                    "onnx": (self.out / "student.onnx").stat().st_size,
                    "onnx_int8": integers.stat().st_size if "student_int8" in files else None,
                },
            },
            "onnx_difference": difference,
            "latency_ms": {name: latencies.get(name) for name in ("teacher", "student", "student_int8")},
            "quantization": quantization,
        }

    def _export_integers(
        self, quantization: Quantization | None, held_out: Tensor, path: Path
    ) -> dict[str, Any] | None:
        """Write ``student-int8.onnx`` where the quantizer can be said in ONNX; None without a quantizer."""
        if quantization is None:
            return None
        from zskd_nni.compression.quantized_export import export_quantized_onnx
        from zskd_nni.compression.student_quantization import EXPORTED

        result: dict[str, Any] = {
            "quantizer": quantization.quantizer,
            "folds": [list(names) for names in quantization.folds],
            "layers": sorted(quantization.calibration),
            "exported": quantization.quantizer in EXPORTED,
            "agreement": None,
            "max_logit_difference": None,
            "note": "",
        }
        section = self.recipe.compression.quantization
        notes = []
        if section is not None and section.fuse_batch_norm and not result["folds"]:
            notes.append("fuse_batch_norm found nothing to fold")
        if not result["exported"]:
            notes.append(
                f"{quantization.quantizer} changes weights by more than rounding: it is simulated, and no integer "
                "file is written"
            )
            path.unlink(missing_ok=True)
            return {**result, "note": "; ".join(notes)}
        export = export_quantized_onnx(quantization, self.teacher.spec, path, held_out, LEAST_AGREEMENT)
        result.update(agreement=export.agreement, max_logit_difference=export.max_logit_difference)
        if export.agreement < GOOD_AGREEMENT:
            notes.append(
                f"warning: onnxruntime and NNI's simulation agree on {export.agreement:.1%} of the held-out images "
                f"only, less than {GOOD_AGREEMENT:.1%}"
            )
        return {**result, "note": "; ".join(notes)}

    def _integer_answers(self, made: Made, name: str) -> Callable[[Tensor], Tensor] | None:
        """What a quantized student answers: onnxruntime where there is a file of it, NNI's simulation otherwise."""
        if made.quantization is None:
            return None
        path = self.out / "student-int8.onnx"
        if name == "student" and path.exists():
            return lambda images: run_onnx(path, images)
        from zskd_nni.compression.quantization import simulated

        spec, network = self.teacher.spec, simulated(made.quantization)
        return lambda images: first_tensor(network(spec.normalise(images)))

    def _report(self, made: dict[str, Made], held_out: Tensor, exported: dict[str, Any]) -> dict[str, Any]:
        spec, teacher = self.teacher.spec, self.teacher.to("cpu")
        networks: dict[str, Callable[[Tensor], Tensor]] = {"teacher": teacher}
        for name, one in made.items():
            networks[name] = lambda images, network=one.network: first_tensor(network(spec.normalise(images)))  # type: ignore[misc]
            integers = self._integer_answers(one, name)
            if integers is not None:
                networks[f"{name}_int8"] = integers
        with torch.no_grad():
            parts = held_out.split(spec.measuring_batch)
            on_held_out = {name: torch.cat([network(part) for part in parts]) for name, network in networks.items()}
        accuracies: dict[str, float | None] = dict.fromkeys(networks)
        agreements = {name: agreement(logits, on_held_out["teacher"]) for name, logits in on_held_out.items()}
        data_free = is_data_free(find_method(self.recipe.transfer.method), self.recipe.transfer.options())
        agreement_on = f"held-out {'impressions of another seed' if data_free else 'images that no student learnt on'}"
        agreements_test: dict[str, float] | None = None
        if self.measured:
            data = self._test_data()
            on_test = {name: logits_on(network, data, spec) for name, network in networks.items()}
            accuracies = {name: round(accuracy(logits, data.labels), 3) for name, logits in on_test.items()}
            agreements_test = {name: agreement(logits, on_test["teacher"]) for name, logits in on_test.items()}
            agreement_on = f"{self._measured_on()} ({data.name}, {len(data)} images)"
        shown = agreements_test or agreements
        method, options = find_method(self.recipe.transfer.method), self.recipe.transfer.options()
        data_free = is_data_free(method, options)
        made_here = (self.out / "impressions" / "manifest.json").exists()
        store = self.given or (ImpressionStore.open(self.out / "impressions") if made_here else None)
        if store is not None:
            self._picture(store)
        controls = {
            name: {
                "accuracy": accuracies[name],
                "agreement": round(shown[name], 6),
                "accuracy_int8": accuracies.get(f"{name}_int8"),
                "agreement_int8": None if f"{name}_int8" not in shown else round(shown[f"{name}_int8"], 6),
                "label": self._label_of_a_control(name),
                "what": self._what_a_control_is(name, made[name].quantization is not None),
            }
            for name in made
            if name != "student"
        }
        count = {name: sum(p.numel() for p in one.network.parameters()) for name, one in made.items()}
        return {
            "name": self.recipe.name,
            "description": self.recipe.description,
            "accuracy": {
                "teacher": accuracies["teacher"],
                "student": accuracies["student"],
                "student_int8": accuracies.get("student_int8"),
            },
            "agreement": round(shown["student"], 6),
            "agreement_on": agreement_on,
            "agreement_held_out": round(agreements["student"], 6),
            "agreement_int8": None if "student_int8" not in shown else round(shown["student_int8"], 6),
            "agreement_onnx": None if exported["quantization"] is None else exported["quantization"]["agreement"],
            "parameters": {
                "teacher": sum(p.numel() for p in teacher.model.parameters()),
                "student": count["student"],
            },
            "bytes": exported["bytes"],
            "latency_ms": exported["latency_ms"],
            "controls": controls,
            "impressions": None if store is None else store.summary(),
            "pruning": made["student"].record.get("pruning"),
            "quantization": exported["quantization"],
            "history": made["student"].record.get("distillation"),
            "onnx_difference": exported["onnx_difference"],
            "data_free": data_free,
            "only_calibrated": self.recipe.only_calibrates,
            "learnt_on": None if data_free else getattr(options, "data", method.name),
            "learnt_on_what_is_measured": not data_free and self._learnt_on_what_is_measured(options),
            "classifier": teacher.classifier_path,
            "evaluation": self.recipe.evaluation.data if self.recipe.evaluation and self.measured else None,
            "seconds": {},
            "recipe": self.identity["recipe"],
            "fingerprint": fingerprint_of(self.identity),
            "provenance": {
                **provenance(self.device, self.recipe.seed),
                "selected_on": self.recipe.selected_on,
                "teacher": self.teacher.fingerprint,
            },
        }

    def _measured_on(self) -> str:
        section = self.recipe.evaluation
        assert section is not None
        return "training data" if section.data in NAMED_SETS and section.split == "train" else "test data"

    def _learnt_on_what_is_measured(self, options: Any) -> bool:
        """Whether real images that a student learns on are those that it is measured on."""
        section = self.recipe.evaluation
        if section is None or not self.measured:
            return False
        names = [*str(getattr(options, "data", "")).split(", "), *getattr(options, "sources", ())]
        if section.data in NAMED_SETS:
            return section.data in names and section.split == getattr(options, "split", "train")
        measured = self.loaded.path(section.data).resolve()
        return any(name and name not in NAMED_SETS and self.loaded.path(name).resolve() == measured for name in names)

    def _label_of_a_control(self, name: str) -> str:
        if name == "none":
            return "not distilled"
        return "calibrated on noise" if self.recipe.only_calibrates else "distilled on noise"

    def _what_a_control_is(self, name: str, quantized: bool) -> str:
        pruning = self.recipe.compression.pruning
        if name == "noise" and self.recipe.only_calibrates:
            return "the same network, calibrated on uniform noise in the place of the images"
        if name == "noise":
            return "the same student, with uniform noise in the place of the images"
        what = "the same student without distillation"
        if pruning is not None and _is_data_driven(pruning):
            what += f"; {pruning.pruner} scored its channels on the same images, the weights are those from before"
        if pruning is not None and pruning.schedule is not None:
            what += "; pruned at once, without the schedule"
        if quantized:
            what += "; quantized by calibration alone"
        return what

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


def _source_of(description: Path) -> Path:
    return description.with_suffix(".source.safetensors")


def _made(description: Path) -> Made:
    network, content = load_network(description), read_json(description)
    record, masks = content.get("record"), content.get("masks")
    if not isinstance(record, dict):
        raise UserError(f"{description} does not tell how its network was made.")
    if masks is None:
        return Made(network, record)
    from zskd_nni.compression.masks import load_masks

    return Made(network, record, masks=load_masks(masks, description))


def _is_data_driven(section: PruningSection) -> bool:
    from zskd_nni.compression.pruning import is_data_driven

    return is_data_driven(section)


def _figures(seconds: Any) -> dict[str, float]:
    entries = seconds.items() if isinstance(seconds, dict) else ()
    return {stage: value for stage, value in entries if type(value) in (int, float) and math.isfinite(value)}
