"""Everything that README and site tell a reader to type is run here, at a small size.

Pages are read in the order of the site and run in one folder, as a reader would: files with a title are written,
recipes are loaded, Python is executed, commands are started. A command that nobody here knows how to run fails the
test.

A run of a whole recipe takes seconds even at the smallest size. Of those that differ in recipe and settings alone one
is run to its end; the others are parsed, loaded and checked up to where the long work begins.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from markdown_it import MarkdownIt
from torch.distributed.run import parse_args as launcher_arguments
from torchvision.models import resnet18

from zskd_nni.cli import app
from zskd_nni.compression.evaluator import DataFreeEvaluator
from zskd_nni.models.teacher import load_teacher
from zskd_nni.models.zoo import lenet5_half
from zskd_nni.pipeline import Run
from zskd_nni.recipes.load import load_recipe, recipe_text
from zskd_nni.runtime.errors import UserError
from zskd_nni.training.distillation import DistillationSettings

ROOT = Path(__file__).resolve().parents[2]
# Later pages use what these leave behind.
FIRST = ["docs/index.md", "docs/install.md", "docs/quickstart.md", "docs/howto/own-teacher.md", "README.md"]
PROGRAMS = ("zskd-nni", "make", "pip", "python", "jupyter", "torchrun", "nnictl", "pre-commit")
# Run for real elsewhere: the file, and the test in it.
ELSEWHERE = {
    "jupyter lab": ("tests/site/test_explorer_in_jupyterlab.py", "test_a_slider_moved_shows_another_impression"),
    "zskd-nni search digits-search --out out/search": (
        "tests/test_search.py",
        "test_a_search_is_private_stops_whole_and_goes_on",
    ),
    "zskd-nni compress out/search/best.yml --out out/best": (
        "tests/test_search.py",
        "test_a_search_is_private_stops_whole_and_goes_on",
    ),
    "zskd-nni compress digits-prune50 --out out/stripes --set transfer.method=stripes --set transfer.width=8": (
        "tests/test_method_registry.py",
        "test_a_method_of_somebody_elses_is_found_and_runs",
    ),
    "zskd-nni reproduce main --cell mnist-zskd-best --seed 0": (
        "tests/test_reproduction.py",
        "test_every_method_leaves_a_whole_record",
    ),
    "zskd-nni results": ("tests/test_reproduction.py", "test_the_page_of_real_records"),
}
SMALL = ["transfer.size=120", "transfer.held_out=100", "transfer.synthesis.max_steps=4", "distillation.steps=4"]
# What Python on a page expects to have, and what is made smaller in it.
GIVEN: dict[str, Any] = {
    "docs/methods/zskt.md": lambda: {
        "student": lenet5_half(),
        "teacher": load_teacher("lenet5-digits"),
        "DataFreeEvaluator": DataFreeEvaluator,
        "DistillationSettings": DistillationSettings,
    },
}
SMALLER = {
    "size=200": "size=20",
    "rounds=8000": "rounds=1, width=8",
    "rounds=200": "rounds=1, width=8",
    # docs/howto/own-teacher.md
    "randperm(len(images))": "randperm(128)",
    "range(5)": "range(1)",
    "size=400": "size=40",
    "steps=300": "steps=3",
}
ELSEWHERE_PYTHON = {
    "README.md": ("tests/test_readme.py", "test_the_example_in_python_runs_as_it_stands"),
    "docs/howto/prune-and-quantize.md": ("tests/test_readme.py", "test_the_example_with_classes_of_nni_runs"),
    "docs/nni-examples.md": (
        "tests/compression/test_nni_examples.py",
        "docs/nni-examples.md run unchanged except for smaller numbers",
    ),
}


@dataclass(frozen=True)
class Block:
    """Something a page shows to be copied."""

    page: str
    language: str
    title: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Lines that start a program."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.strip().removeprefix("$ ") for line in lines if line.strip().startswith(PROGRAMS)]


def pages() -> list[str]:
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    return [*FIRST, *sorted({*found, "CONTRIBUTING.md"} - set(FIRST))]


def blocks(page: str) -> Iterator[Block]:
    for token in MarkdownIt().parse((ROOT / page).read_text()):
        if token.type in ("fence", "code_block"):
            if token.content.startswith("--8<--"):
                continue  # a file of docs/howto/jobs: test_jobs.py
            language, _, rest = token.info.partition(" ")
            title = re.search(r'title="([^"]+)"', rest)
            if not language:
                language = "yaml" if re.match(r"[a-z_]+:\s", token.content) else "sh"
            yield Block(page, language, title[1] if title else "", token.content)


class Reader:
    """Does in one folder what pages tell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: set[str] = set()
        self.namespaces: dict[str, dict[str, Any]] = {}

    def follow(self, block: Block) -> None:
        if block.title:
            (self.folder / block.title).parent.mkdir(exist_ok=True)
            (self.folder / block.title).write_text(block.text)
        elif block.language == "yaml":
            self.load(block)
        elif block.language == "python":
            self.execute(block)
        else:
            for command in block.commands:
                self.run(command)

    def load(self, block: Block) -> None:
        """A recipe, some of its sections, or names of a search space."""
        shown = yaml.safe_load(block.text)
        if any("." in key for key in shown):
            shown = {"search": {"space": shown}}
        content = yaml.safe_load(recipe_text("digits-search" if shown.get("search") else "digits-prune50")[0])
        if shown.get("search"):
            shown["search"] = {**content["search"], **shown["search"]}
        content.update(shown)
        path = self.folder / "shown.yml"
        path.write_text(yaml.safe_dump(content))
        load_recipe(str(path))

    def execute(self, block: Block) -> None:
        if block.page in ELSEWHERE_PYTHON:
            path, test = ELSEWHERE_PYTHON[block.page]
            assert test in (ROOT / path).read_text()
            return
        if "zskd_nni.research.explorer.widget " in block.text:
            pytest.importorskip("ipywidgets")
        text = block.text
        for large, small in SMALLER.items():
            text = text.replace(large, small)
        if block.page not in self.namespaces:
            self.namespaces[block.page] = GIVEN.get(block.page, dict)()
        exec(compile(text, block.page, "exec"), self.namespaces[block.page])

    def run(self, command: str) -> None:
        words = shlex.split(command, comments=True)
        known = shlex.join(words)
        if known in self.done:
            return
        self.done.add(known)
        if known in ELSEWHERE:
            path, test = ELSEWHERE[known]
            assert f"def {test}(" in (ROOT / path).read_text()
        elif words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True, timeout=60)
        elif words[0] == "torchrun":  # by one process here; tests/faults/test_many_workers.py starts the launcher
            given = launcher_arguments(words[1:])
            assert (given.module, given.training_script) == (True, "zskd_nni")
            self.zskd_nni(given.training_script_args)
        elif words[:2] == ["pip", "install"]:
            self.pip_install(words[2:])
        elif words[0] == "zskd-nni":
            target = Path(words[words.index(">") + 1]) if ">" in words else None
            arguments = words[1 : words.index(">")] if target else words[1:]
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                self.zskd_nni(arguments)
            if target:
                target.write_text(printed.getvalue())
        else:
            pytest.fail(f"nobody knows how to run {command!r}: extend this test, or take the command off the page")

    def pip_install(self, arguments: list[str]) -> None:
        if "constraints.txt" in arguments:
            arguments[arguments.index("constraints.txt")] = str(ROOT / "constraints.txt")
        own = any(word.startswith("./") for word in arguments)  # a package that a page has the reader write
        run = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-index", "--no-build-isolation",
             "--no-input", "--disable-pip-version-check", *arguments],
            cwd=self.folder if own else ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert "does not provide the extra" not in run.stderr

    def zskd_nni(self, arguments: list[str]) -> None:
        if arguments[0] == "demo":  # takes no changes; it is this command
            arguments = ["compress", "digits-prune50", *arguments[1:]]
        if arguments[0] in ("compress", "synthesize", "distill"):
            changes = small_changes(arguments)
            if "--size" in arguments:
                arguments[arguments.index("--size") + 1] = "60"
            if "--threads" not in arguments:
                arguments += ["--threads", "1"]
            arguments += ["--quiet", *(word for change in changes for word in ("--set", change))]
        if "cuda" in arguments and not torch.cuda.is_available():
            with pytest.raises(UserError, match="no usable GPU"):
                app(arguments, standalone_mode=False)
            return
        if "--dry-run" in arguments:  # of seconds; the page's test images are black, and no teacher is right on them
            measured = "evaluation" in " ".join(arguments) or load_recipe(arguments[1]).recipe.evaluation is not None
            app([*arguments, *(["--set", "evaluation.any_teacher=true"] if measured else [])], standalone_mode=False)
            return
        if arguments[0] in ("compress", "distill"):
            own = not load_recipe(arguments[1]).recipe.teacher.model.startswith("zoo:")
            kind = f"{arguments[0]} {'a network of the reader' if own else 'a network of the zoo'}"
            if kind in self.done:
                check(arguments)
                return
            self.done.add(kind)
        app(arguments, standalone_mode=False)


def check(arguments: list[str]) -> None:
    """All that a command does before the long work: its options, the recipe, the teacher, what NNI says to it."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    given = commands[arguments[0]].make_context(arguments[0], arguments[1:]).params
    loaded = load_recipe(given["recipe"], given["changes"], given["seed"], given["scale"])
    Run(loaded, given["out"], device=given["device"], impressions=given.get("impressions"), quiet=True)


def small_changes(arguments: list[str]) -> list[str]:
    recipe = load_recipe(arguments[1]).recipe
    changes = list(SMALL)
    if "transfer.method=zskt" in arguments:  # makes no impressions
        changes = [change for change in changes if "synthesis" not in change]
        changes += ["transfer.width=8", "transfer.figures=20", "distillation.batch=16"]
    if arguments[0] == "compress":
        changes.append("controls=[]")
        if recipe.evaluation is not None and not recipe.teacher.model.startswith("zoo:"):
            changes.append("evaluation.any_teacher=true")  # it was trained for seconds
    pruning, quantization = recipe.compression.pruning, recipe.compression.quantization
    if pruning is not None:
        changes.append("compression.pruning.steps=4")
        changes += ["compression.pruning.schedule.interval=1"] if pruning.schedule else []
        changes += ["compression.pruning.schedule.total_times=2"] if pruning.schedule else []
    if quantization is not None:
        changes += ["compression.quantization.steps=4", "compression.quantization.calibration_images=100"]
    return changes


@pytest.mark.slow
def test_what_is_shown_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("ZSKD_NNI_DATA", raising=False)
    torch.save({"model": resnet18(num_classes=10).state_dict()}, tmp_path / "my-resnet18.pt")  # README's reader has it
    reader = Reader(tmp_path)
    for page in pages():
        for block in blocks(page):
            try:
                reader.follow(block)
            except Exception as error:
                raise AssertionError(f"{page} shows what does not work: {block.text}") from error
    started = {command.split()[1] for command in reader.done if command.startswith("zskd-nni")}
    assert {"demo", "compress", "synthesize", "distill", "evaluate", "show", "recipes"} <= started
    assert len(reader.done) > 25
    assert {"compress a network of the reader", "compress a network of the zoo"} <= reader.done
    small, int8 = (tmp_path / "out/my-resnet" / name for name in ("student.onnx", "student-int8.onnx"))
    assert int8.stat().st_size < 0.4 * small.stat().st_size < 0.2 * (tmp_path / "checkpoint.pt").stat().st_size
    assert (tmp_path / "student-int8.onnx").exists()


def test_an_unknown_command_fails(tmp_path: Path) -> None:
    page = "text\n\n    zskd-nni recipes\n    jupyter nothing  # comment\n"
    (token,) = [token for token in MarkdownIt().parse(page) if token.type == "code_block"]
    block = Block("a page", "sh", "", token.content)
    assert block.commands == ["zskd-nni recipes", "jupyter nothing  # comment"]
    with pytest.raises(pytest.fail.Exception, match="nobody knows how to run 'jupyter"):
        Reader(tmp_path).run(block.commands[1])
    with pytest.raises(UserError, match="no network"):
        Reader(tmp_path).zskd_nni(["compress", "digits-prune50", "--out", "x", "--set", "teacher.model=zoo:lenet6"])


def test_make_targets_in_running_text_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in pages():
        named = set(re.findall(r"`make ([a-z-]+)", (ROOT / page).read_text()))
        assert named <= targets, f"{page}: {named - targets}"
