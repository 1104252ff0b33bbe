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
import tempfile
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
        job: the folder that trials are run in, and that NNI carries to other machines.
        tuner: NNI's mapping.
        trials: how many are to be made.

    Raises:
        UserError: NNI has no such training service, or refuses its settings.
    """
    from nni.experiment import ExperimentConfig

    python = f"exec {shlex.quote(sys.executable)}" if is_local(section) else "exec python3"
    try:
        with _quiet_nni():
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
    except Exception as error:  # NNI's configs raise what they like
        text = " ".join(str(error).split()).rstrip(".") or "NNI refuses it, and does not say why"
        raise UserError(f"search.training_service: {text}.") from error
    return config


def check_config(section: SearchSection, tuner: dict[str, Any]) -> None:
    """Let NNI look at the training service before there is any folder.

    Args:
        section: of the recipe.
        tuner: what :func:`tuner_config` gave.

    Raises:
        UserError: as of :func:`experiment_config`.
    """
    with tempfile.TemporaryDirectory() as job:  # NNI wants to see one
        experiment_config(section, Path(job), tuner, section.trials)


def is_local(section: SearchSection) -> bool:
    """Whether trials run on this machine, where they find what the search finds."""
    return section.training_service.get("platform") == "local"


def tuner_config(section: SearchSection, seed: int, base: Path | None = None) -> dict[str, Any]:
    """NNI's mapping of the tuner, which is told to maximise and given the seed, where it takes one.

    Args:
        section: names the tuner.
        seed: of its random numbers.
        base: the recipe's folder, which a relative ``code_directory`` is meant from.

    Raises:
        UserError: there is no such tuner, it lacks a package, or it refuses its arguments or the space.
    """
    given = {"name": section.tuner} if isinstance(section.tuner, str) else dict(section.tuner)
    own = given.get("class_name") or given.get("className")
    arguments = given.get("class_args") or given.get("classArgs") or {}
    if not isinstance(arguments, dict):
        raise UserError(f"search.tuner: class_args is a mapping, not {arguments!r}.")
    if own:  # somebody's own; what it takes is its own affair
        named = given.get("code_directory") or given.get("codeDirectory") or "."
        folder = ((base or Path.cwd()) / str(named)).resolve()
        if not folder.is_dir():
            raise UserError(f"search.tuner: code_directory names no folder; there is no {folder}.")
        return {"className": own, "codeDirectory": str(folder), "classArgs": arguments}
    name = given.get("name")
    if name not in TUNERS:
        near = difflib.get_close_matches(str(name), TUNERS, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TUNERS)}."
        raise UserError(f"search.tuner: no tuner {name!r} for recipes; {hint}")
    if arguments.get("optimize_mode", "maximize") != "maximize":
        raise UserError("search.tuner: a search maximises; leave optimize_mode out.")
    with _quiet_nni():
        kind, preset = _class_of(name)
        taken = inspect.signature(kind).parameters
        ours: dict[str, Any] = {"optimize_mode": "maximize", "seed": seed}
        if name == "TPE":
            # NNI draws the first 20 by chance, which would be all of a short search.
            ours["tpe_args"] = {"n_startup_jobs": max(4, min(20, section.trials // 4))}
        arguments = {**{key: value for key, value in ours.items() if key in taken}, **arguments}
        try:
            kind(**{**preset, **arguments}).update_search_space(section.space)
        except Exception as error:  # of somebody's algorithm
            text = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"search.tuner: {name} refuses its arguments or the search space ({text}).") from error
    return {"name": name, "classArgs": arguments}


def remembering(
    tuner: dict[str, Any], folder: Path, known: list[dict[str, Any]], again: list[dict[str, Any]], proposed: Path
) -> dict[str, Any]:
    """NNI's mapping of a :class:`zskd_nni.pipeline.search.tuner.RememberingTuner` around ``tuner``.

    Args:
        tuner: what :func:`tuner_config` gave.
        folder: where NNI is to find the class.
        known: finished trials, ``{"parameter": ..., "value": ...}``.
        again: parameters to propose first.
        proposed: file that lists what is proposed.
    """
    shutil.copyfile(Path(__file__).with_name("tuner.py"), folder / "search_tuner.py")
    arguments = {"tuner": tuner, "known": known, "again": again, "proposed": str(proposed)}
    return {
        "class_name": "search_tuner.RememberingTuner",
        "code_directory": str(folder),
        "class_args": arguments,
    }


def _class_of(name: str) -> tuple[Any, dict[str, Any]]:
    from nni.tools.package_utils import config_manager

    meta = config_manager.get_algo_meta(name)
    if meta is None:
        raise UserError(f"search.tuner: this NNI has no tuner {name}.")
    module, _, kind = meta.class_name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), kind), dict(meta.class_args or {})
    except ImportError as error:
        raise UserError(f"search.tuner: {name} needs a package that is not installed ({error}).") from error


@contextlib.contextmanager
def _quiet_nni() -> Iterator[None]:
    """NNI speaks on standard output; what matters is in its exceptions."""
    logger = logging.getLogger("nni")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
