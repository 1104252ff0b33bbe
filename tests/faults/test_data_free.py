"""Data-free, as the operating system sees it: which files a run opens, and whom it connects to.

Python tells an audit hook of every file that is opened and of every connection. Safetensors opens files by itself,
which is told to the same hook.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from amounts import amount, only_long
from helpers import start_process
from test_numbers import QUICK

from zskd_nni.models.zoo.trained import trained_names
from zskd_nni.recipes.load import packaged_names, recipe_text
from zskd_nni.runtime.files import sha256_of_file

TINY = [
    "transfer.size=24",
    "transfer.held_out=8",
    "compression.pruning.steps=4",
    "distillation.steps=4",
    "distillation.batch=8",
    "controls=[noise]",
]
SYNTHESIS = ["transfer.synthesis.max_steps=3", "transfer.synthesis.shard=12"]


def runnable() -> list[str]:
    """The packaged recipes whose teacher comes with the package."""
    shipped = {f"zoo:{name}" for name in trained_names()}
    return [name for name in packaged_names() if yaml.safe_load(recipe_text(name)[0])["teacher"]["weights"] in shipped]


def changes_for(name: str) -> list[str]:
    content, changes = yaml.safe_load(recipe_text(name)[0]), [*TINY, *SYNTHESIS]
    compression = content.get("compression") or {}
    if compression.get("pruning") is None:
        changes = [change for change in changes if not change.startswith("compression.pruning")]
    elif compression["pruning"].get("schedule"):
        changes.append("compression.pruning.schedule={name: AGPPruner, interval: 1, total_times: 2}")
    if compression.get("quantization"):
        changes += ["compression.quantization.steps=4", "compression.quantization.calibration_images=16"]
    return changes


def watched_run(recipe: str, changes: list[str], out: str, root: str, found: str) -> None:
    """In another process: a recipe, and every file it opens with the part of the run it was opened in."""
    from zskd_nni.pipeline import Run
    from zskd_nni.recipes.load import load_recipe
    from zskd_nni.runtime import tensors

    seen: list[tuple[str, str, str]] = []
    phase = ["work"]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and not isinstance(arguments[0], int) and arguments[0] is not None:
            seen.append((phase[-1], "open", os.path.realpath(os.fsdecode(arguments[0]))))
        elif event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo"):
            seen.append((phase[-1], event, repr(arguments[1:])))
        elif event == "subprocess.Popen":
            seen.append((phase[-1], event, os.path.basename(str(arguments[0]))))

    def during(name: str, method: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            phase.append(name)
            try:
                return method(*arguments, **options)
            finally:
                phase.pop()

        return run

    real = tensors.safe_open

    def safe_open(path: Any, *arguments: Any, **options: Any) -> Any:
        sys.audit("open", str(path), "rb", 0)
        return real(path, *arguments, **options)

    tempfile.gettempdir()  # its first call tries the folder with a file of chance's name
    tensors.safe_open = safe_open
    sys.addaudithook(hook)
    for name, method in (("check", "_check"), ("evaluation", "_test_data")):
        setattr(Run, method, during(name, getattr(Run, method)))
    Run(load_recipe(recipe, changes), out, root=Path(root), quiet=True).compress()
    Path(found).write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data sets: test data that may be measured on, training data that nobody may touch."""
    folder, draws = tmp_path_factory.mktemp("root"), np.random.default_rng(0)
    for name in ("mnist", "fashion-mnist", "cifar10"):
        for split in ("train", "test"):
            images = draws.integers(0, 256, (40, 28, 28), dtype=np.uint8)
            np.savez(folder / f"{name}-{split}.npz", images=images, labels=np.arange(40) % 10)
    return folder


def watch(recipe: str, changes: list[str], tmp_path: Path, root: Path) -> list[tuple[str, str, str]]:
    found = tmp_path / "found.json"
    process = start_process(watched_run, recipe, changes, str(tmp_path / "out"), str(root), str(found))
    process.join()
    assert process.exitcode == 0
    return [tuple(entry) for entry in json.loads(found.read_text())]


def installed() -> list[Path]:
    import zskd_nni

    own, tests = Path(zskd_nni.__file__).parent, Path(__file__)  # whose source torch reads where it traces
    return [Path(place).resolve() for place in (sys.prefix, sys.base_prefix, own, tests)]


# Python and its libraries look at these to know where they run; none is a file of anybody's.
SYSTEM = ("/proc/", "/sys/", "/dev/", "/etc/", "/usr/share/zoneinfo", "/usr/share/fonts", "/usr/lib", "/lib")


def strangers(seen: list[tuple[str, str, str]], allowed: list[Path]) -> list[tuple[str, str, str]]:
    """What was opened that lies neither in the install nor in ``allowed``; and data that the install brings.

    NNI's ``ModelSpeedup`` keeps a nameless file in the system's folder for temporary ones; it is nobody's.
    """
    found = []
    for phase, event, what in seen:
        if event != "open":
            if not (event == "subprocess.Popen" and what == "git"):
                found.append((phase, event, what))
            continue
        path = Path(what)
        inside = any(folder == path or folder in path.parents for folder in (*installed(), *allowed))
        is_data = "datasets/data" in what and path.suffix not in (".py", ".pyc")
        temporary = re.fullmatch(rf"{re.escape(os.path.realpath(tempfile.gettempdir()))}(/tmp[a-z0-9_]{{8}})?", what)
        cache = ("matplotlib" in what and ".cache" in what) or "fontlist" in what or "MPLCONFIG" in what
        if is_data or not (inside or what.startswith(SYSTEM) or cache or temporary):
            found.append((phase, event, what))
    return found


def chosen() -> list[str]:
    names = runnable()
    return names if amount(0, 1) else ["mnist-taylor50"]


@pytest.mark.parametrize("name", chosen())
def test_packaged_recipes_open_nothing_but_their_own(name: str, tmp_path: Path, root: Path) -> None:
    """Test data is opened to be checked before the work and to be measured on behind it, and never between."""
    seen = watch(name, changes_for(name), tmp_path, root)
    assert len([entry for entry in seen if entry[1] == "open"]) > 20, "the hook hears"
    found = strangers(seen, [tmp_path / "out"])
    assert {phase for phase, _, _ in found} <= {"check", "evaluation"}, found
    assert found, "the test data itself is seen"
    for _, event, what in found:
        assert event == "open"
        assert what.endswith(("digits.csv.gz", "-test.npz")), found


@pytest.mark.parametrize("method", list(QUICK) if amount(0, 1) else ["ats", "zskt"])
def test_every_method_opens_nothing_but_its_own(method: str, tmp_path: Path, root: Path) -> None:
    given = "{" + ", ".join(f"{key}: {json.dumps(value)}" for key, value in QUICK[method].items()) + "}"
    options = yaml.safe_load(given)
    preset = {"ats": "paper", "zskt": "paper", "sts": "paper"}.get(method, "best")
    changes = [
        *(change for change in TINY if not change.startswith("controls")),
        "controls=[]",
        "evaluation=null",
        "compression.quantization=null",
        f"transfer={json.dumps({'method': method, 'preset': preset, 'size': 24, 'held_out': 20, **options})}",
    ]
    changes = [change for change in changes if not change.startswith(("transfer.size", "transfer.held_out"))]
    found = strangers(watch("digits-prune50", changes, tmp_path, root), [tmp_path / "out"])
    assert found == []


def test_arbitrary_sets_open_their_named_source_alone(tmp_path: Path, root: Path) -> None:
    transfer = {"method": "ats", "preset": "paper", "size": 20, "held_out": 10, "sources": ["mnist"], "split": "train"}
    changes = [
        "compression.pruning.steps=4",
        "distillation.steps=4",
        "distillation.batch=8",
        "controls=[]",
        "evaluation=null",
        "compression.quantization=null",
        f"transfer={json.dumps({**transfer, 'balanced': False, 'fill': 'none'})}",
    ]
    found = strangers(watch("digits-prune50", changes, tmp_path, root), [tmp_path / "out"])
    assert {Path(what).name for _, _, what in found} == {"mnist-train.npz"}


@only_long
def test_the_student_does_not_depend_on_the_test_data(tmp_path: Path) -> None:
    """The same bytes with test data and without."""
    students = []
    for number, evaluation in enumerate(("evaluation={data: digits}", "evaluation=null")):
        changes = [*changes_for("digits-prune50"), "controls=[]", evaluation]
        out = tmp_path / str(number)
        process = start_process(watched_run, "digits-prune50", changes, str(out), str(tmp_path), str(tmp_path / "f"))
        process.join()
        assert process.exitcode == 0
        names = ("student.safetensors", "student-int8.onnx", "impressions/shard-00000.safetensors")
        students.append([sha256_of_file(out / name) for name in names])
    assert students[0] == students[1]


def test_the_hook_would_see_it(tmp_path: Path, root: Path) -> None:
    """The ceiling that learns on real data is caught by the same hook."""
    changes = [
        *(change for change in TINY if not change.startswith("controls")),
        "controls=[]",
        "evaluation=null",
        "compression.quantization=null",
        "transfer={method: real, data: mnist, size: 24, held_out: 8}",
    ]
    found = strangers(watch("digits-prune50", changes, tmp_path, root), [tmp_path / "out"])
    assert {Path(what).name for _, _, what in found} == {"mnist-train.npz"}
    assert {phase for phase, _, _ in found} == {"work"}
