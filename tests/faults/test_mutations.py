"""Recipes and command lines mutated at random: exit 0, or one sentence and exit 2, and never for long."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from amounts import LONG, amount, only_long
from helpers import is_one_sentence, start_cli, start_process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zskd_nni.recipes.load import load_recipe, packaged_names, recipe_text
from zskd_nni.runtime.errors import UserError

VALID = {name: yaml.safe_load(recipe_text(name)[0]) for name in packaged_names()}
TINY: dict[str, Any] = {
    "name": "tiny",
    "teacher": {"model": "zoo:lenet5", "weights": "zoo:lenet5-digits", "input": {"shape": [1, 32, 32]}},
    "transfer": {"size": 12, "held_out": 4, "synthesis": {"max_steps": 2, "shard": 6}},
    "compression": {
        "pruning": {"config_list": [{"op_names": ["conv1", "conv2"], "sparse_ratio": 0.5}], "steps": 2},
    },
    "distillation": {"steps": 2, "batch": 4},
    "controls": [],
}
VALID["tiny"] = TINY

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**9, 10**18, -(10**30), 2**31, 2**63]),
    st.floats(allow_subnormal=False),
    st.sampled_from([1e9, 1e-30, 1e308, 0.5]),
    st.text(max_size=8),
    st.sampled_from(
        ["zskd", "sts", "ats", "zskt", "real", "class-impressions", "best", "paper", "author-code", "zoo:lenet5_half"]
    ),
    st.sampled_from(["Conv2d", "conv1", "fc3", "weight", "_input_", "int8", "L1NormPruner", "TaylorPruner", "QAT", ""]),
    st.sampled_from(["\x00", "\ud7ff", "../..", "/etc/passwd", "a" * 5000, "{", "&a", "file.py:net", "os:system", "~"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.text(max_size=6), st.integers()), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, entry in entries:
        found.extend(places(entry, (*path, key)))
    return found


@st.composite
def mutated(draw: st.DrawFn, names: list[str] | None = None) -> dict[str, Any]:
    """A valid recipe in which one to four things are replaced, removed, added, renamed, doubled or exchanged."""
    content = copy.deepcopy(VALID[draw(st.sampled_from(names or sorted(VALID)))])
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from(places(content) or [("name",)]))
        owner = content
        for key in path[:-1]:
            owner = owner[key]
        key, kind = path[-1], draw(st.sampled_from(["value", "value", "value", "remove", "add", "rename", "exchange"]))
        if kind == "value":
            owner[key] = draw(VALUES)
        elif kind == "remove":
            del owner[key]
        elif kind == "exchange":
            other = draw(st.sampled_from(places(content)))
            value: Any = content
            for part in other:
                value = value[part]
            owner[key] = copy.deepcopy(value)
        elif isinstance(owner, dict):
            name = draw(st.one_of(st.text(max_size=6), st.sampled_from([str(part) for part in path])))
            owner[name] = owner.pop(key) if kind == "rename" else draw(VALUES)
        else:
            owner.append(draw(VALUES))
    return content


def written(content: Any) -> str:
    return json.dumps(content) if random.Random(str(content)).random() < 0.1 else yaml.safe_dump(content)


@settings(max_examples=amount(150, 4000), deadline=None, derandomize=not LONG, suppress_health_check=list(HealthCheck))
@given(mutated())
def test_mutated_recipes_are_read_or_refused_in_one_sentence(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(written(content), encoding="utf-8")
    started = time.monotonic()
    try:
        loaded = load_recipe(str(path))
        loaded.recipe.model_dump(mode="json")
        loaded.data_name()
    except UserError as error:
        assert "\n" not in str(error).strip() or "\n" in str(content)
        assert "recipe.yml" in str(error)
    assert time.monotonic() - started < 30


@settings(max_examples=amount(100, 2000), deadline=None, derandomize=not LONG, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=60), st.integers(0, 2000), st.integers(0, 30))
def test_mutated_bytes_are_read_or_refused(tmp_path: Path, patch: bytes, place: int, cut: int) -> None:
    content = recipe_text("digits-prune50")[0].encode()
    place %= len(content)
    (tmp_path / "recipe.yml").write_bytes(content[:place] + patch + content[place + cut :])
    with contextlib.suppress(UserError):
        load_recipe(str(tmp_path / "recipe.yml"))


@settings(max_examples=amount(100, 2000), deadline=None, derandomize=not LONG, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from([".".join(map(str, p)) for p in places(TINY)]), VALUES), max_size=3))
def test_mutated_overrides(changes: list[tuple[str, Any]]) -> None:
    with contextlib.suppress(UserError):
        load_recipe("digits-prune50", [f"{path}={yaml.safe_dump(value).strip()}" for path, value in changes])


# Whole commands. Most run in a process that was forked behind its imports, some as a user starts them.


def run_main(arguments: list[str], folder: str, seconds: int) -> None:
    """In another process: the command line, its standard error in a file."""
    import resource
    import signal

    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    os.chdir(folder)
    signal.alarm(seconds)  # SIGALRM ends it, with another exit code than any promised
    sys.argv = ["zskd-nni", *arguments]
    with open("stderr", "w") as errors, open("stdout", "w") as output:
        sys.stderr, sys.stdout = errors, output
        os.dup2(errors.fileno(), 2)
        from zskd_nni.cli import main

        try:
            main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        else:
            code = 0
        errors.flush()
        output.flush()
        os._exit(code)


def check(code: int, error: str, what: Any) -> None:
    assert code in (0, 2), f"{what}\n{code}\n{error}"
    assert "Traceback" not in error, f"{what}\n{error}"
    if code == 2:
        said = error.strip().splitlines()
        assert said[-1].startswith("Error: ") or said[0].startswith("Usage: "), f"{what}\n{error}"


def command(arguments: list[str], folder: Path, seconds: int = 240) -> tuple[int, str]:
    process = start_process(run_main, arguments, str(folder), seconds)
    process.join()
    return process.exitcode, (folder / "stderr").read_text()


def examples(strategy: st.SearchStrategy, count: int) -> list[Any]:
    """Drawn once, the same ones every time."""
    drawn: list[Any] = []

    @settings(max_examples=count, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def draw(value: Any) -> None:
        drawn.append(value)

    with contextlib.redirect_stdout(io.StringIO()):
        draw()
    return drawn


RUNNABLE = mutated(["tiny"])


@pytest.mark.parametrize("part", range(amount(1, 10)))
def test_mutated_recipes_run_or_are_refused(tmp_path: Path, part: int) -> None:
    """The whole command ``compress`` on mutants of a recipe that takes seconds."""
    count = amount(6, 20)
    for number, content in list(enumerate(examples(RUNNABLE, amount(6, 200))))[part * count : (part + 1) * count]:
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "recipe.yml").write_text(written(content), encoding="utf-8")
        code, error = command(["compress", "recipe.yml", "--out", "out", "--quiet", "--threads", "1"], folder)
        check(code, error, content)


WORDS = st.one_of(
    st.sampled_from(["compress", "synthesize", "distill", "evaluate", "show", "recipes", "train-teacher", "demo"]),
    st.sampled_from(["--out", "--set", "--seed", "--size", "--scale", "--data", "--device", "--threads", "--quiet"]),
    st.sampled_from(["--impressions", "--count", "--split", "--data-root", "--epochs", "--help", "--", "-h", "--x"]),
    st.sampled_from(["digits-prune50", "tiny.yml", "out", "student.json", "x.png", "digits", "cpu", "cuda:9", "tpu"]),
    st.sampled_from(["0", "1", "-1", "1e9", "nan", "seed=1", "a=b=c", "transfer.size=3", "seed=[", "=", "", "a" * 300]),
    st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), max_size=6),
)
ARGUMENTS = st.lists(WORDS, max_size=7)


@pytest.mark.parametrize("part", range(amount(1, 10)))
def test_mutated_command_lines(tmp_path: Path, part: int) -> None:
    """Words in any order; recipes that are named are tiny, so that what is right does not take long."""
    count = amount(10, 50)
    for number, arguments in list(enumerate(examples(ARGUMENTS, amount(10, 500))))[part * count : (part + 1) * count]:
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "tiny.yml").write_text(yaml.safe_dump(TINY))
        words = ["tiny.yml" if word == "digits-prune50" else "--help" if word == "demo" else word for word in arguments]
        if words[:1] == ["train-teacher"]:
            words = [*words, "--epochs", "1"]
        code, error = command(words, folder)
        check(code, error, words)


@only_long
@pytest.mark.parametrize("part", range(6))
def test_real_processes(tmp_path: Path, part: int) -> None:
    """Sixty commands as a user starts them."""
    for number, content in list(enumerate(examples(RUNNABLE, 360)))[300 + part * 5 : 305 + part * 5]:
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "recipe.yml").write_text(written(content), encoding="utf-8")
        result = start_cli("compress", "recipe.yml", "--out", "out", "--quiet", "--threads", "1", cwd=folder)
        check(result.returncode, result.stderr, content)
    for arguments in examples(ARGUMENTS, 700)[600 + part * 5 : 605 + part * 5]:
        result = start_cli(*[word for word in arguments if word != "demo"], cwd=tmp_path)
        check(result.returncode, result.stderr, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("transfer.size=100000000000", "larger shards"),
        ("controls=[noise]", "not enough memory"),
        ("teacher.weights=" + "x" * 5000, "no weights file"),
        ("evaluation={data: " + "y" * 5000 + "}", "no data set"),
        ("evaluation={data: '/proc/1/mem'}", "data"),
    ],
)
def test_what_is_too_much_ends_in_one_sentence(tmp_path: Path, change: str, message: str) -> None:
    content = copy.deepcopy(TINY)
    content["distillation"]["batch"] = 10**12  # a set of twelve images gives no more, noise does
    (tmp_path / "tiny.yml").write_text(yaml.safe_dump(content))
    code, error = command(["compress", "tiny.yml", "--out", "out", "--quiet", "--set", change], tmp_path)
    assert code == 2
    assert is_one_sentence(error), error
    assert message in error
