"""Freed memory is kept, unless the user has chosen otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from zskd_nni.runtime.allocator import _M_MMAP_THRESHOLD, _set

PAGES = """
import resource, torch
from zskd_nni.runtime.allocator import keep_freed_memory
print(keep_freed_memory())
torch.set_num_threads(1)
def work():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(4_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
work()
print(work())
"""


def new_pages(environment: dict[str, str]) -> tuple[str, int]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", PAGES], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    told, pages = done.stdout.split()
    return told, int(pages)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_blocks_of_16_mib_are_used_again():
    told, pages = new_pages({})
    assert told == "True"
    assert pages < 1000  # 20 blocks of 16 MB have 78,000 pages of 4 KiB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("choice", [{"MALLOC_CHECK_": "0"}, {"GLIBC_TUNABLES": "glibc.malloc.check=0"}])
def test_a_users_own_choice_stays(choice):
    told, _ = new_pages(choice)
    assert told == "False"


@pytest.mark.parametrize(("largest", "taken"), [(1 << 31, 1 << 30), (32 << 20, 32 << 20), (1 << 20, None)])
def test_an_older_glibc_keeps_smaller_blocks_or_is_left_as_it_is(largest, taken):
    kept = {}

    def mallopt(parameter, value):  # refuses as glibc before 2.35 does
        if parameter == _M_MMAP_THRESHOLD and value > largest:
            return 0
        kept[parameter] = value
        return 1

    assert _set(mallopt) == (taken is not None)
    assert kept.get(_M_MMAP_THRESHOLD) == taken and len(kept) == (0 if taken is None else 3)
