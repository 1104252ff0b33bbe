"""Workers that torchrun starts make one store, and some of them die: no interleaving, no loss, no work done twice."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
from amounts import amount
from helpers import finished_shards, is_one_sentence, make_store, run_cli, same_store, start_cli, wait_for
from launching import append, children, launch, start_launch, start_torchrun

from zskd_nni.runtime.distributed import team
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json, write_json
from zskd_nni.runtime.locks import FolderInUseError, one_of_the_writers, only_writer
from zskd_nni.synthesis import ImpressionStore, store

SIZE = {"size": 240, "shard": 10, "max_steps": 10}
SHARDS = 24
ROUNDS = amount(2, 20)
COMMAND = (
    *("synthesize", "digits-prune50", "--size", 240, "--threads", 1, "--quiet"),
    *("--set", "transfer.synthesis.shard=10", "--set", "transfer.synthesis.max_steps=60"),
)


def worker(folder: str, log: str, seconds: float, limit: str) -> None:
    """In each process: writes down who it is and which shards it made, each of which takes some time.

    It waits where the group has made as many shards as the file ``limit`` says: however slow the machine is, whoever
    kills some of them finds them at work.
    """
    append(log, f"{os.getpid()} started")
    real = store.ImpressionStore.write

    def write(self, index, *more, **options):
        time.sleep(seconds)
        wait_for(lambda: not Path(limit).exists() or of_this_start(Path(log)) < read_json(Path(limit)), 300)
        real(self, index, *more, **options)
        append(log, f"{os.getpid()} {index}")

    store.ImpressionStore.write = write
    whole = make_store(folder, **SIZE)
    assert whole.missing() == [], "whoever comes back has the whole store"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "store"
    make_store(folder, **SIZE)
    return folder


def started(log: Path) -> list[int]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [int(line.split()[0]) for line in lines if line.endswith("started")]


def made(log: Path) -> list[int]:
    return [int(line.split()[1]) for line in log.read_text().splitlines() if not line.endswith("started")]


def of_this_start(log: Path) -> int:
    """Shards made since the first of the last four processes started."""
    lines = log.read_text().splitlines()
    starts = [place for place, line in enumerate(lines) if line.endswith("started")]
    first = starts[(len(starts) - 1) // 4 * 4]
    return sum(not line.endswith("started") for line in lines[first:])


def notes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("shard-*.json")) if folder.exists() else []


@pytest.mark.parametrize("count", [2, 4])
def test_as_many_as_there_are_make_the_same_store(count: int, tmp_path: Path, whole: Path) -> None:
    log, folder, limit = tmp_path / "log", tmp_path / "store", tmp_path / "limit"
    launch(count, worker, str(folder), str(log), 0.0, str(limit))
    assert len(set(started(log))) == count
    assert sorted(made(log)) == list(range(SHARDS))
    assert same_store(whole, folder)
    assert list(ImpressionStore.open(folder).manifest["shards"]) == [str(index) for index in range(SHARDS)]


def wait_for_group(log: Path, number: int, shards: int) -> list[int]:
    """The four of the ``number``-th start, once all of them are there and have made so many shards."""

    def at_work() -> bool:
        lines = log.read_text().splitlines() if log.exists() else []
        starts = [place for place, line in enumerate(lines) if line.endswith("started")]
        return len(starts) == 4 * number and len(lines) - 1 - starts[-1] >= shards

    wait_for(at_work, 300)
    return started(log)[-4:]


@pytest.mark.parametrize("number", range(ROUNDS))
def test_four_workers_of_which_two_die(number: int, tmp_path: Path, whole: Path) -> None:
    """At once or one after the other; the launcher starts the group anew, which divides what is missing."""
    chance = random.Random(number)
    log, folder, limit = tmp_path / "log", tmp_path / "store", tmp_path / "limit"
    dying = [2] if number % 2 else [1, 1]
    write_json(limit, 6)
    launcher = start_launch(4, worker, str(folder), str(log), 0.03, str(limit), restarts=len(dying))
    for start, count in enumerate(dying, 1):
        group = wait_for_group(log, start, chance.randint(1, 5))
        with pytest.raises(FolderInUseError):
            make_store(folder, **SIZE)
        for pid in chance.sample(group, count):
            os.kill(pid, signal.SIGKILL)
        assert len(made(log)) < SHARDS - 4, "they were killed in the middle of the work"
    limit.unlink()
    launcher.join()
    assert launcher.exitcode == 0
    assert len(started(log)) == 4 * (1 + len(dying))
    assert len(made(log)) == len(set(made(log))), "no finished shard is made twice"
    assert len(set(range(SHARDS)) - set(made(log))) <= 2, "one that died may not have told of its last"
    assert notes(folder) == []
    assert same_store(whole, folder)


def test_one_process_takes_up_what_a_dead_launch_left(tmp_path: Path, whole: Path) -> None:
    log, folder, limit = tmp_path / "log", tmp_path / "store", tmp_path / "limit"
    write_json(limit, 12)
    launcher = start_launch(4, worker, str(folder), str(log), 0.03, str(limit))
    victim, *others = wait_for_group(log, 1, 6)
    os.kill(victim, signal.SIGKILL)
    launcher.join()
    assert launcher.exitcode == 1, "nobody starts them anew"
    assert not any(psutil.pid_exists(pid) for pid in others)
    left = notes(folder)
    assert 6 <= len(left) < SHARDS
    assert finished_shards(folder) == 0, "the manifest tells of none of them yet"
    opened = ImpressionStore.open(folder)
    assert SHARDS - len(opened.missing()) == len(left)
    before = {name: (folder / name).with_suffix(".safetensors").stat().st_ino for name in left[2:]}
    (folder / left[0]).write_text("{}")  # damaged: that shard is made again
    (folder / left[1]).unlink()
    make_store(folder, **SIZE)
    assert all((folder / name).with_suffix(".safetensors").stat().st_ino == before[name] for name in before)
    assert notes(folder) == []
    assert same_store(whole, folder)


def test_whoever_is_left_of_a_launch_keeps_others_out(tmp_path: Path) -> None:
    """Also when the first of it is gone, who took the lock."""
    with one_of_the_writers(tmp_path, first=False):
        with one_of_the_writers(tmp_path, first=False):
            pass
        for intruder in (only_writer(tmp_path), one_of_the_writers(tmp_path, first=True)):
            with pytest.raises(FolderInUseError), intruder:
                pass
    with only_writer(tmp_path), pytest.raises(FolderInUseError), one_of_the_writers(tmp_path, first=False):
        pass
    with one_of_the_writers(tmp_path, first=True), one_of_the_writers(tmp_path, first=False):
        pass


def told(log: str, folder: str, other_teacher: bool) -> None:
    """In each process: writes down the sentence that it ends with."""
    try:
        make_store(folder, **SIZE, teacher_seed=team().rank if other_teacher else 0)
    except UserError as error:
        append(log, str(error))
        raise


@pytest.mark.parametrize("other_teacher", [False, True], ids=["a run is at work", "another teacher"])
def test_a_launch_that_cannot_work_is_told(other_teacher: bool, tmp_path: Path) -> None:
    """One process says what is wrong, the other that one has ended."""
    log, folder = tmp_path / "log", tmp_path / "store"
    folder.mkdir()
    with nullcontext() if other_teacher else only_writer(folder):
        launcher = start_launch(2, told, str(log), str(folder), other_teacher)
        launcher.join()
    assert launcher.exitcode == 1
    sentences = log.read_text().splitlines()
    reason = "impressions of another run (teacher is" if other_teacher else "Another run is at work in"
    assert sum(reason in sentence for sentence in sentences) == 1
    assert all(reason in sentence or "Another process of this launch has ended" in sentence for sentence in sentences)
    assert finished_shards(folder) == 0 and notes(folder) == []


# The launcher itself, as a user starts it.


@pytest.mark.slow
@pytest.mark.parametrize("count", amount([2], [2, 4]))
def test_torchrun_kill_and_compare(count: int, tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    alone = run_cli(*COMMAND, "--out", one)
    assert alone.returncode == 0, alone.stderr
    process = start_torchrun(count, *COMMAND, "--out", many, restarts=1)
    try:
        wait_for(lambda: len(notes(many)) >= 3, 300)
        group = children(process.pid)
        assert len(group) == count
        os.kill(group[-1], signal.SIGKILL)
        written, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "240 impressions in" in written and written.count("impressions in") == 1
    assert "Traceback" not in errors
    assert same_store(one, many)


def of_torchrun(**changes: object) -> dict[str, str]:
    """What torchrun puts into the environment of one of two processes."""
    told = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RESTART_COUNT": 0}
    told = {"TORCHELASTIC_RUN_ID": "x", **told, **changes}
    return {**os.environ, **{name: str(value) for name, value in told.items()}}


def test_other_commands_are_not_for_several() -> None:
    result = start_cli("recipes", env=of_torchrun())
    assert result.returncode == 2
    assert is_one_sentence(result.stderr) and "recipes is one process" in result.stderr


def test_several_machines_need_a_store_of_their_own_for_each_restart(tmp_path: Path) -> None:
    environment = of_torchrun(LOCAL_WORLD_SIZE=1, LOCAL_RANK=0, TORCHELASTIC_USE_AGENT_STORE=True)
    result = start_cli(*COMMAND, "--out", tmp_path / "out", env=environment)
    assert result.returncode == 2
    assert is_one_sentence(result.stderr) and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in result.stderr
