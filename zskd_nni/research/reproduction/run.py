"""One run: a cell with a seed. It leaves a record; a run that was stopped is resumed."""

from __future__ import annotations

import contextlib
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zskd_nni.methods.ats.balance import CannotBalanceError
from zskd_nni.methods.registry import find_method, is_data_free
from zskd_nni.models.build import load_into
from zskd_nni.research.reproduction.cells import SOURCES, Plan
from zskd_nni.research.reproduction.context import PairContext
from zskd_nni.research.reproduction.records import FORMAT, Record, read_record, read_run_file, teacher_of
from zskd_nni.research.reproduction.sources import make_source
from zskd_nni.research.reproduction.students import new_student, train_student
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import make_folder, plain, sha256_of_file, write_json
from zskd_nni.runtime.locks import FolderInUseError, only_writer
from zskd_nni.runtime.provenance import provenance
from zskd_nni.runtime.tensors import load_tensors, save_tensors
from zskd_nni.training.inference import float_answers, logits_on
from zskd_nni.training.metrics import accuracy, agreement, expected_calibration_error, mean_transition_error

_CHECKPOINT, _STUDENT, _WEIGHTS = "checkpoint.pt", "student.json", "student.safetensors"


class CellRun:
    """A cell at a scale with a seed.

    Args:
        plan: the cell's settings.
        context: teacher, data and folders of its pair.
        seed: of images and student.
    """

    def __init__(self, plan: Plan, context: PairContext, seed: int) -> None:
        self.plan, self.context, self.seed = plan, context, seed
        self.record_path = context.workspace.results / plan.record_name(seed)

    @cached_property
    def folder(self) -> Path:
        """Where the run keeps its student; a run on another kind of device does not continue it."""
        workspace = self.context.workspace
        fingerprint = self.plan.fingerprint(self.context.teacher.fingerprint, self.seed)
        device = "" if workspace.device_kind == "cpu" else f"-{workspace.device_kind}"
        return workspace.runs / "students" / f"{self.plan.name}-seed{self.seed}-{fingerprint[:12]}{device}"

    def is_finished(self) -> bool:
        """Whether this run's record is there, with the transition error measured as the cell asks.

        Raises:
            UserError: there is no teacher, or the file is no valid record.
        """
        teacher = self.context.teacher.fingerprint
        if not self.record_path.exists():
            return False
        try:
            record = read_record(self.record_path)
        except UserError as error:
            raise UserError(f"{error} Remove the file, and run its cell again.") from error
        if teacher_of(record) != teacher or record["seed"] != self.seed or not self.plan.matches(record):
            return False
        if not self.plan.cell.transition or record["accuracy"]["student"] is None:
            return True
        asked = record.get("mte_asked") or record.get("mte_measured_on") or {}
        return (asked.get("images"), asked.get("steps")) == (self.plan.scale.mte_images, self.plan.scale.mte_steps)

    def status(self) -> str:
        """``finished``, ``begun``, ``other settings`` (the record is of other ones), ``not run`` or ``no teacher``."""
        try:
            folder = self.folder
        except UserError:
            return "no teacher"
        if self.is_finished():
            return "finished"
        if any((folder / name).exists() for name in (_CHECKPOINT, _STUDENT)):
            return "begun"
        return "other settings" if self.record_path.exists() else "not run"

    def run(self) -> Record | None:
        """Run or resume it, and write its record; None if another process is running it or has finished it.

        Raises:
            UserError: anything the user can correct.
        """
        make_folder(self.folder)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(only_writer(self.folder))
            except FolderInUseError:
                return None
            if self.is_finished():  # by another process, a moment ago
                return None
            record = self._record()
            make_folder(self.record_path.parent)
            write_json(self.record_path, record)
        return record

    def _record(self) -> Record:
        cell, context = self.plan.cell, self.context
        record: Record = {
            "format": FORMAT,
            "cell": cell.name,
            "pair": cell.pair,
            "method": cell.method,
            "preset": cell.preset or None,
            "variant": "-".join(part for part in (cell.network, cell.variant) if part) or None,
            "seed": self.seed,
            "scale": self.plan.scale_name,
            "data_free": self._is_data_free(),
            # Known after the training: nothing is measured on the test split before.
            **dict.fromkeys(("impressions", "accuracy", "agreement", "calibration_error", "mte")),
            "measured_on": f"test split of {context.test.name}, {len(context.test)} images, the last step, once",
            "networks": {"teacher": context.pair.teacher, "student": plain(list(self.plan.network))},
            "ingredients": self.plan.ingredients,
            "sizes": self.plan.sizes,
        }
        try:
            known = self._finished_student() or self._train()
        except CannotBalanceError as error:
            teacher_accuracy, teacher_error = context.teacher_scores
            record.update(
                accuracy={"teacher": teacher_accuracy, "student": None},
                calibration_error={"teacher": teacher_error},
                outcome=str(error),
                transfer={"counts": {"candidates": error.counts}},
            )
            seconds = {"synthesis": 0.0, "student": 0.0, "evaluation": 0.0}
        else:
            started = time.monotonic()
            record.update(self._measure(self._load_student()))
            record.update({key: known[key] for key in ("impressions", "transfer", "history")})
            seconds = {**known["seconds"], "evaluation": round(time.monotonic() - started, 2)}
        where = provenance(context.workspace.device, self.seed)
        record.update(
            seconds={**seconds, "total": round(sum(seconds.values()), 2)},
            device=where["device"],
            selected_on=self.plan.selected_on,
            provenance={**where, "teacher": context.teacher.fingerprint},
        )
        return record

    def _is_data_free(self) -> bool:
        method = self.plan.cell.method
        if method in SOURCES:
            return is_data_free(find_method(SOURCES[method]), self.plan.options)
        return method not in ("real-labels", "kd-at")

    def _finished_student(self) -> dict[str, Any] | None:
        """What is known of the student in the folder; None if there is none, or its weights have been changed."""
        path, weights = self.folder / _STUDENT, self.folder / _WEIGHTS
        if not path.exists():
            return None
        kinds = {"sha256": str, "impressions": object, "transfer": object, "history": object, "seconds": dict}
        known = read_run_file(path, kinds)
        return known if weights.is_file() and sha256_of_file(weights) == known["sha256"] else None

    def _train(self) -> dict[str, Any]:
        """Train the student into the folder."""
        built = make_source(self.plan, self.context, self.seed)
        checkpoint = self.folder / _CHECKPOINT
        trained = train_student(self.plan, self.context, self.seed, built.source, checkpoint)
        history = trained.history
        known = {
            "sha256": save_tensors(self.folder / _WEIGHTS, trained.network.state_dict()),
            "impressions": trained.images,
            "transfer": built.facts,
            "seconds": {"synthesis": built.seconds, "student": round(history.seconds, 2)},
            "history": {"steps": history.steps[::10], "losses": [round(loss, 6) for loss in history.losses[::10]]},
        }
        write_json(self.folder / _STUDENT, known)
        checkpoint.unlink(missing_ok=True)
        return known

    def _load_student(self) -> nn.Module:
        student = new_student(self.plan, self.seed)
        load_into(student, load_tensors(self.folder / _WEIGHTS)[0], str(self.folder))
        # Channels last: on the CPU twice as fast.
        return student.eval().to(self.context.workspace.device).to(memory_format=torch.channels_last)

    def _measure(self, student: nn.Module) -> dict[str, Any]:
        """The student's accuracy on the test split; the test split is read nowhere else."""
        context, scale = self.context, self.plan.scale
        teacher, test, spec = context.teacher, context.test, context.teacher.spec
        device = context.workspace.device
        logits = logits_on(float_answers(student, spec), test, spec, device)
        teacher_accuracy, teacher_error = context.teacher_scores
        error = expected_calibration_error(logits, test.labels)
        agreed = (logits.argmax(1) == context.teacher_logits.argmax(1)).nonzero().flatten()
        result: dict[str, Any] = {
            "accuracy": {"teacher": teacher_accuracy, "student": round(accuracy(logits, test.labels), 3)},
            "agreement": round(agreement(logits, context.teacher_logits), 6),
            "calibration_error": {"teacher": teacher_error, "student": round(error, 6)},
        }
        if not self.plan.cell.transition:
            return result
        result["mte_asked"] = {"images": scale.mte_images, "steps": scale.mte_steps}
        if len(agreed):
            images = spec.normalise(test.pixels(agreed[: scale.mte_images], spec).to(device))
            found = mean_transition_error(student, teacher, images, steps=scale.mte_steps, batch=250)
            curves = {"student": found.followed, "teacher": found.other}
            result["mte"] = round(found.error, 6)
            result["mte_measured_on"] = {"images": found.images, "steps": found.steps, "step_size": found.step_size}
            result["transition_curves"] = {
                name: [round(p, 5) for p in curve.tolist()] for name, curve in curves.items()
            }
        return result
