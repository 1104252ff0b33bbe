"""A full disk, a limit on files, a read-only folder, a folder that goes away: one sentence, and the old state loads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
from pathlib import Path

import pytest
from amounts import amount
from helpers import start_process
from subjects import SUBJECTS

from zskd_nni.runtime import files, signals
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import read_json
from zskd_nni.runtime.tensors import load_tensors

WRITERS = ["synthesis", "student", "teacher", "zskt", "fused", "arbitrary set"]
_MS_RDONLY, _MS_REMOUNT, _CLONE_NEWNS, _CLONE_NEWUSER, _MS_REC, _MS_PRIVATE = 1, 32, 0x20000, 0x10000000, 16384, 1 << 18


def _mount(kind: str | None, place: Path, flags: int, options: str | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    encoded = [None if text is None else text.encode() for text in (kind, str(place), kind, options)]
    if libc.mount(encoded[0], encoded[1], encoded[2], flags, encoded[3]) != 0:
        raise OSError(ctypes.get_errno(), "mount")


def _own_mounts() -> None:
    """Mounts of this process are its own from here on; they go with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWNS | (0 if user == 0 else _CLONE_NEWUSER)) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount(None, Path("/"), _MS_REC | _MS_PRIVATE, None)


def may_mount() -> None:
    try:
        _own_mounts()
    except OSError:
        os._exit(9)


@pytest.fixture(scope="module")
def mounts() -> None:
    process = start_process(may_mount)
    process.join()
    if process.exitcode == 9:
        pytest.skip("this system lets nobody mount a file system of his own; the limit on files is tried all the same")


def attack(name: str, folder: str, kind: str, size: int) -> None:
    """In another process: the subject where it cannot write; leaves with 2 and one sentence, as the command does."""
    place = Path(folder)
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    elif kind == "tmpfs":
        _own_mounts()
        kept = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        _mount("tmpfs", place, 0, f"size={size}")
        for path, content in kept.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    elif kind == "read-only":
        _own_mounts()
        _mount("tmpfs", place, 0, "size=8m")
        with contextlib.suppress(BaseException):
            _until(name, place, size)
        _mount("tmpfs", place, _MS_REMOUNT | _MS_RDONLY, "size=8m")
    elif kind == "gone":
        _go_away_after(place, size)
    try:
        SUBJECTS[name].run(place)
    except UserError as error:
        if kind != "gone":
            for path in place.rglob("*.safetensors"):
                load_tensors(path)
            for path in place.rglob("*.json"):
                read_json(path)
            assert not list(place.rglob(".*.tmp"))
        sentence = str(error)
        assert "\n" not in sentence and str(place) in sentence, sentence
        os._exit(2)


def _until(name: str, place: Path, step: int) -> None:
    real, calls = signals.check, [0]

    def check() -> None:
        calls[0] += 1
        if calls[0] == step:
            signals.check = real
            raise signals.Interrupted(15)

    signals.check = check
    SUBJECTS[name].run(place)


def _go_away_after(place: Path, step: int) -> None:
    real, calls = signals.check, [0]

    def check() -> None:
        calls[0] += 1
        if calls[0] == step:
            shutil.rmtree(place)
        real()

    signals.check = check


def attacked(name: str, folder: Path, kind: str, size: int) -> int:
    folder.mkdir(exist_ok=True)
    process = start_process(attack, name, str(folder), kind, size)
    process.join()
    return process.exitcode


def resumes(name: str, folder: Path, whole: Path) -> None:
    for place in (folder, whole):
        place.mkdir(exist_ok=True)
        process = start_process(SUBJECTS[name].run, place)
        process.join()
        assert process.exitcode == 0
    assert SUBJECTS[name].finished(folder) == SUBJECTS[name].finished(whole)


@pytest.mark.parametrize("name", WRITERS)
def test_a_limit_on_the_size_of_files(name: str, tmp_path: Path) -> None:
    codes = [attacked(name, tmp_path / "run", "limit", size) for size in (0, 700, 3000)[: amount(2, 3)]]
    assert set(codes) == {2} or codes[-1] == 0
    resumes(name, tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(name: str, tmp_path: Path, mounts: None) -> None:
    codes = [attacked(name, tmp_path / str(size), "tmpfs", size) for size in (8192, 32768)[: amount(1, 2)]]
    assert 2 in codes
    assert set(codes) <= {0, 2}


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_may_only_be_read(name: str, tmp_path: Path, mounts: None) -> None:
    for step in (1, 20)[: amount(1, 2)]:
        assert attacked(name, tmp_path / str(step), "read-only", step) == 2


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_is_removed_meanwhile(name: str, tmp_path: Path) -> None:
    for step in (2, 9)[: amount(1, 2)]:
        assert attacked(name, tmp_path / str(step), "gone", step) == 2


@pytest.mark.parametrize("number", range(6))
def test_a_write_that_fails_at_any_call_leaves_the_old_content(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each system call of a write in turn: the file is the old one until it is the new one."""
    path = tmp_path / "file"
    path.write_text("old")
    calls = [0]

    def failing(call):
        def attempt(*arguments, **options):
            calls[0] += 1
            if calls[0] == number + 1:
                raise OSError(28, "No space left on device")
            return call(*arguments, **options)

        return attempt

    for name in ("fsync", "replace", "open"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    monkeypatch.setattr(files, "open", failing(open), raising=False)
    try:
        files.write_atomic(path, "new")
    except UserError as error:
        assert "disk is full" in str(error)
    monkeypatch.undo()
    assert path.read_text() in ("old", "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
