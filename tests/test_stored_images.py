"""Images that are read from a store batch by batch equal those in memory."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch
from helpers import make_store, random

from zskd_nni.data.lazy_images import LazyImages
from zskd_nni.data.sources import StoredSource
from zskd_nni.methods.registry import transfer_source
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import write_json
from zskd_nni.runtime.tensors import load_tensors, save_tensors
from zskd_nni.synthesis import ImpressionStore
from zskd_nni.synthesis.store import shard_name


@pytest.fixture
def store(folder: Path) -> ImpressionStore:
    return make_store(folder, size=110)  # the last of six shards is half as large


def test_what_a_student_sees_is_the_same_to_the_bit(store: ImpressionStore) -> None:
    in_memory = StoredSource(store.images(), 16, 5, "x")
    on_disk = StoredSource(store.lazy_images(), 16, 5, "x")
    assert on_disk.size == in_memory.size == 110
    for step in range(20):
        batch = on_disk.batch(step, random(0))
        assert batch.dtype == torch.float32
        assert torch.equal(batch, in_memory.batch(step, random(0)))


def test_rows_slices_and_parts(store: ImpressionStore) -> None:
    images, whole = store.lazy_images(), store.images()
    assert torch.equal(whole, torch.cat([store.read(index).images for index in range(6)]))
    assert images.shape == whole.shape and len(images) == 110
    rows = torch.tensor([109, 0, 20, 19, 19, 100, 99])
    assert torch.equal(images[rows], whole[rows])
    assert images[torch.tensor([], dtype=torch.long)].shape == (0, 1, 8, 8)
    assert torch.equal(images[15:45:3], whole[15:45:3])
    for count in (1, 20, 21, 110):
        assert torch.equal(images.first(count)[:], whole[:count])
    twice = LazyImages.concatenate([images, images.first(25)])
    assert torch.equal(twice[:], torch.cat([whole, whole[:25]]))
    with pytest.raises(IndexError):
        images[torch.tensor([110])]


def test_a_method_gives_lazy_images(digits_teacher, tmp_path: Path) -> None:
    source = transfer_source(digits_teacher, tmp_path / "set", 40, synthesis={"max_steps": 2}, quiet=True)
    assert isinstance(source, StoredSource) and isinstance(source.images, LazyImages)


@pytest.mark.parametrize("what", ["removed", "cut short", "replaced", "touched by somebody"])
def test_files_that_change_meanwhile_are_noticed(what: str, store: ImpressionStore) -> None:
    images, path = store.lazy_images(), store.folder / shard_name(2)
    content = path.read_bytes()
    if what == "removed":
        path.unlink()
    elif what == "cut short":
        path.write_bytes(content[:-1000])
    elif what == "replaced":
        path.write_bytes((store.folder / shard_name(3)).read_bytes())
    else:
        os.utime(path, ns=(1, 1))
    images[torch.tensor([0, 60])]
    with pytest.raises(UserError, match=r"shard-00002\.safetensors was changed or removed"):
        images[torch.tensor([0, 41, 60])]


def test_a_file_cut_short_under_its_reader_is_noticed(store: ImpressionStore) -> None:
    images = store.lazy_images()
    images[torch.tensor([40])]  # opens it
    os.truncate(store.folder / shard_name(2), 200)
    with pytest.raises(UserError, match="was changed or removed"):
        images[torch.tensor([59])]


def test_no_file_stays_open(folder: Path) -> None:
    images = make_store(folder, size=200, shard=2, max_steps=1).lazy_images()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    assert len(images[:]) == 200
    assert torch.equal(images[torch.arange(199, -1, -1)], images[:].flip(0))
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda images: pickle.loads(pickle.dumps(images))])
def test_a_copy_opens_files_of_its_own(copied, store: ImpressionStore) -> None:
    images, whole = store.lazy_images(), store.images()
    images[torch.tensor([0, 40])]  # opens two
    other = copied(images)
    del images
    gc.collect()
    taken = [os.open(__file__, os.O_RDONLY) for _ in range(4)]  # the numbers that were given back
    assert torch.equal(other[:], whole)
    for file in taken:
        os.close(file)


def test_a_low_limit_of_open_files_is_kept_to(folder: Path) -> None:
    images = make_store(folder, size=60, shard=2, max_steps=1).lazy_images()
    whole, limits = images[:], resource.getrlimit(resource.RLIMIT_NOFILE)
    again = copy.copy(images)
    del images
    gc.collect()
    free = os.open("/", os.O_RDONLY)
    os.close(free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 5, limits[1]))
        assert torch.equal(again[:], whole)
        other = copy.copy(again)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))  # and the other one holds them all
        with pytest.raises(UserError, match="too many open files"):
            other[torch.tensor([0])]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_images_of_another_precision_are_refused(store: ImpressionStore) -> None:
    path = store.folder / shard_name(1)
    tensors, _ = load_tensors(path)
    tensors["images"] = tensors["images"].float()
    store.manifest["shards"]["1"]["sha256"] = save_tensors(path, tensors)
    write_json(store.folder / "manifest.json", store.manifest)
    forged = ImpressionStore.open(store.folder)
    assert forged.missing() == []
    with pytest.raises(UserError, match="its images are of type float32"):
        forged.images()
