"""``zskd-nni search``: an NNI experiment over a recipe, judged without data.

    recipe + search section -> job folder (recipe, probe set) -> NNI's manager, tuner, trials -> trials.json, best.yml

Trials are processes of their own (:mod:`zskd_nni.pipeline.search.trial`), wherever NNI's training service puts
them. All of them are judged by the same images, :mod:`zskd_nni.pipeline.search.probe_set`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from zskd_nni.data.datasets import NAMED_SETS, load_images
from zskd_nni.models.build import code_fingerprint, network_fingerprint
from zskd_nni.pipeline import Run
from zskd_nni.pipeline.search.job import check_carried, check_there, named_files, relocated, relocated_choices
from zskd_nni.pipeline.search.nni_config import check_config, experiment_config, is_local, remembering, tuner_config
from zskd_nni.pipeline.search.nni_manager import LOOPBACK, Manager
from zskd_nni.pipeline.search.probe_set import save_probe
from zskd_nni.pipeline.search.trial import JOB, OVER_BUDGET, PROBE, RECIPE
from zskd_nni.pipeline.search.trial_table import on_real_images, remarks, say_real
from zskd_nni.recipes.load import LoadedRecipe, check_recipe
from zskd_nni.recipes.schema import Recipe
from zskd_nni.recipes.search_space import corners, dimensions, pairs, with_parameters
from zskd_nni.runtime import signals
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import make_folder, read_json, write_atomic, write_json
from zskd_nni.runtime.locks import only_writer
from zskd_nni.runtime.run_identity import RUN_FORMAT, resume_or_refuse

SEARCH, TRIALS, BEST, PROPOSED = "search.json", "trials.json", "best.yml", "proposed.jsonl"
_POLL = 0.5
_MOST_TOGETHER = 400  # recipes of two values that are checked beforehand, some 20 ms each
_PATIENCE = 10  # polls in which the manager may be silent, or a finished trial without its result
_FINISHED = {"SUCCEEDED", "FAILED", "USER_CANCELED", "SYS_CANCELED", "EARLY_STOPPED"}


class Search:
    """One search in one output folder.

    Args:
        loaded: a recipe with a ``search`` section.
        out: made if need be; the folder of another search is refused.
        device: of the trials.
        threads: of each trial; the cores divided among them where absent.
        root: where real test data is, for the objective ``accuracy``.
        portal: open NNI's web portal to the network.
        port: of NNI's web server; a free one where absent.
        quiet: no progress.

    Raises:
        UserError: anything that is wrong and can be known beforehand.
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
        self._check_reachable()
        check_config(self.section, tuner_config(self.section, self.seed, loaded.base))
        self._check_objective()
        self._check_space()
        self._check_pairs()
        if not is_local(self.section):
            check_carried(self._handed(), self.section.space)
        # Where trials run and how many is no part of what is searched; so a search may move to other machines.
        search = self.section.model_dump(mode="json", exclude={"trials", "concurrency", "training_service"})
        self.identity = {
            "recipe": loaded.recipe.model_dump(mode="json", exclude={"scales", "search"}),
            "search": search,
            "teacher": self.teacher.fingerprint,
            "folder": str(self.out),
        }
        self.identity.update(self._student_identity())
        known = ("teacher", "student") if "student" in self.identity else ("teacher",)
        files = named_files(self._handed(), self.section.space, known)
        if files:
            self.identity["files"] = files

    def _student_identity(self) -> dict[str, str]:
        """The student's weights and code, which may change while the recipe stays."""
        section = self.loaded.recipe.student
        if section is None:
            return {}
        found: dict[str, str] = {}
        # The space may give what it lacks; without a factory there is no code, without its arguments no network.
        with contextlib.suppress(UserError):
            code = code_fingerprint(section.model, self.loaded.base)
            if code is not None:
                found["code"] = code
        with torch.random.fork_rng(devices=[]), contextlib.suppress(UserError):
            torch.manual_seed(self.seed)
            found["student"] = network_fingerprint(self.loaded.network(section))
        return found

    # What can be known beforehand.

    def _check_reachable(self) -> None:
        service = self.section.training_service
        if not service.get("platform"):
            raise UserError("search.training_service names no platform; {platform: local} is this machine.")
        if is_local(self.section) or self.portal:
            return
        if service.get("nni_manager_ip", service.get("nniManagerIp")) not in (LOOPBACK, "localhost"):
            raise UserError(
                f"search.training_service: trials on {service.get('platform')} call back to this machine, where NNI's "
                "server lets nobody in; open it with --portal (whoever learns its address can then steer the search), "
                f"or forward a --port of your choice from there yourself and set nni_manager_ip: {LOOPBACK}."
            )

    def _check_objective(self) -> None:
        if self.section.objective == "agreement":
            return
        name = self.loaded.data_name()
        if name is None:
            raise UserError("search.objective: accuracy is measured on test data; name it in evaluation.data.")
        assert self.loaded.recipe.evaluation is not None
        data = load_images(name, self.loaded.recipe.evaluation.split, self.root)
        data.require_labels(self.teacher.num_classes)
        data.pixels(slice(0, 1), self.teacher.spec)  # channels that do not fit are refused now

    def _check_space(self) -> None:
        """Every choice and both ends of every range, each alone, must make a recipe that can begin."""
        for one in dimensions(self.section.space):
            self._check_is_tried(one.path)
        for path, value, flat in corners(self.section.space):
            try:
                source, recipe = self._with(flat)
                check_there(LoadedRecipe(recipe, self.loaded.base, source))
                if path.split(".")[0] in ("compression", "student", "teacher"):
                    plain = recipe.model_copy(update={"evaluation": None})
                    Run(LoadedRecipe(plain, self.loaded.base, source), self.out, quiet=True)
            except (ValueError, UserError) as error:
                raise UserError(f"search.space.{path}: with {value!r}, {error}") from error

    def _check_is_tried(self, path: str) -> None:
        """Refuse to search what trials do not have."""
        first = path.split(".")[0]
        reasons = {
            "controls": "trials make no controls",
            "search": "a trial searches nothing itself",
            "scales": "a scale is put over a recipe before it is searched (--scale)",
        }
        if self.section.objective == "agreement":
            reasons["evaluation"] = "agreement is measured on the probe set, and no trial opens a real image"
        if first in reasons:
            raise UserError(f"search.space.{path} makes no difference to any trial: {reasons[first]}. Leave it out.")

    def _check_pairs(self) -> None:
        """A value must make a recipe with some value of every other key, or all trials that draw it fail.

        Recipes are checked until there have been many; what comes after is left to the trials.
        """
        known: dict[str, str] = {}

        def problem(flat: dict[str, Any]) -> str:
            key = repr(flat)
            if key not in known:
                if len(known) == _MOST_TOGETHER:
                    return ""
                known[key] = self._problem(flat)
            return known[key]

        for one, value, other, together in pairs(self.section.space):
            reason = ""
            for flat in together:
                reason = problem(flat)
                if not reason:
                    break
            if reason:
                nest = f"nest {other.path} under the choices of {one.path} that it goes with"
                raise UserError(
                    f"search.space.{other.path}: no value of it goes with {value!r} at {one.path} "
                    f"({reason.rstrip('.')}); {nest if one.kind == 'choice' else 'narrow one of the two'}."
                )

    def _with(self, flat: dict[str, Any]) -> tuple[dict[str, Any], Recipe]:
        source = with_parameters({**self.loaded.source, "search": None}, flat)
        return source, check_recipe(source, "the recipe becomes wrong")

    def _problem(self, flat: dict[str, Any]) -> str:
        """What is wrong with the recipe with these parameters, as far as the recipe alone tells; empty if nothing."""
        try:
            self._with(flat)
        except (ValueError, UserError) as error:
            return str(error)
        return ""

    # The search.

    def run(self) -> dict[str, Any]:
        """Run what is missing; returns the content of ``trials.json``.

        Raises:
            UserError: NNI fails, or no trial comes to a student within the budget.
        """
        make_folder(self.out)
        with only_writer(self.out):
            self._claim()
            table = self._known_table()
            if len(table["trials"]) < self.section.trials:
                self._prepare()
                table = self._experiment(table["trials"])
        return self._conclude(table)

    def _claim(self) -> None:
        resume_or_refuse(self.out, SEARCH, "search", self.identity)
        write_json(self.out / SEARCH, {"format": RUN_FORMAT, "identity": self.identity})

    def _known_table(self) -> dict[str, Any]:
        path = self.out / TRIALS
        if not path.exists():
            return self._table([])
        table = read_json(path)
        rows = table.get("trials") if isinstance(table, dict) else None
        best = table.get("best") if isinstance(table, dict) else None
        whole = isinstance(rows, list) and all(map(_is_row, rows))
        if not whole or not (best is None or (isinstance(best, int) and 0 < best <= len(rows or ()))):
            raise UserError(f"{path} is not whole; remove it, and its trials are run again.")
        return dict(table)

    def _prepare(self) -> None:
        """Write the job's folder."""
        make_folder(self.job)
        local = is_local(self.section)
        save_probe(self.job / PROBE, self.teacher.to(self.device), self.section.probe, self.seed)
        self.teacher.to("cpu")
        source = relocated(self._handed(), self.job, carry=not local)
        write_atomic(self.job / RECIPE, yaml.safe_dump(source, sort_keys=False))
        job = {
            "space": self.section.space,
            "choices": relocated_choices(self._handed(), self.section.space, self.job, carry=not local),
            "objective": self.section.objective,
            "max_bytes": self.section.max_bytes,
            "device": self.device,
            "threads": self.threads,
            "root": None if self.root is None or not local else str(self.root),
            "shared": str(make_folder(self.out / "impressions")) if local else None,
            "trials": str(make_folder(self.out / "trials")) if local else None,
        }
        write_json(self.job / JOB, job)

    def _handed(self) -> LoadedRecipe:
        """The recipe as trials get it."""
        source = {**self.loaded.source, "controls": []}
        if self.section.objective == "agreement":
            source["evaluation"] = None  # no trial opens a real sample, and none is carried anywhere
        return replace(self.loaded, source=source)

    def _experiment(self, before: list[dict[str, Any]]) -> dict[str, Any]:
        """Run NNI for the trials that are missing."""
        folder = make_folder(self.out / "nni")
        folder.chmod(0o700)  # the logs name the portal's address
        tuner = tuner_config(self.section, self.seed + len(before), self.loaded.base)
        tuner = remembering(tuner, folder, *self._history(before), self.out / PROPOSED)
        config = experiment_config(self.section, self.job, tuner, self.section.trials - len(before))
        paths = [] if self.loaded.base is None else [str(self.loaded.base)]
        manager = Manager(config, folder, portal=self.portal, port=self.port, paths=[*paths, os.getcwd()])
        try:
            manager.start()
            self._say_where(manager)
            return self._follow(manager, before)
        finally:
            manager.stop()

    def _history(self, before: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """What the tuner shall know: finished trials with their values, and proposals that were not finished."""
        ended = [row["given"] for row in before]
        known = [{"parameter": row["given"], "value": row["value"]} for row in before if row["value"] is not None]
        again: list[dict[str, Any]] = []
        path = self.out / PROPOSED
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            try:
                given = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a tuner that was killed
            if not isinstance(given, dict):
                continue
            if given in ended:
                ended.remove(given)
            elif given not in again:
                again.append(given)
        return known, again

    def _say_where(self, manager: Manager) -> None:
        if self.portal:
            print(
                "--portal: NNI's web portal is open on every network interface of this machine, without a password; "
                f"whoever learns this address can read, change and stop the search: {manager.address}",
                file=sys.stderr,
            )
        elif not self.quiet:
            print(f"NNI's web portal, for you on this machine alone: {manager.address}", file=sys.stderr)

    def _follow(self, manager: Manager, before: list[dict[str, Any]]) -> dict[str, Any]:
        """Wait for the trials, keep the table, say what happens."""
        silent = late = idle = 0
        table = self._table(before)
        while True:
            signals.check()
            manager.watch()
            try:
                status = manager.experiment.get_status()
                jobs = manager.experiment.list_trial_jobs()
                metrics = manager.experiment.get_job_metrics()
                silent = 0
            except OSError as error:  # of requests: the manager is busy, or gone
                silent += 1
                if silent < _PATIENCE and manager.is_alive():
                    time.sleep(_POLL)
                    continue
                raise UserError(
                    f"NNI's manager ended or does not answer; its log is {manager.log}. What was finished is kept, the "
                    "same command goes on from there."
                ) from error
            # A trial's result may arrive a moment after its end, and so may the tuner's next proposal.
            missing = any(job.status == "SUCCEEDED" and not _final(metrics.get(job.trialJobId, [])) for job in jobs)
            late = late + 1 if missing else 0
            running = any(job.status not in _FINISHED for job in jobs)
            idle = idle + 1 if status == "TUNER_NO_MORE_TRIAL" and not running else 0
            if not missing or late >= _PATIENCE:
                table = self._seen(manager, table, [(job, metrics.get(job.trialJobId, [])) for job in jobs])
                if status == "DONE" or idle >= _PATIENCE:
                    return table
            if status == "ERROR":
                raise UserError(f"NNI's manager reports an error; its log is {manager.log}.")
            time.sleep(_POLL)

    def _seen(self, manager: Manager, table: dict[str, Any], jobs: list[tuple[Any, list[Any]]]) -> dict[str, Any]:
        """The table with what has finished meanwhile."""
        ended = sorted((pair for pair in jobs if pair[0].status in _FINISHED), key=lambda pair: pair[0].endTime or 0)
        known = {row["id"] for row in table["trials"]}
        new = [
            self._row(manager, job, metrics)
            for job, metrics in ended
            if f"{manager.name}/{job.trialJobId}" not in known
        ]
        if not new:
            return table
        count = len(table["trials"])
        table = self._table([*table["trials"], *new])
        write_json(self.out / TRIALS, table)
        for row in table["trials"][count:]:
            self._say(row)
        return table

    def _row(self, manager: Manager, job: Any, metrics: list[Any]) -> dict[str, Any]:
        final = _final(metrics)
        reports = [metric.data for metric in metrics if metric.type == "PERIODICAL" and isinstance(metric.data, dict)]
        told = final or (reports[-1] if reports else {})
        status, reason = told.get("status", "failed"), told.get("failed")
        if job.status in ("USER_CANCELED", "SYS_CANCELED", "EARLY_STOPPED"):
            status, reason = "failed", "it was cancelled in NNI's web portal"
        elif final is None and reason is None:
            log = f"nni/{manager.name}/environments/local-env/trials/{job.trialJobId}/trial.stderr"
            where = f"; see {log}" if (self.out / log).exists() else ""
            reason = f"its process ended without a result{where}"
        elif status == OVER_BUDGET:
            reason = f"{told['bytes']:,} bytes, {self.section.max_bytes:,} allowed"
        return {
            "number": 0,
            "id": f"{manager.name}/{job.trialJobId}",
            "status": status,
            "parameters": told.get("parameters", {}),
            "objective": told.get("objective"),
            "bytes": told.get("bytes"),
            "file": None if final is None else f"trials/{told['folder']}/{told['file']}",
            "seconds": told.get("seconds"),
            "reason": reason,
            "note": told.get("note"),
            "data_free": told.get("data_free"),
            "given": told.get("given"),
            "value": None if final is None else final["default"],
        }

    def _table(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        numbered = [{**row, "number": number} for number, row in enumerate(rows, 1)]
        good = [row for row in numbered if row["status"] == "done"]
        best = min(good, key=lambda row: (-row["objective"], row["bytes"], row["number"]), default=None)
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
        """What the objective is measured on, in few words."""
        evaluation = self.loaded.recipe.evaluation
        if self.section.objective == "agreement" or evaluation is None:
            return "its probe set"
        return f"{evaluation.data}, {evaluation.split} split" if evaluation.data in NAMED_SETS else evaluation.data

    def _say(self, row: dict[str, Any]) -> None:
        if self.quiet:
            return
        what = f"{self.section.objective} {row['objective']:.2f} %, {row['bytes']:,} bytes" if row["bytes"] else ""
        reason = row["reason"] if row["status"] == "failed" else ""
        text = ", ".join(filter(None, (row["status"], what, reason, *remarks(row))))
        given = ", ".join(f"{path} {value}" for path, value in row["parameters"].items())
        print(f"trial {row['number']} of {self.section.trials}: {text} ({given})", file=sys.stderr, flush=True)

    def _conclude(self, table: dict[str, Any]) -> dict[str, Any]:
        if table["best"] is None:
            over = [row for row in table["trials"] if row["status"] == OVER_BUDGET]
            failed = [row for row in table["trials"] if row["status"] == "failed"]
            if over:
                least = min(over, key=lambda row: row["bytes"])
                raise UserError(
                    f"search.max_bytes: no student of {len(table['trials'])} trials is as small as "
                    f"{self.section.max_bytes:,} bytes; the smallest, of trial {least['number']}, takes "
                    f"{least['bytes']:,}. All are in {self.out / TRIALS}."
                )
            first = f" The first: {failed[0]['reason']}" if failed else ""
            raise UserError(f"No trial came to a result; all are in {self.out / TRIALS}.{first}")
        row = table["trials"][table["best"] - 1]
        chosen = replace(self.loaded, source=with_parameters(self.loaded.source, row["parameters"]))
        source = relocated(chosen, self.out)
        count, objective = len(table["trials"]), self.section.objective
        before = self.loaded.recipe.selected_on
        source["selected_on"] = ("" if before is None else f"{before}; then ") + (
            f"a search over {count} trial{'' if count == 1 else 's'}: {objective} on {self._measured_on()}"
        )
        budget = "" if self.section.max_bytes is None else f" of {self.section.max_bytes:,} allowed"
        head = (
            f"# Trial {row['number']} of {count} of zskd-nni search {self.loaded.recipe.name}:\n"
            f"# {objective} {row['objective']:.2f} % on {table['objective_on']}, "
            f"{row['bytes']:,} bytes{budget}.\n"
        )
        if row.get("note"):
            head += f"# {row['note']}.\n"
        real = on_real_images(table["trials"])
        if row["number"] in real:
            head += "# It reads real images: NOT data-free.\n"
        elif real:
            head += f"# {say_real(real)}, this one does not: the search is NOT data-free.\n"
        write_atomic(self.out / BEST, head + yaml.safe_dump(source, sort_keys=False))
        return table


def _is_row(row: Any) -> bool:
    """Whether it is a row of a search's table, with figures where it is done."""
    if not isinstance(row, dict) or not set(row) >= {"id", "status", "reason", "given", "value", "seconds"}:
        return False
    figures = [row.get("objective"), row.get("bytes")]
    done = row["status"] == "done"
    return isinstance(row.get("parameters"), dict) and all(
        isinstance(figure, int | float) or (figure is None and not done) for figure in figures
    )


def _final(metrics: list[Any]) -> dict[str, Any] | None:
    return next((metric.data for metric in metrics if metric.type == "FINAL"), None)
