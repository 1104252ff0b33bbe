"""``kill -9`` at every kind of moment: a resumed run ends byte for byte like an undisturbed one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from amounts import LONG, amount
from killing import Kill, finish, kill_at_a_moment, kill_at_step, kill_at_write, undisturbed
from subjects import SUBJECTS

from zskd_nni.runtime.tensors import load_sealed, load_tensors

KILLS: list[Kill] = []
QUICK = [name for name in SUBJECTS if name != "recipe"]
NAMES = list(SUBJECTS) if LONG else QUICK


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    """What each subject leaves undisturbed, made when first asked for."""
    known: dict[str, tuple[dict[str, str], dict[str, int]]] = {}

    def of(name: str) -> tuple[dict[str, str], dict[str, int]]:
        if name not in known:
            known[name] = undisturbed(name, tmp_path_factory.mktemp("undisturbed"))
        return known[name]

    yield of
    for kill in KILLS:
        print(f"killed {kill.subject} {kill.kind} at {100 * kill.position:.0f} %")


def kept_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each shard that the manifest knows."""
    manifest = folder / "store" / "manifest.json"
    if not manifest.exists():
        return {}
    names = [f"shard-{int(index):05d}.safetensors" for index in json.loads(manifest.read_text())["shards"]]
    return {name: ((s := (folder / "store" / name).stat()).st_ino, s.st_mtime_ns) for name in names}


def check_whole(folder: Path) -> None:
    """Whatever lies there under its final name can be read."""
    for path in folder.rglob("*.safetensors"):
        load_tensors(path)
    for path in folder.rglob("*.pt"):
        load_sealed(path)
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())


@pytest.mark.parametrize("round_", range(amount(1, 4)))
@pytest.mark.parametrize("name", NAMES)
def test_killed_again_and_again(name: str, round_: int, tmp_path: Path, whole) -> None:
    """A run that dies every few steps gets there, and no finished shard is made twice or lost."""
    expected, counts = whole(name)
    subject, chance = SUBJECTS[name], random.Random(f"{name} {round_}")
    killed = 0
    for turn in range(amount(4, 8)):
        before, shards = subject.done(tmp_path), kept_files(tmp_path)
        ahead = max(2, int(counts["steps"] * (1 - before) / 2))
        step = chance.randrange(2, ahead + 1) if turn else chance.randrange(counts["steps"] // 6, ahead + 1)
        if turn % 2:
            died = kill_at_a_moment(name, tmp_path, step, chance)
        else:
            died = kill_at_step(name, tmp_path, step)
        now = kept_files(tmp_path)
        assert all(now[shard] == shards[shard] for shard in shards), "a finished shard stays as it was"
        check_whole(tmp_path)
        if not died:
            break
        killed += 1
        assert subject.done(tmp_path) >= before, "nothing finished is lost"
        KILLS.append(Kill(name, "at a moment" if turn % 2 else "at a step", before + step / counts["steps"]))
    assert killed >= 2
    shards = kept_files(tmp_path)
    finish(name, tmp_path)
    assert subject.finished(tmp_path) == expected
    now = kept_files(tmp_path)
    assert all(now[shard] == shards[shard] for shard in shards)
    assert not list(tmp_path.rglob(".*.tmp")), "what was half-written is cleaned away"


@pytest.mark.parametrize("name", NAMES)
def test_killed_in_the_middle_of_a_write(name: str, tmp_path: Path, whole) -> None:
    """At every moment of a write (a sample of them in the short version): old or new, never half."""
    expected, counts = whole(name)
    subject, chance = SUBJECTS[name], random.Random(name)
    most = amount(3, 40 if name != "recipe" else 12)
    moments = range(1, counts["writes"] + 1)
    for number, write in enumerate(sorted(chance.sample(moments, min(most, len(moments))))):
        folder = tmp_path / str(number)
        assert kill_at_write(name, folder, write)
        check_whole(folder)
        KILLS.append(Kill(name, "in a write", write / (counts["writes"] + 1)))
        finish(name, folder)
        assert subject.finished(folder) == expected
        assert not list(folder.rglob(".*.tmp"))


def test_most_kills_were_in_the_middle_of_the_work() -> None:
    if not KILLS:
        pytest.skip("the kills were not asked for in this run")
    share = sum(kill.inside for kill in KILLS) / len(KILLS)
    print(f"{len(KILLS)} kills, {100 * share:.0f} % of them between the first and the last shard or step")
    assert share >= 0.8
    assert len(KILLS) >= amount(30, 250)
