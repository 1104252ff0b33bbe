"""Reading a recipe: packaged or a file, with a scale and overrides applied, checked against the schema."""

from __future__ import annotations

import copy
import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from zskd_nni.data.datasets import NAMED_SETS
from zskd_nni.models.build import build_network, code_fingerprint, load_into
from zskd_nni.models.teacher import Teacher
from zskd_nni.models.zoo.trained import trained_weights
from zskd_nni.recipes.key_paths import get_at, set_at
from zskd_nni.recipes.schema import NetworkSection, Recipe
from zskd_nni.runtime.errors import UserError, error_context
from zskd_nni.runtime.tensors import load_weights
from zskd_nni.runtime.validation import boolean_for_a_number, describe_validation


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and where its relative paths are meant from.

    Attributes:
        recipe: the checked recipe.
        base: folder of its file; None for a packaged one.
        source: plain mapping it was made of, overrides applied.
    """

    recipe: Recipe
    base: Path | None
    source: dict[str, Any]

    def path(self, text: str) -> Path:
        """``text`` as a path, from the recipe's folder where it is relative."""
        path = Path(text)
        return path if path.is_absolute() or self.base is None else self.base / path

    def network(self, section: NetworkSection) -> Any:
        """Build a section's network and load its weights."""
        network = build_network(section.model, section.arguments, self.base)
        if section.weights is not None:
            with error_context("teacher.weights" if section is self.recipe.teacher else "student.weights"):
                file = (
                    trained_weights(section.weights[4:])
                    if section.weights.startswith("zoo:")
                    else self.path(section.weights)
                )
                load_into(network, load_weights(file, section.allow_pt), section.weights)
        return network

    def teacher(self) -> Teacher:
        """The recipe's teacher, frozen and checked."""
        section = self.recipe.teacher
        if section.weights is None and section.model.startswith(("zoo:", "torchvision:")):
            raise UserError(
                f"teacher.weights is missing: {section.model} starts at random, and an untrained network has nothing "
                "to teach. Name a .safetensors file, or zoo:NAME for a shipped teacher."
            )
        code = code_fingerprint(section.model, self.base)
        return Teacher(self.network(section), section.input, section.classifier, code=code)

    def data_name(self) -> str | None:
        """The evaluation data: a known name, or a path from the recipe's folder; None without."""
        if self.recipe.evaluation is None:
            return None
        name = self.recipe.evaluation.data
        return name if name in NAMED_SETS else str(self.path(name))


def packaged_folder() -> Path:
    """Where the packaged recipes lie."""
    return Path(str(resources.files("zskd_nni.recipes") / "packaged"))


def packaged_names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in packaged_folder().glob("*.yml"))


_LONGEST, _MOST_VALUES, _DEEPEST = 200_000, 100_000, 50


def recipe_text(name_or_file: str) -> tuple[str, Path | None]:
    """The YAML of a packaged recipe or of a file, and the folder its relative paths are meant from.

    Raises:
        UserError: there is no such recipe.
    """
    if name_or_file in packaged_names():
        return (packaged_folder() / f"{name_or_file}.yml").read_text(), None
    path = Path(name_or_file)
    if path.suffix in (".yml", ".yaml") or os.path.exists(path):
        try:
            return path.read_text(), path.resolve().parent
        except FileNotFoundError as error:
            raise UserError(f"There is no recipe file {path}.") from error
        except (OSError, ValueError) as error:
            raise UserError(f"The recipe {path} cannot be read ({error}).") from error
    near = difflib.get_close_matches(name_or_file, packaged_names(), 1, 0.5)
    file = next((f"{name_or_file}{end}" for end in (".yml", ".yaml") if os.path.exists(f"{name_or_file}{end}")), None)
    if file is not None:
        near = [file]
    hint = f"did you mean {near[0]}?" if near else f"packaged ones: {', '.join(packaged_names())}; or name a .yml file."
    raise UserError(f"There is no recipe {name_or_file!r}; {hint}")


def load_recipe(
    name_or_file: str, overrides: Sequence[str] = (), seed: int | None = None, scale: str | None = None
) -> LoadedRecipe:
    """Read and check a recipe.

    Args:
        name_or_file: a packaged recipe's name or a YAML file.
        overrides: ``key.path=value``, values as YAML.
        seed: instead of the recipe's.
        scale: one of the recipe's ``scales``, put over it before the overrides.

    Raises:
        UserError: one sentence on the first thing that is wrong.
    """
    text, base = recipe_text(name_or_file)
    source = _parse_yaml(text, f"The recipe {name_or_file} is not YAML")
    if not isinstance(source, dict):
        raise UserError(f"The recipe {name_or_file} must be a mapping with keys such as teacher and transfer.")
    _check_own_scale(source, f"The recipe {name_or_file}")
    if scale is not None and scale != "full":
        _apply_scale(source, scale, name_or_file)
    for override in overrides:
        if override.partition("=")[0] == "scale":
            raise UserError("--set scale: a scale is chosen by --scale, which puts its keys over the recipe.")
        _apply_override(source, override)
    if seed is not None:
        source["seed"] = seed
    return LoadedRecipe(check_recipe(source, f"The recipe {name_or_file}"), base, source)


def check_recipe(source: Mapping[str, Any], called: str) -> Recipe:
    """A recipe from its plain mapping.

    Args:
        source: as read from YAML.
        called: what messages call it.

    Raises:
        UserError: one sentence on the first thing that is wrong.
    """
    if said := boolean_for_a_number(Recipe, source):
        raise UserError(f"{called}: {said}")
    try:
        recipe = Recipe.model_validate(source)
    except ValidationError as error:
        raise UserError(f"{called}: {describe_validation(error, Recipe)}") from error
    for path, value in _values_in(source):  # in what is NNI's or a factory's, nobody has looked
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{called}: {_dotted(path)}a number is expected, not nan.")
    return recipe


def _check_own_scale(source: Mapping[str, Any], called: str) -> None:
    """Refuse a file that calls itself a scale whose keys are not put over it; a search's ``best.yml`` rightly does."""
    scale, scales = source.get("scale", "full"), source.get("scales") or {}
    if scale == "full" or not isinstance(scale, str) or not isinstance(scales, Mapping):
        return
    if not isinstance(scales.get(scale), Mapping):
        known = ", ".join(["full", *map(str, scales)])
        raise UserError(f"{called}: scale: there is no {scale!r} among its scales ({known}).")

    def stands(path: str, value: Any) -> bool:
        try:
            return bool(get_at(source, path) == value)
        except (KeyError, IndexError, ValueError, TypeError):
            return False

    if scales[scale] and not any(stands(str(path), value) for path, value in scales[scale].items()):
        raise UserError(
            f"{called}: scale says {scale!r}, and nothing of scales.{scale} is put over it; take the key out and run "
            f"it with --scale {scale}."
        )


def _apply_scale(source: dict[str, Any], scale: str, name: str) -> None:
    scales = source.get("scales") or {}
    if not isinstance(scales, dict) or not isinstance(scales.get(scale), dict):
        known = ", ".join(["full", *map(str, scales)]) if isinstance(scales, dict) else "full"
        raise UserError(f"--scale: the recipe {name} has no scale {scale!r}; it has {known}.")
    for path, value in scales[scale].items():
        _put(source, str(path), copy.deepcopy(value), f"scales.{scale}")
    source["scale"] = scale


def _apply_override(source: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise UserError(f"--set takes key.path=value, not {override!r}.")
    value = _parse_yaml(text, f"--set {path}: the value is not YAML")
    _put(source, path, value, "--set")


def _put(source: dict[str, Any], path: str, value: Any, origin: str) -> None:
    """Set what stands at a key path."""
    try:
        set_at(source, path, value)
    except ValueError as error:
        raise UserError(f"{origin} {path}: {error}.") from error


class _EachKeyOnce(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys of a mapping without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands in one mapping twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, complaint: str) -> Any:
    if len(text) > _LONGEST:
        raise UserError(f"{complaint}: it is longer than {_LONGEST:,} characters.")
    try:
        content = yaml.load(text, Loader=_EachKeyOnce)
    except RecursionError as error:
        raise UserError(f"{complaint}: it is nested too deeply.") from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:  # bad dates, numbers, keys
        raise UserError(f"{complaint}: {' '.join(str(error).split())}.") from error
    problem = _not_plain(content)
    if problem:
        raise UserError(f"{complaint.split(' is not YAML')[0].split(': the value')[0]}: {problem}.")
    return content


_HALVES = re.compile("[\ud800-\udfff]")


def _not_plain(content: Any) -> str | None:
    """What in YAML's answer is not a mapping, list, text, number, truth value or null, or is too much to be meant.

    References may make a short text stand for more values than fit into memory, or for one that contains itself.
    """
    for count, (path, value) in enumerate(_values_in(content)):
        if count == _MOST_VALUES:
            return f"it holds more than {_MOST_VALUES:,} values"
        if path.count("\x1f") > _DEEPEST:
            return f"{_dotted(path)[:60]}... is nested too deeply, or contains itself"
        if _HALVES.search(path) or (isinstance(value, str) and _HALVES.search(value)):
            where = f"{path}\x1f{value}" if isinstance(value, str) else path
            told = _dotted(where).encode("unicode_escape").decode()
            return f"{told}half a character, as JSON escapes those beyond U+FFFF; write the character itself"
        if isinstance(value, dict):
            wrong = next((key for key in value if not isinstance(key, str | int | float | None)), None)
            if wrong is not None:
                return f"{_dotted(path)}a key is text, not {wrong!r}"
        elif not isinstance(value, list | str | bool | int | float | None):
            return f"{_dotted(path)}a recipe holds mappings, lists, text, numbers, true, false and null, not {value!r}"
    return None


def _values_in(content: Any) -> Iterator[tuple[str, Any]]:
    """Every value with its path, parts joined by a character that no key has; never ends where content holds itself."""
    waiting: list[tuple[str, Any]] = [("", content)]
    yield waiting[0]
    while waiting:
        path, value = waiting.pop()
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, entry in entries:
            yield f"{path}\x1f{key}", entry
            if isinstance(entry, dict | list):
                waiting.append((f"{path}\x1f{key}", entry))


def _dotted(path: str) -> str:
    return f"{'.'.join(path.split(chr(31))[1:])}: " if path else ""
