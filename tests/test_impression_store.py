"""The store: nothing finished is lost, nothing damaged is used, and what is made again is the same bit by bit."""

from __future__ import annotations

import json
import os
import random as chance
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    finished_shards,
    make_store,
    make_store_stoppably,
    manifest_of,
    same_store,
    shard_hashes,
    start_process,
    wait_for,
)

from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import fingerprint_of, sha256_of_file
from zskd_nni.runtime.locks import only_writer
from zskd_nni.runtime.run_identity import describe_difference
from zskd_nni.runtime.tensors import load_tensors, save_tensors
from zskd_nni.synthesis import ImpressionStore
from zskd_nni.synthesis.image_grid import some_of_each, spread

MANIFEST = "manifest.json"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of twenty, made in one go."""
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    make_store(folder)
    return folder


@pytest.fixture
def store(undisturbed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undisturbed, tmp_path / "store"))


def shard(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.safetensors"


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("shard-*")}


def test_content(undisturbed: Path) -> None:
    opened = ImpressionStore.open(undisturbed)
    assert len(opened) == 100
    assert opened.missing() == []
    assert sorted(path.name for path in undisturbed.iterdir()) == [
        ".lock",
        MANIFEST,
        *(f"shard-{i:05d}.safetensors" for i in range(5)),
    ]
    assert opened.images().shape == (100, 1, 8, 8)
    assert opened.images().dtype == torch.float16
    assert opened.steps_histogram() == {6: 100}
    summary = opened.summary()
    assert (summary["impressions"], summary["mean_steps"]) == (100, 6)
    fits = torch.cat([opened.read(index).fit for index in range(5)])
    assert summary["mean_fit"] == pytest.approx(float(fits.mean()), abs=1e-6)
    assert opened.fingerprint == fingerprint_of(opened.manifest["identity"])


def test_the_same_arguments_give_the_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    torch.manual_seed(12345)  # no global random state comes in
    make_store(tmp_path / "again")
    assert same_store(undisturbed, tmp_path / "again")


def test_a_finished_store_is_not_touched(store: Path) -> None:
    before, manifest = inodes(store), (store / MANIFEST).read_bytes()
    make_store(store)
    assert inodes(store) == before
    assert (store / MANIFEST).read_bytes() == manifest


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-37] ^= 4
    path.write_bytes(content)


def flip_header_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 64
    path.write_bytes(content)


def other_dtype(path: Path) -> None:
    tensors, _ = load_tensors(path)
    save_tensors(path, {**tensors, "images": tensors["images"].float()})


@pytest.mark.parametrize(
    "harm",
    [Path.unlink, truncate, flip_bit, flip_header_bit, other_dtype, lambda path: path.write_bytes(b"")],
    ids=["deleted", "truncated", "flipped", "header", "dtype", "empty"],
)
def test_a_damaged_shard_and_only_that_is_made_again(undisturbed: Path, store: Path, harm) -> None:
    before = inodes(store)
    harm(shard(store, 1))
    harm(shard(store, 4))
    opened = ImpressionStore.open(store)
    assert opened.missing() == [1, 4]
    with pytest.raises(UserError, match="shard-00001"):
        opened.read(1)
    with pytest.raises(UserError, match="shard-00001"):
        opened.images()
    make_store(store)
    assert same_store(undisturbed, store)
    after = inodes(store)
    assert all(after[name] == before[name] for name in after if name[10] in "023")
    assert shard(store, 1).stat().st_nlink == 1


def test_swapped_shards_are_made_again(undisturbed: Path, store: Path) -> None:
    shard(store, 0).rename(store / "x")
    shard(store, 3).rename(shard(store, 0))
    (store / "x").rename(shard(store, 3))
    assert ImpressionStore.open(store).missing() == [0, 3]
    make_store(store)
    assert same_store(undisturbed, store)


def test_a_symlinked_shard_is_not_used(undisturbed: Path, store: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shard(store, 2).rename(elsewhere)
    shard(store, 2).symlink_to(elsewhere)
    checksum = sha256_of_file(elsewhere)
    opened = ImpressionStore.open(store)
    assert opened.shard_problem(2) == "gone"
    with pytest.raises(UserError, match="gone"):
        opened.read(2)
    make_store(store)
    assert not shard(store, 2).is_symlink()
    assert same_store(undisturbed, store)
    assert sha256_of_file(elsewhere) == checksum, "what the link pointed to must not be written to"


def test_a_folder_in_a_shards_place_is_an_error_of_one_sentence(store: Path) -> None:
    shard(store, 2).unlink()
    shard(store, 2).mkdir()
    with pytest.raises(UserError, match="shard-00002"):
        make_store(store)
    assert not list(store.glob(".*.tmp"))
    assert ImpressionStore.open(store).missing() == [2]


def test_a_shard_of_another_size_is_refused_even_with_its_checksum(store: Path) -> None:
    tensors, _ = load_tensors(shard(store, 0))
    checksum = save_tensors(shard(store, 0), {name: value[:7] for name, value in tensors.items()})
    edit(store, lambda manifest: manifest["shards"]["0"].update(sha256=checksum))
    with pytest.raises(UserError, match="does not hold the 20"):
        ImpressionStore.open(store).read(0)


def test_leftovers_of_a_killed_run_are_cleaned(undisturbed: Path, store: Path) -> None:
    shard(store, 3).unlink()
    for name in (".shard-00003.safetensors.4711.tmp", f".{MANIFEST}.4711.tmp"):
        (store / name).write_bytes(b"half")
    make_store(store)
    assert same_store(undisturbed, store)


# Another run's folder.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_seed": 1}, r"teacher is '\w+'?.* there, '\w+'?.* here"),
        ({"seed": 4}, "seed is 3 there, 4 here"),
        ({"max_steps": 7}, "synthesis.max_steps is 6 there, 7 here"),
        ({"learning_rate": 0.1}, "synthesis.learning_rate is 0.05 there, 0.1 here"),
        ({"floor": 1e-3}, "targets.floor is 0.0001 there, 0.001 here"),
        ({"size": 120}, "size is 100 there, 120 here"),
        ({"shard": 25}, "synthesis.shard is 20 there, 25 here"),
    ],
)
def test_another_run_is_refused_by_the_key_that_differs(store: Path, change: dict, message: str) -> None:
    before, manifest = shard_hashes(store), (store / MANIFEST).read_bytes()
    with pytest.raises(UserError, match=message):
        make_store(store, **change)
    assert shard_hashes(store) == before
    assert (store / MANIFEST).read_bytes() == manifest


def test_missing_manifest_is_refused(store: Path) -> None:
    (store / MANIFEST).unlink()
    before = shard_hashes(store)
    with pytest.raises(UserError, match=r"no manifest.json"):
        make_store(store)
    with pytest.raises(UserError, match="not a store"):
        ImpressionStore.open(store)
    assert shard_hashes(store) == before


def set_at(*path: str) -> Callable[[object], Callable[[dict], None]]:
    def with_value(value: object) -> Callable[[dict], None]:
        def change(manifest: dict) -> None:
            place = manifest
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value

        return change

    return with_value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("identity", "seed")(5), "it was edited"),
        (set_at("identity", "teacher")("0" * 64), "it was edited"),
        (set_at("fingerprint")("0" * 64), "it was edited"),
        (set_at("format")("zskd_nni impressions 1"), "format"),
        (set_at("plan")([20, 20, "20"]), "plan"),
        (set_at("plan")([20, 0]), "plan"),
        (set_at("plan")(None), "plan"),
        (set_at("plan")([20] * 4), "no shard '4'"),
        (set_at("plan")([25] * 4 + [20]), "another number of impressions"),
        (set_at("identity")([]), "identity"),
        (set_at("environment")({}), "threads"),
        (set_at("environment", "threads")("two"), "threads"),
        (set_at("environment", "threads")(0), "threads"),
        (set_at("shards")([]), "shards"),
        (set_at("shards", "9")({}), "'shards.9.sha256' is missing"),
        (set_at("shards", "../../x")({}), r"shards\.\.\./\.\./x"),
        (set_at("shards", "²")({}), "shards.²"),
        (set_at("shards", "1")({"sha256": 5}), "shards.1.sha256: .*, not 5"),
        (set_at("shards", "1", "fit")(None), "shards.1.fit: .*, not None"),
    ],
)
def test_edited_manifests_are_refused(store: Path, change: Callable[[dict], None], message: str) -> None:
    edit(store, change)
    before = shard_hashes(store)
    with pytest.raises(UserError, match=message):
        make_store(store)
    assert shard_hashes(store) == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"format": 1}'])
def test_broken_manifests_are_refused(store: Path, content: bytes) -> None:
    (store / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        make_store(store)


def test_a_forged_checksum_makes_the_shard_anew(undisturbed: Path, store: Path) -> None:
    edit(store, set_at("shards", "2", "sha256")("0" * 64))
    make_store(store)
    assert same_store(undisturbed, store)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="stands in the way"):
            make_store(folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_places_that_cannot_be_written_to(store: Path) -> None:
    with pytest.raises(UserError, match="/proc/store"):
        make_store("/proc/store")
    (store / ".lock").unlink()
    (store / ".lock").mkdir()  # nobody can take the lock
    with pytest.raises(UserError, match="cannot be written to"):
        make_store(store)


def test_no_impressions_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 1"):
        make_store(tmp_path / "s", size=0)


def test_describe_difference() -> None:
    assert describe_difference({"a": {"b": 1}}, {"a": {"b": 1}}) == ""
    assert describe_difference({"a": {"b": 1}}, {"a": {"b": 2}}) == "a.b is 1 there, 2 here"
    assert describe_difference({"a": 1}, {"a": 1, "b": 3}) == "b is None there, 3 here"


# Kill and stop.

SHARDS = 15
LONG = {"size": 20 * SHARDS, "max_steps": 60, "slots": 20}


@pytest.fixture(scope="module")
def long_undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long") / "store"
    make_store(folder, **LONG)
    return folder


def wait_for_shards(folder: Path, goal: int, process) -> None:
    def there() -> bool:
        return (folder / MANIFEST).exists() and finished_shards(folder) >= goal

    wait_for(lambda: there() or process.exitcode is not None)


@pytest.mark.slow
def test_kill_at_random_moments(long_undisturbed: Path, folder: Path) -> None:
    moments, killed, progress = chance.Random(0), 0, [0]
    seconds = ImpressionStore.open(long_undisturbed).summary()["seconds"] / SHARDS
    for _ in range(12):
        process = start_process(make_store, folder, **LONG)
        begun = finished_shards(folder) if (folder / MANIFEST).exists() else -1
        goal = begun + moments.choice([0, 1, 1]) if begun >= 0 else -1  # let it get to work again
        wait_for_shards(folder, goal, process)
        time.sleep(moments.uniform(0, 1.5 * seconds))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
        if (folder / MANIFEST).exists():
            opened = ImpressionStore.open(folder)
            made = {int(index) for index in opened.manifest["shards"]}
            assert made.isdisjoint(opened.missing()), "a shard that the manifest knows is whole"
            assert len(made) >= progress[-1], "a finished shard is never lost"
            progress.append(len(made))
    assert killed >= 3
    assert len(set(progress)) >= 3, "the kills must fall between shards as well as before the first"
    make_store(folder, **LONG)
    assert same_store(long_undisturbed, folder)


def test_a_second_run_on_the_folder_is_refused(long_undisturbed: Path, folder: Path) -> None:
    process = start_process(make_store, folder, **{**LONG, "size": 4000})
    try:
        wait_for(lambda: finished_shards(folder) >= 1)  # it holds the lock
        with pytest.raises(UserError, match="Another run is at work"):
            make_store(folder, **{**LONG, "size": 4000})
        assert process.exitcode is None
    finally:
        process.kill()
        process.join()
    with only_writer(folder):  # the lock dies with its process
        pass


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stop_between_two_steps_keeps_what_is_finished(long_undisturbed: Path, folder: Path, signum: int) -> None:
    process = start_process(make_store_stoppably, folder, **LONG)
    wait_for(lambda: finished_shards(folder) >= 2)
    os.kill(process.pid, signum)
    process.join()
    assert process.exitcode == 128 + signum
    made = finished_shards(folder)
    assert 2 <= made < SHARDS
    assert manifest_of(folder)["plan"] == [20] * SHARDS
    assert ImpressionStore.open(folder).missing() == list(range(made, SHARDS))
    make_store(folder, **LONG)
    assert same_store(long_undisturbed, folder)


def test_a_picture_of_a_store_whose_shards_hold_one_class_each() -> None:
    shards = [(torch.full((6, 1, 8, 8), float(k)), torch.eye(5)[torch.full((6,), k)]) for k in range(5)]
    read = []

    def parts():
        for shard in shards:
            read.append(shard)
            yield shard

    images, logits = some_of_each(parts(), 3 * 5)
    assert logits.argmax(1).tolist() == [k for k in range(5) for _ in range(3)]
    assert images[:, 0, 0, 0].tolist() == [float(k) for k in range(5) for _ in range(3)]
    read.clear()
    shards[0] = (torch.zeros(20, 1, 8, 8), torch.eye(5)[torch.arange(20) % 5])
    assert len(some_of_each(parts(), 4 * 5)[0]) == 20
    assert len(read) == 1, "no more is read than is needed"
    assert spread(3) == [0, 1, 2] and spread(100, 4) == [0, 25, 50, 75] and spread(0) == []
