"""Several runs on one folder, and some of them die: no interleaving, no loss, no work done twice."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
from amounts import amount
from helpers import _context, make_store, same_store, start_process

from zskd_nni.runtime.errors import UserError
from zskd_nni.synthesis import ImpressionStore, store

SIZE = {"size": 120, "shard": 10, "max_steps": 10}
ROUNDS = amount(3, 20)


def worker(folder: str, log: str, refused, keep_trying: bool) -> None:
    """In another process: tries until it is its turn; writes down which shards it made."""
    real = store.ImpressionStore.write

    def write(self, index, *more, **options):
        real(self, index, *more, **options)
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {index}\n")

    store.ImpressionStore.write = write
    while True:
        try:
            make_store(folder, **SIZE)
            return
        except UserError as error:
            assert "Another run is at work" in str(error)
            refused.value += 1
            if not keep_trying:
                os._exit(2)
            time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "store"
    make_store(folder, **SIZE)
    return folder


@pytest.mark.parametrize("number", range(ROUNDS))
def test_two_runs_on_one_folder(tmp_path: Path, whole: Path, number: int) -> None:
    """One works, the other is told; together they make every shard once."""
    log, folder = tmp_path / "log", tmp_path / "store"
    refused = _context.Value("q", 0)
    running = [start_process(worker, str(folder), str(log), refused, False) for _ in range(2)]
    for process in running:
        process.join()
    codes = sorted(process.exitcode for process in running)
    assert codes in ([0, 2], [0, 0]), "the second comes while the first works, or when all is done"
    made = [int(line.split()[1]) for line in log.read_text().splitlines()]
    assert sorted(made) == list(range(12))
    assert same_store(whole, folder)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_four_workers_of_which_two_die(tmp_path: Path, whole: Path, number: int) -> None:
    chance = random.Random(number)
    log, folder = tmp_path / "log", tmp_path / "store"
    refused = _context.Value("q", 0)
    running = [start_process(worker, str(folder), str(log), refused, True) for _ in range(4)]
    killed = 0
    for goal in sorted(chance.sample(range(1, 9), 2)):
        victim = None
        while victim is None and done(folder) < 12:
            time.sleep(0.002)
            at_work = last_at_work(log) if done(folder) >= goal else ""
            victim = next((p for p in running if str(p.pid) == at_work and p.exitcode is None), None)
        if victim is not None:
            victim.kill()
            victim.join()
            killed += 1
    for process in running:
        process.join()
    assert killed == 2
    assert sum(process.exitcode == 0 for process in running) == 2
    made = [int(line.split()[1]) for line in log.read_text().splitlines()]
    assert len(set(range(12)) - set(made)) <= killed, "one that died may not have told of its last"
    assert len(made) == len(set(made)), "no finished shard is made twice"
    assert ImpressionStore.open(folder).missing() == []
    assert same_store(whole, folder)


def last_at_work(log: Path) -> str:
    """Who wrote the last whole line; nobody while the file is new, or a line is half on its way."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return whole[-1].split()[0] if whole else ""


def done(folder: Path) -> int:
    try:
        return len(json.loads((folder / "manifest.json").read_text())["shards"])
    except FileNotFoundError:
        return 0
