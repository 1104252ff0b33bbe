"""A search as NNI's experiment config: tuner, training service and trial command, checked before anything starts."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import io
import logging
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zskd_nni.recipes.schema import SearchSection
from zskd_nni.runtime.errors import UserError

# NNI's tuners that take any search space and one final number. Its others want a space or trials of their own kind.
TUNERS = ("TPE", "Random", "GridSearch", "Evolution", "Anneal", "SMAC", "Metis", "GP", "DNGO")


def experiment_config(section: SearchSection, job: Path, tuner: dict[str, Any], trials: int) -> Any:
    """The ``nni.experiment.ExperimentConfig`` of a search.

    Args:
        section: of the recipe.
        job: the folder in which trials run, and which NNI copies to other machines.
        tuner: NNI's mapping.
        trials: number of trials to run.

    Raises:
        UserError: NNI has no such training service, or refuses its settings.
    """
    from nni.experiment import ExperimentConfig

    python = f"exec {shlex.quote(sys.executable)}" if is_local(section) else "exec python3"
    try:
        with _silent_nni():
            config = ExperimentConfig(
                experiment_name="zskd_nni search",
                search_space=section.space,
                trial_command=f"{python} -m zskd_nni trial .",
                trial_code_directory=str(job),
                trial_concurrency=section.concurrency,
                max_trial_number=trials,
                tuner=tuner,
                training_service=dict(section.training_service),
            )
            config.validate()
    except Exception as error:  # NNI's configs raise any type
        reason = " ".join(str(error).split()).rstrip(".") or "NNI refuses it without a reason"
        raise UserError(f"search.training_service: {reason}.") from error
    return config


def is_local(section: SearchSection) -> bool:
    """Whether trials run on this machine, where they find the search's own files."""
    return section.training_service.get("platform") == "local"


def tuner_config(section: SearchSection, seed: int, base: Path | None = None) -> dict[str, Any]:
    """NNI's mapping of the tuner, set to maximise, with the seed if the tuner takes one.

    Args:
        section: names the tuner.
        seed: of its random numbers.
        base: the recipe's folder, from which a relative ``code_directory`` is resolved.

    Raises:
        UserError: there is no such tuner, it lacks a package, or it refuses its arguments or the space.
    """
    given = {"name": section.tuner} if isinstance(section.tuner, str) else section.tuner
    arguments = given.get("class_args") or given.get("classArgs") or {}
    if not isinstance(arguments, dict):
        raise UserError(f"search.tuner: class_args is a mapping, not {arguments!r}.")
    if class_name := given.get("class_name") or given.get("className"):  # a tuner of the user's
        directory = given.get("code_directory") or given.get("codeDirectory") or "."
        folder = ((base or Path.cwd()) / str(directory)).resolve()
        if not folder.is_dir():
            raise UserError(f"search.tuner: code_directory names no folder; there is no {folder}.")
        return {"className": class_name, "codeDirectory": str(folder), "classArgs": arguments}
    name = given.get("name")
    if name not in TUNERS:
        near = difflib.get_close_matches(str(name), TUNERS, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TUNERS)}."
        raise UserError(f"search.tuner: no tuner {name!r} for recipes; {hint}")
    if arguments.get("optimize_mode", "maximize") != "maximize":
        raise UserError("search.tuner: a search maximises; leave optimize_mode out.")
    with _silent_nni():
        tuner, preset = _builtin_tuner(name)
        ours: dict[str, Any] = {"optimize_mode": "maximize", "seed": seed}
        if name == "TPE":
            # NNI's first 20 proposals are random, which would be all of a short search.
            ours["tpe_args"] = {"n_startup_jobs": max(4, min(20, section.trials // 4))}
        accepted = inspect.signature(tuner).parameters
        arguments = {**{key: value for key, value in ours.items() if key in accepted}, **arguments}
        try:
            tuner(**{**preset, **arguments}).update_search_space(section.space)
        except Exception as error:  # a tuner may raise any type
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"search.tuner: {name} refuses its arguments or the search space ({reason}).") from error
    return {"name": name, "classArgs": arguments}


def remembering(tuner: dict[str, Any], folder: Path, **arguments: Any) -> dict[str, Any]:
    """NNI's mapping of a :class:`zskd_nni.pipeline.search.tuner.RememberingTuner` around ``tuner``.

    Args:
        tuner: of :func:`tuner_config`.
        folder: where NNI finds the class.
        arguments: the other arguments of the class.
    """
    shutil.copyfile(Path(__file__).with_name("tuner.py"), folder / "search_tuner.py")
    class_args = {"tuner": tuner, **arguments}
    return {"class_name": "search_tuner.RememberingTuner", "code_directory": str(folder), "class_args": class_args}


def _builtin_tuner(name: str) -> tuple[Any, dict[str, Any]]:
    """The class of one of NNI's tuners, and the arguments that NNI gives it."""
    from nni.tools.package_utils import config_manager

    meta = config_manager.get_algo_meta(name)
    if meta is None:
        raise UserError(f"search.tuner: this NNI has no tuner {name}.")
    module, _, class_name = meta.class_name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), class_name), dict(meta.class_args or {})
    except ImportError as error:
        raise UserError(f"search.tuner: {name} needs a package that is not installed ({error}).") from error


@contextlib.contextmanager
def _silent_nni() -> Iterator[None]:
    """NNI writes to standard output; what matters is in its exceptions."""
    logger = logging.getLogger("nni")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
