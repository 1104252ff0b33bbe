"""A recipe from its teacher to its report: stages that are taken up where they stopped.

    teacher -> impressions -> student (pruned under NNI, distilled, shrunk, distilled) -> figures, export, report

Everything a stage leaves lies in the output folder; a stage whose result is there is not run again.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zskd_nni.data import load_images
from zskd_nni.distillation import check_student, distill
from zskd_nni.errors import UserError
from zskd_nni.export import export_onnx
from zskd_nni.files import fingerprint_of, make_folder, only_writer, read_json, save_tensors, write_json
from zskd_nni.methods.registry import TransferRequest, find_method
from zskd_nni.metrics import accuracy, agreement, logits_on
from zskd_nni.pictures import impressions_picture, pick_by_class
from zskd_nni.provenance import provenance
from zskd_nni.recipe import LoadedRecipe, NetworkSection
from zskd_nni.report import write_report
from zskd_nni.saved_model import load_network, save_network
from zskd_nni.seeds import derive_seed
from zskd_nni.synthesis import ImpressionStore
from zskd_nni.synthesis.store import describe_difference
from zskd_nni.teacher import first_tensor
from zskd_nni.transfer import NoiseSource, StoredSource, TransferSource

RUN = "run.json"


@dataclass
class Made:
    """A finished student and how it came about.

    Attributes:
        network: in ``eval()`` mode, on the CPU.
        record: JSON-able; what pruning and shrinking did, the losses along the way.
    """

    network: nn.Module
    record: dict[str, Any] = field(default_factory=dict)


class Run:
    """One recipe in one output folder.

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
        self.device, self.root, self.download, self.quiet = device, root, download, quiet
        self.out = Path(out)
        self.teacher = loaded.teacher()
        self._check_early()
        self.given = None if impressions is None else self._given_store(impressions)
        self.identity = {"recipe": _plain(self.recipe.model_dump(mode="json")), "teacher": self.teacher.fingerprint}
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
        if self.loaded.data_name() is not None:
            self._test_data()
        if self.recipe.compression.pruning is not None:
            from zskd_nni.compression.pruning import check_pruning

            check_pruning(self._fresh_student(), self.recipe.compression.pruning, self.teacher)

    def _test_data(self):  # type: ignore[no-untyped-def]
        assert self.recipe.evaluation is not None
        name = self.loaded.data_name()
        assert name is not None
        data = load_images(name, self.recipe.evaluation.split, self.root, self.download)
        if int(data.labels.max()) >= self.teacher.num_classes:
            raise UserError(
                f"evaluation.data: {name} has a class {int(data.labels.max())}, the teacher knows "
                f"{self.teacher.num_classes} classes only."
            )
        return data

    @contextmanager
    def _owned(self) -> Iterator[None]:
        make_folder(self.out)
        with only_writer(self.out):
            path = self.out / RUN
            if path.exists():
                known = read_json(path)
                if not isinstance(known, dict) or not isinstance(known.get("identity"), dict):
                    raise UserError(f"{path} is damaged; remove {self.out} to start over.")
                difference = describe_difference(known["identity"], self.identity)
                if difference:
                    raise UserError(f"{self.out} belongs to another run ({difference}). Use another output folder.")
                self.seconds = dict(known.get("seconds", {}))
            elif any(entry.name != ".lock" for entry in self.out.iterdir()):
                raise UserError(
                    f"{self.out} is not empty and no run of this recipe made it. Use another output folder."
                )
            self._write_run()
            yield

    def _write_run(self) -> None:
        write_json(self.out / RUN, {"identity": self.identity, "seconds": self.seconds})

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.monotonic() - started, 2)
            if self.out.is_dir():
                self._write_run()

    # The stages.

    def compress(self) -> dict[str, Any]:
        """Run what is missing of all stages; returns the content of ``report.json``.

        Raises:
            UserError: anything the user can mend.
        """
        with self._owned():
            source = self.transfer()
            held_out = self.held_out()
            made = {"student": self.student("student", source)}
            if "none" in self.recipe.controls:
                made["none"] = self.student("control-none", None)
            if "noise" in self.recipe.controls:
                noise = NoiseSource(self.teacher.spec, self.recipe.distillation.batch)
                made["noise"] = self.student("control-noise", noise)
            with self._timed("export"):
                sizes, difference = self._export(made["student"].network, held_out)
            with self._timed("evaluation"):
                report = self._report(made, held_out, sizes, difference)
            report["seconds"] = {**self.seconds, "total": round(sum(self.seconds.values()), 2)}
            write_report(self.out, report)
        return report

    def transfer(self) -> TransferSource:
        """The transfer source of the recipe's method, made or taken up again in ``impressions/``."""
        section = self.recipe.transfer
        if self.given is not None:
            batch = self.recipe.distillation.batch
            return StoredSource(self.given.images(), batch, self.recipe.seed, self.given.fingerprint)
        with self._timed("synthesis"):
            self.teacher.to(self.device)
            request = TransferRequest(
                size=section.size,
                batch_size=self.recipe.distillation.batch,
                seed=self.recipe.seed,
                folder=self.out / "impressions",
                options=section.options(),
                quiet=self.quiet,
            )
            return find_method(section.method).source(self.teacher, request)

    def held_out(self) -> Tensor:
        """Images ``(N, C, H, W)`` of another seed, on which agreement is measured and the export checked."""
        section = self.recipe.transfer
        with self._timed("synthesis"):
            request = TransferRequest(
                size=section.held_out,
                batch_size=section.held_out,
                seed=derive_seed(self.recipe.seed, "held-out") % 2**31,
                folder=self.out / "impressions-held-out",
                options=section.options(),
                label="held-out impressions",
                quiet=self.quiet,
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

    def student(self, name: str, source: TransferSource | None) -> Made:
        """Make a student, or load it where it was finished before.

        Args:
            name: of the files in ``state/``.
            source: what it learns on; None leaves it untaught.
        """
        state = make_folder(self.out / "state")
        finished = state / f"{name}.json"
        if finished.exists():
            record = read_json(finished).get("record", {})
            return Made(load_network(finished, self.loaded.base), record)
        made = Made(self._fresh_student())
        if self.recipe.compression.pruning is not None:
            made = self._pruned(name, made.network, source)
        if source is not None:
            with self._timed(f"distillation of {name}"):
                network = made.network.to(self.device)
                history = distill(
                    network,
                    self.teacher.to(self.device),
                    source,
                    self.recipe.distillation,
                    seed=derive_seed(self.recipe.seed, "distillation") % 2**31,
                    checkpoint=state / f"{name}.checkpoint.safetensors",
                    label=f"distillation of {name}",
                    quiet=self.quiet,
                )
                made.record["distillation"] = {"steps": history.steps, "losses": history.losses}
        made.network.cpu().eval()
        self._save(made, finished)
        (state / f"{name}.checkpoint.safetensors").unlink(missing_ok=True)
        return made

    def _pruned(self, name: str, network: nn.Module, source: TransferSource | None) -> Made:
        """Masks by NNI, trained under them, and the network shrunk to what they leave."""
        from zskd_nni.compression.pruning import prune

        finished = self.out / "state" / f"{name}-pruned.json"
        if finished.exists():
            return Made(load_network(finished, self.loaded.base), read_json(finished).get("record", {}))
        section = self.recipe.compression.pruning
        assert section is not None
        with self._timed(f"pruning of {name}"):
            pruned, record = prune(
                network.to(self.device),
                section,
                self.teacher.to(self.device),
                source,
                self.recipe.distillation,
                seed=derive_seed(self.recipe.seed, "pruning") % 2**31,
                checkpoint=self.out / "state" / f"{name}-pruning.checkpoint.safetensors",
                quiet=self.quiet,
            )
            made = Made(pruned, {"pruning": record})
            self._save(made, finished)
            (self.out / "state" / f"{name}-pruning.checkpoint.safetensors").unlink(missing_ok=True)
        return made

    def _save(self, made: Made, description: Path, **extra: Any) -> None:
        section = self._student_section()
        save_network(
            copy.deepcopy(made.network).cpu(),
            section.model,
            section.arguments,
            description.with_suffix(".safetensors"),
            description,
            self.loaded.base,
            {
                "input": _plain(dataclasses.asdict(self.teacher.spec)),
                "classes": self.teacher.num_classes,
                "record": made.record,
                **extra,
            },
        )

    def _export(self, student: nn.Module, held_out: Tensor) -> tuple[dict[str, Any], float]:
        spec = self.teacher.spec
        self.teacher.to("cpu")
        self._save(Made(student), self.out / "student.json", recipe=self.recipe.name)
        difference = export_onnx(student, spec, self.out / "student.onnx", held_out)
        state = self.out / "state"
        teacher_onnx, teacher_weights = state / "teacher.onnx", state / "teacher.safetensors"
        if not teacher_onnx.exists():
            export_onnx(self.teacher.model, spec, teacher_onnx, held_out)
        save_tensors(teacher_weights, self.teacher.model.state_dict())
        sizes = {
            "teacher": {"safetensors": teacher_weights.stat().st_size, "onnx": teacher_onnx.stat().st_size},
            "student": {
                "safetensors": (self.out / "student.safetensors").stat().st_size,
                "onnx": (self.out / "student.onnx").stat().st_size,
            },
        }
        return sizes, difference

    def _report(
        self, made: dict[str, Made], held_out: Tensor, sizes: dict[str, Any], difference: float
    ) -> dict[str, Any]:
        spec, teacher = self.teacher.spec, self.teacher.to("cpu")
        networks: dict[str, Callable[[Tensor], Tensor]] = {"teacher": teacher}
        for name, one in made.items():
            networks[name] = lambda images, network=one.network: first_tensor(network(spec.normalise(images)))  # type: ignore[misc]
        with torch.no_grad():
            on_held_out = {name: network(held_out) for name, network in networks.items()}
        accuracies: dict[str, float | None] = dict.fromkeys(networks)
        agreements = {name: agreement(logits, on_held_out["teacher"]) for name, logits in on_held_out.items()}
        agreement_on = "held-out impressions of another seed"
        agreements_test: dict[str, float] | None = None
        if self.recipe.evaluation is not None:
            data = self._test_data()
            on_test = {name: logits_on(network, data, spec) for name, network in networks.items()}
            accuracies = {name: round(accuracy(logits, data.labels), 3) for name, logits in on_test.items()}
            agreements_test = {name: agreement(logits, on_test["teacher"]) for name, logits in on_test.items()}
            agreement_on = f"test data ({data.name}, {len(data)} images)"
        shown = agreements_test or agreements
        made_here = (self.out / "impressions" / "manifest.json").exists()
        store = self.given or (ImpressionStore.open(self.out / "impressions") if made_here else None)
        if store is not None:
            self._picture(store)
        controls = {
            name: {
                "accuracy": accuracies[name],
                "agreement": round(shown[name], 6),
                "what": {
                    "none": "the same student without distillation",
                    "noise": "the same student, distilled on uniform noise",
                }[name],
            }
            for name in made
            if name != "student"
        }
        count = {name: sum(p.numel() for p in one.network.parameters()) for name, one in made.items()}
        return {
            "name": self.recipe.name,
            "description": self.recipe.description,
            "accuracy": {"teacher": accuracies["teacher"], "student": accuracies["student"]},
            "agreement": round(shown["student"], 6),
            "agreement_on": agreement_on,
            "agreement_held_out": round(agreements["student"], 6),
            "parameters": {
                "teacher": sum(p.numel() for p in teacher.model.parameters()),
                "student": count["student"],
            },
            "bytes": sizes,
            "controls": controls,
            "impressions": None if store is None else store.summary(),
            "pruning": made["student"].record.get("pruning"),
            "history": made["student"].record.get("distillation"),
            "onnx_difference": difference,
            "classifier": teacher.classifier_path,
            "evaluation": None if self.recipe.evaluation is None else self.recipe.evaluation.data,
            "seconds": {},
            "recipe": self.identity["recipe"],
            "fingerprint": fingerprint_of(self.identity),
            "provenance": {
                **provenance(self.device, self.recipe.seed),
                "selected_on": self.recipe.selected_on,
                "teacher": self.teacher.fingerprint,
            },
        }

    def _picture(self, store: ImpressionStore) -> None:
        first = store.read(0)
        chosen = pick_by_class(first.logits, max(1, 60 // self.teacher.num_classes))[:100]
        impressions_picture(
            first.images[chosen],
            first.logits[chosen],
            self.teacher.spec,
            self.out / "impressions.png",
            title="Data impressions, with the class and confidence the teacher sees",
        )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
