"""The tests of ``tests/device`` on a simulated device, each file in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

FOLDER = Path(__file__).parent / "device"


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch cannot have a device made up in Python",
)
@pytest.mark.parametrize("part", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_on_a_device_that_is_not_the_cpu(part: str) -> None:
    environment = {**os.environ, "ZSKD_NNI_TEST_DEVICE": "elsewhere", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(FOLDER / part), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580, check=False)
    print(done.stdout[-20_000:], done.stderr[-5_000:])
    assert done.returncode == 0
    assert " passed" in done.stdout
