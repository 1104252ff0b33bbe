"""SIGTERM and Ctrl-C, once and repeatedly: the state is kept, the exit code is right, the run continues."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from amounts import LONG, amount, only_long
from helpers import _context, digits_network, make_store, start_process
from subjects import SUBJECTS
from test_mutations import TINY

from zskd_nni.models.serialization import save_network
from zskd_nni.runtime import signals
from zskd_nni.runtime.tensors import load_tensors

LONGER = {**TINY, "transfer": {"size": 120, "held_out": 12, "synthesis": {"max_steps": 12, "shard": 12}}}


def run_command(arguments: list[str], folder: str, meter, at: int, numbers: list[int]) -> None:
    """In another process: a command that gets signals at its ``at``-th step, or when it opens its ``at``-th file."""
    os.chdir(folder)
    sys.argv = ["zskd-nni", *arguments]
    real, pending = signals.check, list(numbers)

    def check() -> None:
        meter.value += 1
        if meter.value == at:
            while pending:
                os.kill(os.getpid(), pending.pop(0))
        real()

    signals.check = check
    with open("stderr", "w") as errors, open("stdout", "w") as output:
        sys.stderr, sys.stdout = errors, output
        from zskd_nni.cli import main

        try:
            main()
        finally:
            errors.flush()


def counted(arguments: list[str], folder: Path, at: int = -1, signals: tuple[int, ...] = ()) -> tuple[int, int]:
    meter = _context.Value("q", 0, lock=False)
    process = start_process(run_command, arguments, str(folder), meter, at, list(signals))
    process.join()
    return process.exitcode, meter.value


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "tiny.yml").write_text(yaml.safe_dump(TINY))
    half = {**LONGER, "student": {"model": "zoo:lenet5_half"}}
    (folder / "longer.yml").write_text(yaml.safe_dump(LONGER))
    (folder / "half.yml").write_text(yaml.safe_dump({key: half[key] for key in half if key != "compression"}))
    make_store(folder / "store", size=20, shard=10)
    description = {"input": {"shape": [1, 32, 32]}}
    save_network(digits_network(), "zoo:lenet5", {}, folder / "s.safetensors", folder / "s.json", extra=description)
    return folder


COMMANDS = {
    "synthesize": ["synthesize", "longer.yml", "--out", "{out}", "--quiet", "--threads", "1"],
    "compress": ["compress", "longer.yml", "--out", "{out}", "--quiet", "--threads", "1"],
    "distill": ["distill", "half.yml", "--out", "{out}", "--quiet", "--threads", "1"],
    "train-teacher": ["train-teacher", "lenet5-digits", "--epochs", "1", "--out", "{out}", "--quiet", "--threads", "1"],
    "evaluate": ["evaluate", "s.json", "--data", "digits"],
    "show": ["show", "store", "--out", "{out}.png"],
}
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.mark.parametrize(
    "name", [name if name not in ("compress", "distill") else pytest.param(name, marks=only_long) for name in COMMANDS]
)
def test_each_command(place: Path, name: str) -> None:
    """One signal, two, three and a mixture, at steps drawn at random; then the command again, to its end."""
    chance = random.Random(name)
    mixtures = [
        (signal.SIGTERM,),
        (signal.SIGINT,),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
        (signal.SIGINT, signal.SIGTERM, signal.SIGTERM),
    ]
    arguments = [word.format(out=f"whole-{name}") for word in COMMANDS[name]]
    code, steps = counted(arguments, place)
    assert code == 0, (place / "stderr").read_text()
    assert steps > 0
    arguments = [word.format(out=f"out-{name}") for word in COMMANDS[name]]
    for mixture in mixtures if LONG else chance.sample(mixtures, 3):
        code, reached = counted(arguments, place, chance.randrange(1, max(2, steps // 8)), mixture)
        said = (place / "stderr").read_text()
        assert code in {CODES[signum] for signum in mixture[:2]}, said
        assert "Traceback" not in said
        assert "the same command continues" in said or len(mixture) > 2
        assert reached < steps or steps == 1
    code, _ = counted(arguments, place)
    assert code == 0, (place / "stderr").read_text()
    ends = {
        "synthesize": ["shard-00003.safetensors", "shard-00009.safetensors"],
        "compress": ["student.safetensors", "student.onnx", "impressions/shard-00004.safetensors"],
        "distill": ["student.safetensors", "student.onnx"],
        "train-teacher": ["lenet5-digits.safetensors"],
    }
    for file in ends.get(name, []):
        assert (place / f"out-{name}" / file).read_bytes() == (place / f"whole-{name}" / file).read_bytes()
    assert not list(place.rglob(".*.tmp"))


@pytest.mark.parametrize("name", ["synthesis", "student", "zskt", "fused", "arbitrary set"])
def test_two_signals_from_outside(name: str, tmp_path: Path) -> None:
    """At any moment, the second a moment behind the first."""
    chance = random.Random(name)
    for turn in range(amount(1, 4)):
        meter = _context.Value("q", 0, lock=False)
        process = start_process(stoppable_subject, name, str(tmp_path), meter)
        goal = chance.randrange(2, 6)
        while meter.value < goal and process.exitcode is None:
            time.sleep(0.001)
        for _ in range(2):
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGTERM if turn % 2 else signal.SIGINT)
                time.sleep(chance.uniform(0, 0.003))
        process.join()
        assert process.exitcode in (0, 143 if turn % 2 else 130)
        for path in tmp_path.rglob("*.safetensors"):
            load_tensors(path)
        for path in tmp_path.rglob("*.json"):
            json.loads(path.read_text())
    whole = tmp_path / "whole"
    for folder in (whole, tmp_path):
        folder.mkdir(exist_ok=True)
        process = start_process(SUBJECTS[name].run, folder)
        process.join()
        assert process.exitcode == 0
    assert SUBJECTS[name].finished(tmp_path) == SUBJECTS[name].finished(whole)


def stoppable_subject(name: str, folder: str, meter) -> None:
    real = signals.check

    def check() -> None:
        meter.value += 1
        real()

    signals.check = check
    try:
        with signals.stoppable():
            SUBJECTS[name].run(Path(folder))
    except signals.Interrupted as stop:
        os._exit(128 + stop.signum)
