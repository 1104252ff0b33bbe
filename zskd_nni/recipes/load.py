"""Reading a recipe: packaged or a file, with a scale and overrides applied, checked against the schema."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from zskd_nni.data.datasets import NAMED_SETS, LabelledImages, fitted, load_images
from zskd_nni.data.sources import DrawnSource, MixedSource, ProceduralSource, TransferSource
from zskd_nni.methods.registry import TransferRequest, find_method
from zskd_nni.models.build import build_network, code_fingerprint, load_named_weights, starts_at_random
from zskd_nni.models.teacher import Teacher
from zskd_nni.recipes.key_paths import apply_changes, get_at
from zskd_nni.recipes.named_files import named_files
from zskd_nni.recipes.schema import NetworkSection, Recipe
from zskd_nni.runtime.errors import UserError, error_context
from zskd_nni.runtime.files import sha256_of_bytes
from zskd_nni.runtime.validation import boolean_for_a_number, describe_validation


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and the folder from which its relative paths are resolved.

    Attributes:
        recipe: the checked recipe.
        base: folder of its file; None for a packaged one.
        source: the plain mapping that was checked, overrides applied.
    """

    recipe: Recipe
    base: Path | None
    source: dict[str, Any]

    def path(self, text: str) -> Path:
        """``text`` as a path, from the recipe's folder where it is relative."""
        return (self.base or Path()) / text

    def network(self, section: NetworkSection) -> Any:
        """Build a section's network and load its weights."""
        network = build_network(section.model, section.arguments, self.base)
        if section.weights is not None:
            with error_context("teacher.weights" if section is self.recipe.teacher else "student.weights"):
                load_named_weights(network, section.weights, self.base, section.allow_pt)
        return network

    def teacher(self) -> Teacher:
        """The recipe's teacher, frozen and checked."""
        section = self.recipe.teacher
        if section.weights is None and starts_at_random(section.model, self.base):
            raise UserError(
                f"teacher.weights is missing: {section.model} starts at random, and an untrained network is no "
                "teacher. Name a .safetensors file, or zoo:NAME for a shipped teacher."
            )
        code = code_fingerprint(section.model, self.base)
        return Teacher(self.network(section), section.input, section.classifier, code=code)

    def data_name(self) -> str | None:
        """The evaluation data: a known name, or a path from the recipe's folder; None without."""
        if self.recipe.evaluation is None:
            return None
        name = self.recipe.evaluation.data
        return name if name in NAMED_SETS else str(self.path(name))

    def evaluation_data(self, teacher: Teacher, root: Path | None, download: bool = False) -> LabelledImages:
        """Read the evaluation data that the recipe names.

        Args:
            teacher: the recipe's teacher, to whose input and classes the data must fit.
            root: folder of named data sets; the variable ``ZSKD_NNI_DATA`` where absent.
            download: let torchvision fetch them there.

        Raises:
            UserError: the data is not there, or does not fit.
        """
        name = self.data_name()
        assert self.recipe.evaluation is not None and name is not None
        with error_context("evaluation.data"):
            data = load_images(name, self.recipe.evaluation.split, root, download)
            data.require_labels(teacher.num_classes)
            replace(data, fit="resize").pixels(slice(0, 1), teacher.spec)  # refuses channels that do not fit
        with error_context("evaluation.fit"):
            return fitted(data, teacher.spec.shape, self.recipe.evaluation.fit)

    def transfer_source(self, teacher: Teacher, folder: Path, **changes: Any) -> TransferSource:
        """Make the recipe's transfer source, or resume it.

        Args:
            teacher: the recipe's teacher, on the device that computes.
            folder: where the method keeps what it makes.
            changes: fields of the :class:`~zskd_nni.methods.registry.TransferRequest` that the recipe does not give.

        Raises:
            UserError: as of the method.
        """
        section = self.recipe.transfer
        batch, seed = self.recipe.distillation.batch, self.recipe.seed
        own: dict[str, Any] = {"size": section.size, "batch_size": batch, "seed": seed}
        if self.recipe.evaluation is not None:
            own["fit"] = self.recipe.evaluation.fit
        request = TransferRequest(folder=folder, options=section.options(teacher), base=self.base, **{**own, **changes})
        source = find_method(section.method).source(teacher, request)
        return source if request.held_out else self.with_further_images(source, teacher)

    def with_further_images(self, source: TransferSource, teacher: Teacher) -> TransferSource:
        """The source, with what ``transfer.fresh`` and ``transfer.also`` add to every batch."""
        section = self.recipe.transfer
        further: list[tuple[TransferSource, float]] = []
        if section.fresh is not None:
            fresh = ProceduralSource(section.fresh, teacher.spec, source.batch_size)
            further.append((fresh, section.fresh_share))
        if (own := self.own_images()) is not None:
            with error_context("transfer.also"):
                pixels = own.pixels(slice(0, len(own)), teacher.spec)
            checksum = sha256_of_bytes(own.images.numpy().tobytes())
            further.append((DrawnSource(pixels, source.batch_size, checksum), section.also_share))
        return MixedSource(source, further) if further else source

    def own_images(self) -> LabelledImages | None:
        """The images of ``transfer.also`` as they are; None where none are named.

        Raises:
            UserError: they are not there.
        """
        if self.recipe.transfer.also is None:
            return None
        # Absolute, so that no data set with a name is meant: it would give its test images.
        path = self.path(self.recipe.transfer.also).absolute()
        if path.suffix != ".npz" and not path.is_dir():
            raise UserError(f"transfer.also: there is no folder {path}; name a folder of images, or an .npz file.")
        with error_context("transfer.also"):
            return load_images(str(path))


def packaged_folder() -> Path:
    """The folder of the packaged recipes."""
    return Path(__file__).with_name("packaged")


def packaged_names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in packaged_folder().glob("*.yml"))


# Limits of a recipe: characters, values, and levels of nesting.
_MOST_CHARACTERS, _MOST_VALUES, _MOST_LEVELS = 200_000, 100_000, 50


def recipe_text(name_or_file: str) -> tuple[str, Path | None]:
    """The YAML of a packaged recipe or of a file, and the folder from which its relative paths are resolved.

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
    near = [f"{name_or_file}{end}" for end in (".yml", ".yaml") if os.path.exists(f"{name_or_file}{end}")]
    near = near or difflib.get_close_matches(name_or_file, packaged_names(), 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else f"packaged ones: {', '.join(packaged_names())}; or name a .yml file."
    raise UserError(f"There is no recipe {name_or_file!r}; {hint}")


def load_recipe(
    name_or_file: str, overrides: Sequence[str] = (), seed: int | None = None, scale: str | None = None
) -> LoadedRecipe:
    """Read and check a recipe.

    Args:
        name_or_file: a packaged recipe's name or a YAML file.
        overrides: ``key.path=value``, values as YAML, as a user types them: paths of files are relative to the current
            folder, not to the recipe's.
        seed: instead of the recipe's.
        scale: one of the recipe's ``scales``, applied before the overrides.

    Raises:
        UserError: one sentence about the first mistake.

    Example:
        >>> load_recipe("digits-prune50", ["distillation.steps=5"]).recipe.distillation.steps
        5
    """
    text, base = recipe_text(name_or_file)
    named = f"The recipe {name_or_file}"
    source = _parse_yaml(text, named)
    if not isinstance(source, dict):
        raise UserError(f"{named} must be a mapping with keys such as teacher and transfer.")
    _check_own_scale(source, named)
    if scale is not None and scale != "full":
        _apply_scale(source, scale, name_or_file)
    _apply_overrides(source, overrides, base)
    if seed is not None:
        source["seed"] = seed
    return LoadedRecipe(check_recipe(source, named), base, source)


def check_recipe(source: Mapping[str, Any], named: str) -> Recipe:
    """A recipe from its plain mapping.

    Args:
        source: as read from YAML.
        named: what messages call it.

    Raises:
        UserError: one sentence about the first mistake.
    """
    if problem := boolean_for_a_number(Recipe, source):
        raise UserError(f"{named}: {problem}")
    try:
        recipe = Recipe.model_validate(source)
    except ValidationError as error:
        raise UserError(f"{named}: {describe_validation(error, Recipe)}") from error
    for keys, value in _values_in(source):  # the schema does not look into the arguments of NNI and of factories
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{named}: {_dotted(keys)}a number is expected, not nan.")
    return recipe


def _check_own_scale(source: Mapping[str, Any], named: str) -> None:
    """Refuse a file that names a scale but has not its values; the ``best.yml`` of a search has them."""
    scale, scales = source.get("scale", "full"), source.get("scales") or {}
    if scale == "full" or not isinstance(scale, str) or not isinstance(scales, Mapping):
        return
    if not isinstance(scales.get(scale), Mapping):
        raise UserError(
            f"{named}: scale: there is no {scale!r} among its scales ({', '.join(['full', *map(str, scales)])})."
        )

    def has(path: str, value: Any) -> bool:
        try:
            return bool(get_at(source, path) == value)
        except (KeyError, IndexError, ValueError, TypeError):
            return False

    if scales[scale] and not any(has(str(path), value) for path, value in scales[scale].items()):
        raise UserError(
            f"{named}: scale is {scale!r}, and nothing of scales.{scale} is applied; remove the key and run "
            f"it with --scale {scale}."
        )


def _apply_scale(source: dict[str, Any], scale: str, name: str) -> None:
    scales = source.get("scales") or {}
    if not isinstance(scales, dict) or not isinstance(scales.get(scale), dict):
        known = ", ".join(["full", *map(str, scales)]) if isinstance(scales, dict) else "full"
        raise UserError(f"--scale: the recipe {name} has no scale {scale!r}; it has {known}.")
    _apply(source, {str(path): value for path, value in scales[scale].items()}, f"scales.{scale}")
    source["scale"] = scale


def _apply_overrides(source: dict[str, Any], overrides: Sequence[str], base: Path | None) -> None:
    changes: dict[str, Any] = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        if path == "scale":
            raise UserError("--set scale: a scale is chosen by --scale, which puts its keys over the recipe.")
        if not equals or not all(path.split(".")):
            raise UserError(f"--set takes key.path=value, not {override!r}.")
        changes.pop(path, None)  # the last of equal paths counts, and comes last
        changes[path] = _parse_yaml(text, f"--set {path}: the value")
    _apply(source, changes, "--set")
    if base is not None and base != Path.cwd():
        _resolve_overridden_files(source, tuple(f"{path}." for path in changes), base)


def _apply(source: dict[str, Any], changes: Mapping[str, Any], origin: str) -> None:
    try:
        apply_changes(source, changes)
    except ValueError as error:
        raise UserError(f"{origin} {error}.") from error


def _resolve_overridden_files(source: dict[str, Any], changed: tuple[str, ...], base: Path) -> None:
    """Files named on a command line are relative to the current folder; a recipe names them from its own."""
    for named in named_files(source):
        if not f"{named.key_path}.".startswith(changed) or os.path.isabs(named.file):
            continue
        if os.path.exists(named.file):
            named.rename(os.path.relpath(named.file, base))
        elif os.path.exists(base / named.file):
            raise UserError(
                f"--set {named.key_path}: paths on a command line are relative to the current folder, where there is "
                f"no {named.file}; beside the recipe there is {os.path.relpath(base / named.file)}."
            )


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice; PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} occurs twice in one mapping", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, named: str) -> Any:
    if len(text) > _MOST_CHARACTERS:
        raise UserError(f"{named} is not YAML: it is longer than {_MOST_CHARACTERS:,} characters.")
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)
    except RecursionError as error:
        raise UserError(f"{named} is not YAML: it is nested too deeply.") from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:  # bad dates, numbers, keys
        raise UserError(f"{named} is not YAML: {' '.join(str(error).split())}.") from error
    if problem := _problem_with_values(content):
        raise UserError(f"{named}: {problem}.")
    return content


_SURROGATES = re.compile("[\ud800-\udfff]")


def _problem_with_values(content: Any) -> str | None:
    """The first value that is not a mapping, list, text, number, boolean or null, or a structure that is too large.

    With YAML's references a short text may hold more values than fit into memory, or a value that contains itself.
    """
    for count, (keys, value) in enumerate(_values_in(content)):
        if count == _MOST_VALUES:
            return f"it holds more than {_MOST_VALUES:,} values"
        if len(keys) > _MOST_LEVELS:
            return f"{_dotted(keys)[:60]}... is nested too deeply, or contains itself"
        if any(isinstance(text, str) and _SURROGATES.search(text) for text in (*keys[-1:], value)):
            where = _dotted((*keys, value) if isinstance(value, str) else keys).encode("unicode_escape").decode()
            return f"{where}half a character, as JSON escapes those beyond U+FFFF; write the character itself"
        if isinstance(value, dict):
            wrong = next((key for key in value if not isinstance(key, str | int | float | None)), None)
            if wrong is not None:
                return f"{_dotted(keys)}a key is text, not {wrong!r}"
        elif not isinstance(value, list | str | bool | int | float | None):
            return f"{_dotted(keys)}a recipe holds mappings, lists, text, numbers, true, false and null, not {value!r}"
    return None


def _values_in(content: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value with the keys that lead to it; endless where a value contains itself."""
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), content)]
    yield waiting[0]
    while waiting:
        keys, value = waiting.pop()
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, entry in entries:
            yield (*keys, key), entry
            if isinstance(entry, dict | list):
                waiting.append(((*keys, key), entry))


def _dotted(keys: tuple[Any, ...]) -> str:
    return f"{'.'.join(map(str, keys))}: " if keys else ""
