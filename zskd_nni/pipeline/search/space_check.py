"""Checks of a search space before the first trial: its values must make recipes that can begin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from zskd_nni.pipeline import Run
from zskd_nni.pipeline.search.job import check_transfer_files
from zskd_nni.recipes.load import LoadedRecipe, check_recipe
from zskd_nni.recipes.schema import SearchSection
from zskd_nni.recipes.search_space import corners, dimensions, pairs, with_parameters
from zskd_nni.runtime.errors import UserError

MOST_RECIPES = 400  # that are checked two values at a time, some 20 ms each


def check_key_paths(section: SearchSection) -> None:
    """Refuse key paths that make no difference to any trial.

    Raises:
        UserError: the key path, and why it makes none.
    """
    reasons = {
        "controls": "trials make no controls",
        "search": "a trial searches nothing itself",
        "scales": "a scale is put over a recipe before it is searched (--scale)",
    }
    if section.objective == "agreement":
        reasons["evaluation"] = "agreement is measured on the probe set, and no trial opens a real image"
    for dimension in dimensions(section.space):
        if reason := reasons.get(dimension.path.split(".")[0]):
            raise UserError(f"search.space.{dimension.path} makes no difference to any trial: {reason}. Leave it out.")


class _Begun(Run):
    """A run of which only the checks are made."""

    looks = False


def check_values(loaded: LoadedRecipe, space: Mapping[str, Any], out: Path) -> None:
    """Put every choice and both ends of every range into the recipe, each alone; the result must be able to begin.

    Args:
        loaded: the recipe that is searched.
        space: its search space.
        out: of the search.

    Raises:
        UserError: the key path, the value, and what is wrong with it.
    """
    for path, value, flat in corners(space):
        try:
            changed = _with_values(loaded, flat)
            check_transfer_files(changed)
            if path.split(".")[0] in ("compression", "student", "teacher"):
                recipe = changed.recipe.model_copy(update={"evaluation": None})
                _Begun(replace(changed, recipe=recipe), out, quiet=True)
        except (ValueError, UserError) as error:
            raise UserError(f"search.space.{path}: with {value!r}, {error}") from error


def problem_with(loaded: LoadedRecipe, flat: Mapping[str, Any]) -> str | None:
    """What is wrong with the recipe with these parameters, as far as the schema shows; None if nothing is."""
    try:
        _with_values(loaded, flat)
    except (ValueError, UserError) as error:
        return str(error)
    return None


def check_pairs(space: Mapping[str, Any], problem: Callable[[dict[str, Any]], str | None]) -> None:
    """Refuse a value that makes no recipe with any value of another key: all trials with it would fail.

    At most :data:`MOST_RECIPES` recipes are checked; what comes after them is left to the trials.

    Args:
        space: the search space.
        problem: what is wrong with flat parameters, or None.

    Raises:
        UserError: the two key paths, and what is wrong.
    """
    known: dict[str, str] = {}

    def remembered(flat: dict[str, Any]) -> str:
        key = repr(flat)
        if key not in known and len(known) < MOST_RECIPES:
            known[key] = problem(flat) or ""
        return known.get(key, "")

    for one, value, other, together in pairs(space):
        reason = ""
        if all(reason := remembered(flat) for flat in together):
            nest = f"nest {other.path} under the choices of {one.path} that it goes with"
            raise UserError(
                f"search.space.{other.path}: no value of it goes with {value!r} at {one.path} "
                f"({reason.rstrip('.')}); {nest if one.kind == 'choice' else 'narrow one of the two'}."
            )


def _with_values(loaded: LoadedRecipe, flat: Mapping[str, Any]) -> LoadedRecipe:
    source = with_parameters({**loaded.source, "search": None}, flat)
    return replace(loaded, source=source, recipe=check_recipe(source, "the recipe becomes wrong"))
