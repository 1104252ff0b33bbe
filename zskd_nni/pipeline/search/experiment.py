"""``zskd-nni search``: an NNI experiment over a recipe, measured without data.

    recipe + search section -> job folder (recipe, probe set) -> NNI's manager, tuner, trials -> trials.json, best.yml

Trials are processes of their own (:mod:`zskd_nni.pipeline.search.trial`), wherever NNI's training service starts them.
All of them are measured on the same images, :mod:`zskd_nni.pipeline.search.probe_set`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from zskd_nni.data.datasets import NAMED_SETS
from zskd_nni.models.build import code_fingerprint, network_fingerprint
from zskd_nni.pipeline.search.job import check_files_can_be_copied, file_hashes, relocated, relocated_choices
from zskd_nni.pipeline.search.nni_config import experiment_config, is_local, remembering, tuner_config
from zskd_nni.pipeline.search.nni_manager import LOOPBACK, Manager
from zskd_nni.pipeline.search.probe_set import save_probe
from zskd_nni.pipeline.search.space_check import check_key_paths, check_pairs, check_values, problem_with
from zskd_nni.pipeline.search.trial import JOB, OVER_BUDGET, PROBE, RECIPE
from zskd_nni.pipeline.search.trial_table import is_table, on_real_images, remarks, subject_of
from zskd_nni.recipes.load import LoadedRecipe
from zskd_nni.recipes.search_space import with_parameters
from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import make_folder, read_json, write_atomic, write_json
from zskd_nni.runtime.locks import only_writer
from zskd_nni.runtime.run_identity import RUN_FORMAT, resume_or_refuse

SEARCH, TRIALS, BEST, PROPOSED = "search.json", "trials.json", "best.yml", "proposed.jsonl"
_SECONDS_BETWEEN_POLLS = 0.5
_PATIENCE = 10  # polls in which the manager may be silent, or a finished trial without its result
_CANCELLED = {"USER_CANCELED", "SYS_CANCELED", "EARLY_STOPPED"}
_FINISHED = {"SUCCEEDED", "FAILED", *_CANCELLED}


class Search:
    """One search in one output folder.

    Args:
        loaded: a recipe with a ``search`` section.
        out: created if it is not there; the folder of another search is refused.
        device: of the trials.
        threads: of each trial; the cores divided among them where absent.
        root: where real test data is, for the objective ``accuracy``.
        portal: open NNI's web portal to the network.
        port: of NNI's web server; a free one where absent.
        quiet: no progress.

    Raises:
        UserError: a mistake that can be known before the first trial.
    """

    def __init__(
        self,
        loaded: LoadedRecipe,
        out: str | Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        root: Path | None = None,
        portal: bool = False,
        port: int | None = None,
        quiet: bool = False,
    ) -> None:
        if loaded.recipe.search is None:
            raise UserError(f"The recipe {loaded.recipe.name} has no search section with a space to search.")
        self.loaded, self.section = loaded, loaded.recipe.search
        self.out = Path(out).resolve()
        self.device, self.portal, self.port, self.quiet = device, portal, port, quiet
        self.threads = threads or max(1, len(os.sched_getaffinity(0)) // self.section.concurrency)
        self.root = None if root is None else root.resolve()
        self.seed = loaded.recipe.seed if self.section.seed is None else self.section.seed
        self.teacher = loaded.teacher()
        self.job = self.out / "job"
        self._check()
        self.identity = {
            "recipe": loaded.recipe.model_dump(mode="json", exclude={"scales", "search"}),
            # A search may be given more trials, or continue on other machines.
            "search": self.section.model_dump(mode="json", exclude={"trials", "concurrency", "training_service"}),
            "teacher": self.teacher.fingerprint,
            "folder": str(self.out),
            "files": file_hashes(self._trial_recipe(), self.section.space),
            **self._student_identity(),
        }

    def _check(self) -> None:
        """Find every mistake that can be known before the first trial."""
        self._check_reachable()
        tuner = tuner_config(self.section, self.seed, self.loaded.base)
        with tempfile.TemporaryDirectory() as job:  # NNI requires an existing one
            experiment_config(self.section, Path(job), tuner, self.section.trials)
        if self.section.objective == "accuracy":
            if self.loaded.recipe.evaluation is None:
                raise UserError("search.objective: accuracy is measured on test data; name it in evaluation.data.")
            self.loaded.evaluation_data(self.teacher, self.root)
        check_key_paths(self.section)
        check_values(self.loaded, self.section.space, self.out)
        check_pairs(self.section.space, functools.partial(problem_with, self.loaded))
        if not is_local(self.section):
            check_files_can_be_copied(self._trial_recipe(), self.section.space)

    def _check_reachable(self) -> None:
        service = self.section.training_service
        if not service.get("platform"):
            raise UserError("search.training_service names no platform; {platform: local} is this machine.")
        if is_local(self.section) or self.portal:
            return
        if service.get("nni_manager_ip", service.get("nniManagerIp")) not in (LOOPBACK, "localhost"):
            raise UserError(
                f"search.training_service: trials on {service.get('platform')} call back to this machine, where NNI's "
                "server accepts no connection; open it with --portal (whoever learns its address can then control the "
                f"search), or forward a --port of your choice from there yourself and set nni_manager_ip: {LOOPBACK}."
            )

    def _student_identity(self) -> dict[str, str]:
        """Fingerprints of the student's code and weights, which may change while the recipe stays."""
        section = self.loaded.recipe.student
        if section is None:
            return {}
        found: dict[str, str] = {}
        # The recipe alone may lack a factory, or arguments of it, that the space provides.
        with contextlib.suppress(UserError):
            if (code := code_fingerprint(section.model, self.loaded.base)) is not None:
                found["code"] = code
        with torch.random.fork_rng(devices=[]), contextlib.suppress(UserError):
            torch.manual_seed(self.seed)
            found["student"] = network_fingerprint(self.loaded.network(section))
        return found

    def run(self) -> dict[str, Any]:
        """Run the missing trials; returns the content of ``trials.json``.

        Raises:
            UserError: NNI fails, or no trial makes a student within the budget.
        """
        make_folder(self.out)
        with only_writer(self.out):
            self._claim()
            table = self._known_table()
            if len(table["trials"]) < self.section.trials:
                self._write_job()
                table = self._experiment(table["trials"])
        return self._conclude(table)

    def _claim(self) -> None:
        resume_or_refuse(self.out, SEARCH, "search", self.identity)
        write_json(self.out / SEARCH, {"format": RUN_FORMAT, "identity": self.identity})

    def _known_table(self) -> dict[str, Any]:
        path = self.out / TRIALS
        table = read_json(path) if path.exists() else self._table([])
        if not is_table(table):
            raise UserError(f"{path} is incomplete; remove it, and its trials are run again.")
        return dict(table)

    def _write_job(self) -> None:
        make_folder(self.job)
        local, recipe = is_local(self.section), self._trial_recipe()
        save_probe(self.job / PROBE, self.teacher.to(self.device), self.section.probe, self.seed)
        self.teacher.to("cpu")
        write_atomic(self.job / RECIPE, yaml.safe_dump(relocated(recipe, self.job, not local), sort_keys=False))
        job = {
            "space": self.section.space,
            "choices": relocated_choices(recipe, self.section.space, self.job, copy_files=not local),
            "objective": self.section.objective,
            "max_bytes": self.section.max_bytes,
            "device": self.device,
            "threads": self.threads,
            "root": None if self.root is None or not local else str(self.root),
            "shared": str(make_folder(self.out / "impressions")) if local else None,
            "trials": str(make_folder(self.out / "trials")) if local else None,
        }
        write_json(self.job / JOB, job)

    def _trial_recipe(self) -> LoadedRecipe:
        """The recipe without what trials leave out."""
        source = {**self.loaded.source, "controls": []}
        if self.section.objective == "agreement":
            source["evaluation"] = None  # no trial opens a real sample, and none is copied anywhere
        return replace(self.loaded, source=source)

    def _experiment(self, before: list[dict[str, Any]]) -> dict[str, Any]:
        """Run NNI for the missing trials."""
        folder = make_folder(self.out / "nni")
        folder.chmod(0o700)  # the logs name the portal's address
        known, unfinished = self._history(before)
        tuner = tuner_config(self.section, self.seed + len(before), self.loaded.base)
        proposed = str(self.out / PROPOSED)
        tuner = remembering(tuner, folder, known=known, unfinished=unfinished, proposed=proposed)
        config = experiment_config(self.section, self.job, tuner, self.section.trials - len(before))
        paths = [] if self.loaded.base is None else [str(self.loaded.base)]
        manager = Manager(config, folder, portal=self.portal, port=self.port, paths=[*paths, os.getcwd()])
        try:
            manager.start()
            if self.portal:
                print(
                    "--portal: NNI's web portal is open on every network interface of this machine, without a "
                    f"password; whoever learns this address can read, change and stop the search: {manager.address}",
                    file=sys.stderr,
                )
            elif not self.quiet:
                print(f"NNI's web portal, for you on this machine alone: {manager.address}", file=sys.stderr)
            return self._follow(manager, before)
        finally:
            manager.stop()

    def _history(self, before: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Input of the tuner: finished trials with their values, and proposals that were not finished."""
        ended = [row["given"] for row in before]
        known = [{"parameter": row["given"], "value": row["value"]} for row in before if row["value"] is not None]
        unfinished: list[dict[str, Any]] = []
        path = self.out / PROPOSED
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            try:
                given = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a tuner that was killed
            if given in ended:
                ended.remove(given)
            elif isinstance(given, dict) and given not in unfinished:
                unfinished.append(given)
        return known, unfinished

    def _follow(self, manager: Manager, before: list[dict[str, Any]]) -> dict[str, Any]:
        """Wait for the trials; write the table and show each row as it comes."""
        silent = late = idle = 0
        table = self._table(before)
        while True:
            signals.check()
            manager.remember_processes()
            try:
                status = manager.experiment.get_status()
                jobs = manager.experiment.list_trial_jobs()
                metrics = manager.experiment.get_job_metrics()
                silent = 0
            except OSError as error:  # of requests: the manager is busy, or has ended
                silent += 1
                if silent < _PATIENCE and manager.is_alive():
                    time.sleep(_SECONDS_BETWEEN_POLLS)
                    continue
                raise UserError(
                    f"NNI's manager ended or does not respond; its log is {manager.log}. What was finished is kept, "
                    "the same command continues from there."
                ) from error
            # A trial's result may arrive a moment after its end, and so may the tuner's next proposal.
            missing = any(job.status == "SUCCEEDED" and not _final(metrics.get(job.trialJobId, [])) for job in jobs)
            late = late + 1 if missing else 0
            running = any(job.status not in _FINISHED for job in jobs)
            idle = idle + 1 if status == "TUNER_NO_MORE_TRIAL" and not running else 0
            if not missing or late >= _PATIENCE:
                table = self._extended(table, manager, jobs, metrics)
                if status == "DONE" or idle >= _PATIENCE:
                    return table
            if status == "ERROR":
                raise UserError(f"NNI's manager reports an error; its log is {manager.log}.")
            time.sleep(_SECONDS_BETWEEN_POLLS)

    def _extended(self, table: dict[str, Any], manager: Manager, jobs: list[Any], metrics: Any) -> dict[str, Any]:
        """The table with the trials that have finished meanwhile."""
        known = {row["id"] for row in table["trials"]}
        ended = sorted((job for job in jobs if job.status in _FINISHED), key=lambda job: job.endTime or 0)
        rows = [self._row(manager, job, metrics.get(job.trialJobId, [])) for job in ended]
        if new := [row for row in rows if row["id"] not in known]:
            table = self._table([*table["trials"], *new])
            write_json(self.out / TRIALS, table)
            for row in table["trials"][-len(new) :]:
                self._show(row)
        return table

    def _row(self, manager: Manager, job: Any, metrics: list[Any]) -> dict[str, Any]:
        final = _final(metrics)
        reports = [metric.data for metric in metrics if metric.type == "PERIODICAL" and isinstance(metric.data, dict)]
        report = final or (reports[-1] if reports else {})
        status, reason = report.get("status", "failed"), report.get("failed")
        if job.status in _CANCELLED:
            status, reason = "failed", "it was cancelled in NNI's web portal"
        elif final is None and reason is None:
            log = f"nni/{manager.name}/environments/local-env/trials/{job.trialJobId}/trial.stderr"
            reason = "its process ended without a result" + (f"; see {log}" if (self.out / log).exists() else "")
        elif status == OVER_BUDGET:
            reason = f"{report['bytes']:,} bytes, {self.section.max_bytes:,} allowed"
        copied = ("objective", "bytes", "seconds", "note", "data_free", "given")
        return {
            "number": 0,  # given by the table
            "id": f"{manager.name}/{job.trialJobId}",
            "status": status,
            "parameters": report.get("parameters", {}),
            "file": None if final is None else f"trials/{report['folder']}/{report['file']}",
            "reason": reason,
            "value": None if final is None else final["default"],
            **{name: report.get(name) for name in copied},
        }

    def _table(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        numbered = [{**row, "number": number} for number, row in enumerate(rows, 1)]
        done = [row for row in numbered if row["status"] == "done"]
        best = min(done, key=lambda row: (-row["objective"], row["bytes"], row["number"]), default=None)
        agreement = self.section.objective == "agreement"
        return {
            "name": self.loaded.recipe.name,
            "objective": self.section.objective,
            "objective_on": f"the probe set ({self.section.probe:,} images made from the teacher)"
            if agreement
            else f"real images ({self._measured_on()}): NOT data-free",
            "data_free": agreement and not on_real_images(numbered),
            "max_bytes": self.section.max_bytes,
            "best": None if best is None else best["number"],
            "trials": numbered,
        }

    def _measured_on(self) -> str:
        """A short description of the data that the objective is measured on."""
        evaluation = self.loaded.recipe.evaluation
        if self.section.objective == "agreement" or evaluation is None:
            return "its probe set"
        return f"{evaluation.data}, {evaluation.split} split" if evaluation.data in NAMED_SETS else evaluation.data

    def _show(self, row: dict[str, Any]) -> None:
        if self.quiet:
            return
        figures = f"{self.section.objective} {row['objective']:.2f} %, {row['bytes']:,} bytes" if row["bytes"] else ""
        reason = row["reason"] if row["status"] == "failed" else ""
        text = ", ".join(filter(None, (row["status"], figures, reason, *remarks(row))))
        given = ", ".join(f"{path} {value}" for path, value in row["parameters"].items())
        print(f"trial {row['number']} of {self.section.trials}: {text} ({given})", file=sys.stderr, flush=True)

    def _conclude(self, table: dict[str, Any]) -> dict[str, Any]:
        """Write the best recipe."""
        if table["best"] is None:
            raise self._no_result(table["trials"])
        row, count, objective = table["trials"][table["best"] - 1], len(table["trials"]), self.section.objective
        chosen = replace(self.loaded, source=with_parameters(self.loaded.source, row["parameters"]))
        source = relocated(chosen, self.out)
        search = f"a search over {count} trial{'' if count == 1 else 's'}: {objective} on {self._measured_on()}"
        source["selected_on"] = "; then ".join(filter(None, (self.loaded.recipe.selected_on, search)))
        budget = "" if self.section.max_bytes is None else f" of {self.section.max_bytes:,} allowed"
        head = [
            f"Trial {row['number']} of {count} of zskd-nni search {self.loaded.recipe.name}:",
            f"{objective} {row['objective']:.2f} % on {table['objective_on']}, {row['bytes']:,} bytes{budget}.",
        ]
        if row.get("note"):
            head.append(f"{row['note']}.")
        real = on_real_images(table["trials"])
        if row["number"] in real:
            head.append("It reads real images: NOT data-free.")
        elif real:
            head.append(f"{subject_of(real)}, this one does not: the search is NOT data-free.")
        comment = "".join(f"# {line}\n" for line in head)
        write_atomic(self.out / BEST, comment + yaml.safe_dump(source, sort_keys=False))
        return table

    def _no_result(self, rows: list[dict[str, Any]]) -> UserError:
        over = [row for row in rows if row["status"] == OVER_BUDGET]
        if over:
            smallest = min(over, key=lambda row: row["bytes"])
            return UserError(
                f"search.max_bytes: no student of {len(rows)} trials is as small as {self.section.max_bytes:,} bytes; "
                f"the smallest, of trial {smallest['number']}, takes {smallest['bytes']:,}. All are in "
                f"{self.out / TRIALS}."
            )
        first = "".join(f" The first: {row['reason']}" for row in rows[:1])
        return UserError(f"No trial gave a result; all are in {self.out / TRIALS}.{first}")


def _final(metrics: list[Any]) -> dict[str, Any] | None:
    return next((metric.data for metric in metrics if metric.type == "FINAL"), None)
