"""One trial of a search: a process that NNI starts. It asks NNI for parameters and reports its result to NNI.

It reads the job's folder alone, so that it can run on another machine: ``job.json``, ``recipe.yml``, the probe set, and
copies of the files that the recipe names.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import psutil
import yaml
from torch import Tensor

from zskd_nni.data.sources import TransferSource
from zskd_nni.models.onnx_export import export_onnx, run_onnx
from zskd_nni.pipeline import Run
from zskd_nni.pipeline.export import INTEGERS, STUDENT, export_integers, integer_answers
from zskd_nni.pipeline.search.probe_set import load_probe
from zskd_nni.recipes.load import LoadedRecipe, check_recipe
from zskd_nni.recipes.search_space import flat_parameters, with_parameters
from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import fingerprint_of, make_folder, read_json
from zskd_nni.training.inference import logits_on
from zskd_nni.training.metrics import accuracy

JOB, RECIPE, PROBE = "job.json", "recipe.yml", "probe.safetensors"
OVER_BUDGET = "over budget"


@dataclass(frozen=True)
class Deployable:
    """A student as it would be deployed.

    Attributes:
        file: the ONNX file whose size counts.
        answer: gives the logits ``(N, K)`` of images ``(N, C, H, W)`` by which the student is measured.
        note: a remark on the size, or empty.
    """

    file: Path
    answer: Callable[[Tensor], Tensor]
    note: str = ""


class StudentRun(Run):
    """A recipe up to the student's file: no controls, no held-out impressions, no report.

    Args:
        shared: a folder in which trials share equal transfer sets; None for a transfer set of its own.
        loaded: the recipe.
        out: created if it is not there.
        options: of :class:`zskd_nni.pipeline.Run`.
    """

    looks = False

    def __init__(self, shared: Path | None, loaded: LoadedRecipe, out: Path, **options: Any) -> None:
        super().__init__(loaded, out, **options)
        self.shared = shared

    def deployable(self, images: Tensor) -> Deployable:
        """Make the student and the one file that would be deployed, checked on ``images``.

        It is the int8 file if the recipe's quantizer can be exported to one. A student of another quantizer is
        measured in NNI's simulation, because no file computes the same.
        """
        make_folder(self.out)
        spec, plain = self.teacher.spec, self.out / STUDENT
        with _exclusive(self.out.with_suffix(".lock")), self.owned():
            student = self.students.make("student", self.transfer())
            self.teacher.to("cpu")
            self.save_student(student)
            quantization, integers = student.quantization, self.out / INTEGERS
            if quantization is not None and export_integers(quantization, spec, integers, images)["exported"]:
                return Deployable(integers, functools.partial(run_onnx, integers))
            export_onnx(student.network, spec, plain, images)
            if quantization is None:
                return Deployable(plain, functools.partial(run_onnx, plain))
            note = f"{quantization.quantizer} is simulated, the bytes are those of the fp32 file"
            return Deployable(plain, integer_answers(quantization, spec), note)

    def transfer(self) -> TransferSource:
        """The transfer source; of trials with equal transfer sets, the first makes it and the others wait for it."""
        if self.shared is None:
            return super().transfer()
        section = self.recipe.transfer.model_dump(mode="json", exclude={"held_out"})
        folder = make_folder(self.shared / fingerprint_of([self.teacher.fingerprint, section, self.recipe.seed])[:16])
        here = self.out / "impressions"
        with contextlib.suppress(FileExistsError):
            here.symlink_to(os.path.relpath(folder, self.out), target_is_directory=True)
        with _exclusive(folder.with_suffix(".lock")):
            return super().transfer()


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Wait until no other process is in this block with the same ``path``."""
    lock = filelock.FileLock(path)
    while not lock.is_locked:
        signals.check()
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(timeout=0.5)
    try:
        yield
    finally:
        lock.release()


def run_trial(job_folder: Path) -> None:
    """Ask NNI for parameters, make the student, report its figures.

    Args:
        job_folder: as :class:`zskd_nni.pipeline.search.experiment.Search` wrote it.

    Raises:
        UserError: the reason why the trial failed; it is also reported to NNI.
    """
    import nni

    _end_with_the_manager()
    started = time.monotonic()
    job = read_json(job_folder / JOB)
    given = nni.get_next_parameter()
    if given is None:
        raise UserError("NNI gave this trial no parameters; zskd-nni trial is only meant to be run by zskd-nni search.")
    flat = flat_parameters(job["space"], given)
    report: dict[str, Any] = {"default": 0.0, "parameters": flat, "given": given}
    with contextlib.suppress(UserError):  # raised again below; and without a recipe no image is read
        report["data_free"] = trial_recipe(job_folder, job, flat).recipe.transfer.data_free
    nni.report_intermediate_result(report)
    try:
        report.update(measure(job_folder, job, flat))
    except Exception as error:  # whatever it is, it ends this trial and not the search
        report.update(failed=reason_of(error), seconds=round(time.monotonic() - started, 1))
        nni.report_intermediate_result(report)
        raise
    nni.report_final_result({**report, "seconds": round(time.monotonic() - started, 1)})


def measure(job_folder: Path, job: dict[str, Any], flat: dict[str, Any]) -> dict[str, Any]:
    """Make the student of a set of parameters and measure its deployable file.

    Args:
        job_folder: of the search.
        job: content of ``job.json``.
        flat: key paths of the recipe and values.

    Returns:
        ``default`` (the value that NNI's tuner maximises), ``objective`` (in percent), ``bytes``, ``file``, ``folder``,
        ``status``, ``data_free`` (whether the student was trained on no real image), ``note`` (a remark on the size, or
        None).
    """
    loaded = trial_recipe(job_folder, job, flat)
    out = Path(job["trials"] or os.environ["NNI_OUTPUT_DIR"]) / fingerprint_of(flat)[:12]
    shared, root = (None if job[name] is None else Path(job[name]) for name in ("shared", "root"))
    run = StudentRun(shared, loaded, out, device=job["device"], root=root, quiet=True)
    spec, probe = run.teacher.spec, load_probe(job_folder / PROBE)
    student = run.deployable(probe.pixels(slice(None), spec))
    size = student.file.stat().st_size
    data = probe if job["objective"] == "agreement" else loaded.evaluation_data(run.teacher, root)
    objective = accuracy(logits_on(student.answer, data, spec), data.labels)
    over = job["max_bytes"] is not None and size > job["max_bytes"]
    return {
        # Above the budget every value is below every one within it, and the lower the larger the file.
        "default": -size / job["max_bytes"] if over else objective,
        "objective": round(objective, 4),
        "bytes": size,
        "file": student.file.name,
        "folder": out.name,
        "status": OVER_BUDGET if over else "done",
        "data_free": loaded.recipe.transfer.data_free,
        "note": student.note or None,
    }


def trial_recipe(job_folder: Path, job: dict[str, Any], flat: dict[str, Any]) -> LoadedRecipe:
    """The job's recipe with parameters at their key paths; the files that they name are found from the job's folder.

    Raises:
        UserError: the result is no recipe.
    """
    source = yaml.safe_load((job_folder / RECIPE).read_text())
    moved = {(choice["path"], repr(choice["value"])): choice["moved"] for choice in job["choices"]}
    flat = {path: moved.get((path, repr(value)), value) for path, value in flat.items()}
    try:
        changed = with_parameters(source, flat)
    except ValueError as error:
        raise UserError(f"{error}.") from error
    return LoadedRecipe(check_recipe(changed, "the trial's recipe"), job_folder, changed)


def reason_of(error: BaseException) -> str:
    """The reason why a trial failed, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _end_with_the_manager() -> None:
    """End this process when NNI's manager has been killed; otherwise the manager ends its trials itself."""
    manager = os.environ.get("ZSKD_NNI_MANAGER_PID")
    if manager is None:
        return

    def watch() -> None:
        while psutil.pid_exists(int(manager)):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)  # for what is being written
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
