"""One trial of a search: a process that NNI starts, asks for parameters, and hears the result from.

It knows the job's folder only, so that it can run on another machine: ``job.json``, ``recipe.yml``, the probe set, and
copies of what the recipe reads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
import yaml
from torch import Tensor

from zskd_nni.data.datasets import load_images
from zskd_nni.data.sources import TransferSource
from zskd_nni.methods.registry import find_method, is_data_free
from zskd_nni.models.onnx_export import export_onnx, run_onnx
from zskd_nni.pipeline import Run
from zskd_nni.pipeline.export import INTEGERS, STUDENT, export_integers, integer_answers
from zskd_nni.recipes.load import LoadedRecipe, check_recipe
from zskd_nni.recipes.schema import Recipe
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
        file: whose size counts.
        answer: logits ``(N, K)`` of images ``(N, C, H, W)``, by which it is judged.
        note: what the size does not tell; empty where there is nothing.
    """

    file: Path
    answer: Callable[[Tensor], Tensor]
    note: str = ""


class StudentRun(Run):
    """A recipe up to the student's file: no controls, no held-out impressions, no report.

    Args:
        shared: a folder in which trials with the same transfer set find it made; None keeps it to the run.
        loaded: the recipe.
        out: made if need be.
        options: as of :class:`zskd_nni.pipeline.Run`.
    """

    def __init__(self, shared: Path | None, loaded: LoadedRecipe, out: Path, **options: Any) -> None:
        super().__init__(loaded, out, **options)
        self.shared = shared

    def deployable(self, images: Tensor) -> Deployable:
        """Make the student and the one file that would be deployed, checked on ``images``.

        It is the integer file where the recipe has a quantizer that can be said in integers. A student of another
        quantizer is judged by NNI's simulation: there is no file that answers so.
        """
        make_folder(self.out)
        spec, plain = self.teacher.spec, self.out / STUDENT
        with _alone(self.out.with_suffix(".lock")), self.owned():
            made = self.students.make("student", self.transfer())
            self.teacher.to("cpu")
            self.save_student(made)
            if made.quantization is None:
                export_onnx(made.network, spec, plain, images)
                return Deployable(plain, lambda batch: run_onnx(plain, batch))
            integers = self.out / INTEGERS
            if export_integers(made.quantization, spec, integers, images)["exported"]:
                return Deployable(integers, lambda batch: run_onnx(integers, batch))
            export_onnx(made.network, spec, plain, images)
            note = f"{made.quantization.quantizer} is simulated, the bytes are those of the fp32 file"
            return Deployable(plain, integer_answers(made.quantization, spec), note)

    def transfer(self) -> TransferSource:
        """The transfer source; of trials that want the same set, the first makes it and the others wait for it."""
        if self.shared is None:
            return super().transfer()
        section = self.recipe.transfer.model_dump(mode="json", exclude={"held_out"})
        folder = make_folder(self.shared / fingerprint_of([self.teacher.fingerprint, section, self.recipe.seed])[:16])
        here = self.out / "impressions"
        with contextlib.suppress(FileExistsError):
            here.symlink_to(os.path.relpath(folder, self.out), target_is_directory=True)
        with _alone(folder.with_suffix(".lock")):
            return super().transfer()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process is in this block with the same ``path``."""
    lock = filelock.FileLock(path)
    while True:
        signals.check()
        try:
            lock.acquire(timeout=0.5)
            break
        except filelock.Timeout:
            continue
    try:
        yield
    finally:
        lock.release()


def run_trial(job_folder: Path) -> None:
    """Ask NNI for parameters, make the student, report.

    Args:
        job_folder: as :class:`zskd_nni.pipeline.search.experiment.Search` wrote it.

    Raises:
        UserError: why the trial failed; NNI was told as well.
    """
    import nni

    _end_with_the_manager()
    started = time.monotonic()
    job = read_json(job_folder / JOB)
    given = nni.get_next_parameter()
    if given is None:
        raise UserError("NNI gave this trial no parameters; zskd-nni trial is only meant to be run by zskd-nni search.")
    flat = flat_parameters(job["space"], given)
    told: dict[str, Any] = {"default": 0.0, "parameters": flat, "given": given}
    with contextlib.suppress(UserError):  # it is said below; and what makes no recipe reads no image
        told["data_free"] = learns_data_free(recipe_with(job_folder, job, flat).recipe)
    nni.report_intermediate_result(told)
    try:
        result = measure(job_folder, job, flat)
    except Exception as error:  # whatever it is, it is this trial's and does not end the search
        told.update(failed=reason_of(error), seconds=round(time.monotonic() - started, 1))
        nni.report_intermediate_result(told)
        raise
    nni.report_final_result({**told, **result, "seconds": round(time.monotonic() - started, 1)})


def measure(job_folder: Path, job: dict[str, Any], flat: dict[str, Any]) -> dict[str, Any]:
    """Make the student of a set of parameters and measure its deployable file.

    Args:
        job_folder: of the search.
        job: content of ``job.json``.
        flat: key paths of the recipe and values.

    Returns:
        ``default`` (what NNI's tuner maximises), ``objective`` (in percent), ``bytes``, ``file``, ``status``,
        ``data_free`` (of what the student learnt on), ``note`` (what the bytes do not tell, or None).
    """
    loaded = recipe_with(job_folder, job, flat)
    out = Path(job["trials"] or os.environ["NNI_OUTPUT_DIR"]) / fingerprint_of(flat)[:12]
    shared = None if job["shared"] is None else Path(job["shared"])
    root = None if job["root"] is None else Path(job["root"])
    run = StudentRun(shared, loaded, out, device=job["device"], root=root, quiet=True)
    from zskd_nni.pipeline.search.probe_set import load_probe

    images, classes = load_probe(job_folder / PROBE, run.teacher.spec)
    made = run.deployable(images)
    size = made.file.stat().st_size
    if job["objective"] == "accuracy":
        assert loaded.recipe.evaluation is not None
        data = load_images(str(loaded.data_name()), loaded.recipe.evaluation.split, root)
        objective = accuracy(logits_on(made.answer, data, run.teacher.spec), data.labels)
    else:
        with torch.no_grad():
            parts = [made.answer(part) for part in images.split(run.teacher.spec.measuring_batch)]
        objective = accuracy(torch.cat(parts), classes)
    over = job["max_bytes"] is not None and size > job["max_bytes"]
    return {
        # Above the budget every value is below every one within it, and the lower the larger the file.
        "default": -size / job["max_bytes"] if over else objective,
        "objective": round(objective, 4),
        "bytes": size,
        "file": made.file.name,
        "folder": out.name,
        "status": OVER_BUDGET if over else "done",
        "data_free": learns_data_free(loaded.recipe),
        "note": made.note or None,
    }


def learns_data_free(recipe: Recipe) -> bool:
    """Whether a recipe's student learns on no real image."""
    return is_data_free(find_method(recipe.transfer.method), recipe.transfer.options())


def recipe_with(job_folder: Path, job: dict[str, Any], flat: dict[str, Any]) -> LoadedRecipe:
    """The job's recipe with parameters in their places; files that they name are meant from the job's folder.

    Raises:
        UserError: together they make no recipe.
    """
    source = yaml.safe_load((job_folder / RECIPE).read_text())
    moved = {(one["path"], repr(one["value"])): one["moved"] for one in job["choices"]}
    try:
        changed = with_parameters(source, {path: moved.get((path, repr(one)), one) for path, one in flat.items()})
    except ValueError as error:
        raise UserError(f"{error}.") from error
    return LoadedRecipe(check_recipe(changed, "the trial's recipe"), job_folder, changed)


def reason_of(error: BaseException) -> str:
    """One line that says why a trial failed."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _end_with_the_manager() -> None:
    """NNI's manager ends its trials, unless it is killed; then a local trial ends itself."""
    manager = os.environ.get("ZSKD_NNI_MANAGER_PID")
    if manager is None:
        return

    def watch() -> None:
        while True:
            time.sleep(1)
            try:
                os.kill(int(manager), 0)
            except ProcessLookupError:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)  # for what is being written
                os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
