"""Writing is all or nothing; what is read cannot run code."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import resource
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import small_network, start_process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import (
    fingerprint_of,
    make_folder,
    read_json,
    remove_leftovers,
    sha256_of_bytes,
    sha256_of_file,
    write_atomic,
    write_json,
)
from zskd_nni.runtime.tensors import load_tensors, load_weights, save_tensors


def write_under_a_limit(path: str, size: int) -> None:
    """In another process: files may have at most 1,000 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write_atomic(path, b"n" * size)
    except UserError as error:
        assert "limit on file sizes" in str(error)
        sys.exit(2)


def test_a_full_disk_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    process = start_process(write_under_a_limit, str(path), 5000)
    process.join()
    assert process.exitcode == 2
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    process = start_process(write_under_a_limit, str(path), 900)
    process.join()
    assert process.exitcode == 0
    assert path.read_bytes() == b"n" * 900


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "disk is full"),
        (errno.EACCES, "cannot be written to"),
        (errno.EROFS, "cannot be written to"),
        (errno.EIO, "Input/output error"),
    ],
)
@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str, failing: str
) -> None:
    """The only faults put in by hand: there is no failing disk at hand."""
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(UserError, match=message):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_stop_in_the_middle_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_write_atomic(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", "grün")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "grün"
    write_atomic(tmp_path / "file", b"\x00\x01")
    assert (tmp_path / "file").read_bytes() == b"\x00\x01"
    with pytest.raises(UserError, match="is not there"):
        write_atomic(tmp_path / "absent" / "file", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder could not be written"):
        write_atomic(tmp_path / "folder", b"")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "mine"
    assert (tmp_path / "link").read_text() == "new"


def test_leftovers_of_a_longer_name_are_anothers(tmp_path: Path) -> None:
    ours, other = tmp_path / ".wrn-cifar10.safetensors.12.tmp", tmp_path / ".wrn-cifar100.safetensors.12.tmp"
    for path in (ours, other):
        path.touch()
    remove_leftovers(tmp_path, "wrn-cifar10")
    assert not ours.exists() and other.exists()
    remove_leftovers(tmp_path)
    assert not other.exists()


def test_make_folder(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a/b/c").is_dir()
    assert make_folder(tmp_path / "a/b/c").is_dir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UserError, match="stands in the way"):
            make_folder(path)
    with pytest.raises(UserError, match="could not be made"):
        make_folder("/proc/folder")


def test_json(tmp_path: Path) -> None:
    content = {"b": [1, 2.5, None], "a": {"ü": "x"}}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content
    assert list(read_json(tmp_path / "x.json")) == ["b", "a"]
    for broken in (b"", b"{", b"\xff"):
        (tmp_path / "x.json").write_bytes(broken)
        with pytest.raises(UserError, match="cannot be read as JSON"):
            read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="There is no file"):
        read_json(tmp_path / "absent.json")


def test_fingerprints() -> None:
    assert fingerprint_of({"a": 1, "b": [2]}) == fingerprint_of({"b": [2], "a": 1})
    values = [{"a": 1}, {"a": "1"}, {"a": 1.5}, {"a": [1]}, {"a": None}, {"b": 1}, {}, []]
    assert len({fingerprint_of(value) for value in values}) == len(values)


# safetensors.


def test_tensors_round_trip(tmp_path: Path) -> None:
    tensors = {
        "float": torch.randn(3, 4).T,
        "half": torch.randn(2).half(),
        "int": torch.tensor(5),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    tensors["tied"] = tensors["float"]
    checksum = save_tensors(tmp_path / "x.safetensors", tensors, {"note": "ü"})
    assert checksum == sha256_of_file(tmp_path / "x.safetensors")
    assert checksum == sha256_of_bytes((tmp_path / "x.safetensors").read_bytes())
    loaded, metadata = load_tensors(tmp_path / "x.safetensors")
    assert metadata == {"note": "ü"}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in tensors.items())
    assert save_tensors(tmp_path / "y.safetensors", tensors, {"note": "ü"}) == checksum


def header(content: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        header({"a": ENTRY}, b"\0" * 8, length=2**63),
        header({"a": ENTRY}, b"\0" * 8, length=10**9),
        header(b"{", b"\0" * 8),
        header(b"\xff\xfe", b""),
        header([], b""),
        header({"a": ENTRY}, b"\0" * 7),
        header({"a": ENTRY}, b"\0" * 12),
        header({"a": {**ENTRY, "data_offsets": [0, 2**62]}}, b"\0" * 8),
        header({"a": {**ENTRY, "data_offsets": [8, 0]}}, b"\0" * 8),
        header({"a": {**ENTRY, "shape": [3]}}, b"\0" * 8),
        header({"a": {**ENTRY, "shape": [2**40, 2**40]}}, b"\0" * 8),
        header({"a": {**ENTRY, "dtype": "X99"}}, b"\0" * 8),
        header({"a": ENTRY, "b": ENTRY}, b"\0" * 8),  # overlap
        header({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, b"\0" * 20),  # hole
    ],
)
def test_crafted_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a valid safetensors file"):
        load_tensors(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not a valid safetensors file"):
        load_weights(tmp_path / "x.safetensors")


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=3), st.integers(0, 40))
def test_flipped_bytes_are_read_or_refused(tmp_path: Path, flips: list[tuple[int, int]], cut: int) -> None:
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3), "b": torch.ones(2, 2)}, {"k": "v"})
    content = bytearray((tmp_path / "x.safetensors").read_bytes())
    for place, value in flips:
        content[place % len(content)] ^= value
    (tmp_path / "x.safetensors").write_bytes(content[: len(content) - cut])
    try:
        tensors, _ = load_tensors(tmp_path / "x.safetensors")
        assert all(isinstance(value, torch.Tensor) for value in tensors.values())
    except UserError:
        pass


# PyTorch's own format.


class Canary:
    """A pickle of it creates a file when it is loaded carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_pt_needs_the_flag(tmp_path: Path) -> None:
    state = small_network().state_dict()
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"teacher\.allow_pt: true"):
        load_weights(tmp_path / "w.pt")
    loaded = load_weights(tmp_path / "w.pt", allow_pt=True)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "w.pth")
    assert load_weights(tmp_path / "w.pth", allow_pt=True).keys() == state.keys()


def canaries(folder: Path) -> list[tuple[Path, Path]]:
    canary = folder / "canary"
    files = [folder / name for name in ("plain.pt", "zip.pt", "nested.pth", "bin.bin", "raw.pkl", "forged.pt")]
    torch.save(Canary(canary), files[0], _use_new_zipfile_serialization=False)
    torch.save(Canary(canary), files[1])
    torch.save({"state_dict": {"a": torch.zeros(1)}, "hook": Canary(canary)}, files[2])
    torch.save({"a": Canary(canary)}, files[3])
    files[4].write_bytes(pickle.dumps(Canary(canary), 2))
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(files[5], "w") as new:
        for name in old.namelist():
            new.writestr(name, pickle.dumps(Canary(canary), 2) if name.endswith("data.pkl") else old.read(name))
    return [(file, canary) for file in files]


@pytest.mark.parametrize("number", range(6))
def test_malicious_pickles_are_refused_and_nothing_runs(tmp_path: Path, number: int) -> None:
    file, canary = canaries(tmp_path)[number]
    assert not canary.exists()
    with pytest.raises(UserError, match="allow_pt"):
        load_weights(file)
    with pytest.raises(UserError, match=r"refused.*run code"):
        load_weights(file, allow_pt=True)
    assert not canary.exists()


def test_the_canary_sings_where_pickles_are_trusted(tmp_path: Path) -> None:
    file, canary = canaries(tmp_path)[4]
    pickle.loads(file.read_bytes())
    assert canary.exists()


@pytest.mark.parametrize(
    "content",
    [small_network(), torch.zeros(3), {"a": 1}, {1: torch.zeros(1)}, {"state_dict": {"a": "text"}}, [torch.zeros(1)]],
    ids=lambda value: type(value).__name__,
)
def test_pt_files_of_something_else(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"refused|holds no state dict"):
        load_weights(tmp_path / "w.pt", allow_pt=True)


def test_missing_weights(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(UserError, match="no weights file"):
            load_weights(path)
    (tmp_path / "w.pt").write_bytes(b"")
    with pytest.raises(UserError, match="refused"):
        load_weights(tmp_path / "w.pt", allow_pt=True)
