"""Killing a run at a chosen step or at a chosen moment of a chosen write, and counting what there is to choose from."""

from __future__ import annotations

import builtins
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import _context, start_process
from subjects import SUBJECTS

from zskd_nni.runtime import files, signals

NEVER = 1 << 40


@dataclass(frozen=True)
class Kill:
    """One kill, for the log.

    Attributes:
        subject: what was killed.
        kind: at a step, at a moment, at a write.
        position: how far the whole work was, in [0, 1].
    """

    subject: str
    kind: str
    position: float

    @property
    def inside(self) -> bool:
        """Strictly between the first and the last shard or step."""
        return 0 < self.position < 1


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # a signal to oneself may come a moment later


class _Steps:
    """Counts the places where a run's state is whole, and dies at one of them."""

    def __init__(self, at: int, meter: Any = None) -> None:
        self.count, self.at, self.meter, self.real = 0, at, meter, signals.check

    def check(self) -> None:
        self.count += 1
        if self.meter is not None:
            self.meter.value = self.count
        if self.count == self.at:
            _die()
        self.real()


class _Writes:
    """Counts moments of writing: before and in the middle of a write, around each flush, rename and removal."""

    def __init__(self, at: int) -> None:
        self.count, self.at = 0, at
        self.fsync, self.replace, self.unlink = os.fsync, os.replace, Path.unlink

    def moment(self) -> None:
        self.count += 1
        if self.count == self.at:
            _die()

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            self.moment()
            result = call(*arguments, **options)
            self.moment()
            return result

        return watched

    def open(self, path: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        file = builtins.open(path, mode, *more, **options)  # noqa: SIM115
        if "w" in mode or "x" in mode:
            self.moment()
            return _Halves(file, self.moment)
        return file

    def install(self) -> None:
        os.fsync, os.replace = self.around(self.fsync), self.around(self.replace)
        Path.unlink = self.around(self.unlink)  # type: ignore[method-assign]
        files.open = self.open  # type: ignore[attr-defined]


class _Halves:
    """A file whose content reaches the disk in two halves."""

    def __init__(self, file: Any, between: Callable[[], None]) -> None:
        self.file, self.between = file, between

    def __enter__(self) -> _Halves:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, content: bytes) -> None:
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        self.between()
        self.file.write(content[len(content) // 2 :])


def run_in_child(name: str, folder: str, step: int, write: int, meter: Any, counts: str | None) -> None:
    """In another process: the subject, until the ``step``-th step or the ``write``-th moment of writing."""
    steps, writes = _Steps(step, meter), _Writes(write)
    signals.check = steps.check  # type: ignore[assignment]
    writes.install()
    SUBJECTS[name].run(Path(folder))
    if counts is not None:
        Path(counts).write_text(json.dumps({"steps": steps.count, "writes": writes.count}))


def start(name: str, folder: Path, step: int = NEVER, write: int = NEVER, meter: Any = None) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    return start_process(run_in_child, name, str(folder), step, write, meter, None)


def finish(name: str, folder: Path) -> None:
    process = start(name, folder)
    process.join()
    assert process.exitcode == 0, f"{name} could not be resumed"


def undisturbed(name: str, folder: Path) -> tuple[dict[str, str], dict[str, int]]:
    """What a run leaves that nobody kills, and how many steps and moments of writing it has."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = folder / "counts.json"
    process = start_process(run_in_child, name, str(folder), NEVER, NEVER, None, str(counts))
    process.join()
    assert process.exitcode == 0
    counted = json.loads(counts.read_text())
    counts.unlink()
    return SUBJECTS[name].finished(folder), counted


def kill_at_step(name: str, folder: Path, step: int) -> bool:
    """Whether it was killed; it may have finished first."""
    process = start(name, folder, step=step)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def kill_at_write(name: str, folder: Path, write: int) -> bool:
    process = start(name, folder, write=write)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def kill_at_a_moment(name: str, folder: Path, step: int, moments: random.Random) -> bool:
    """From outside, somewhere behind the ``step``-th step, wherever that finds it."""
    meter = _context.Value("q", 0, lock=False)
    process = start(name, folder, meter=meter)
    while meter.value < step and process.exitcode is None:
        time.sleep(0.0005)
    time.sleep(moments.uniform(0, 0.01))
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0
