"""Runs the tests on every Python, and on the oldest PyTorch, that ``pyproject.toml`` names: ``make test-versions``.

Each session has an environment of its own, below ``.nox``. ``nox --list`` names them; what follows ``--`` goes to
pytest: ``nox --session tests-3.12 -- tests/test_losses.py``. nox finds the Pythons that are on the path.
"""

from __future__ import annotations

from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"  # uv keeps one copy of PyTorch for all environments
nox.options.error_on_missing_interpreters = True

PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)  # of the classifiers
PINNED_PYTHON = "3.11"  # has every version of constraints.txt
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# What PyTorch's own version decides, so that the oldest one brings what belongs to it.
PYTORCH = ("torch", "torchvision", "triton", "nvidia-", "cuda-", "setuptools")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The whole suite with the pinned versions."""
    session.install("--constraint", "constraints.txt", "--editable", ".[dev]")
    session.run("python", "-m", "pytest", *session.posargs, env=ONE_THREAD)


@nox.session(python=PINNED_PYTHON, name="oldest-pytorch")
def oldest_pytorch(session: nox.Session) -> None:
    """The whole suite with the oldest PyTorch and torchvision that are allowed, and all else pinned."""
    constraints = Path(session.create_tmp()) / "constraints.txt"
    pinned = [line for line in Path("constraints.txt").read_text().splitlines() if not line.startswith(PYTORCH)]
    constraints.write_text("\n".join([*pinned, *oldest("torch", "torchvision")]) + "\n")
    session.install("--constraint", str(constraints), "--editable", ".[dev]")
    session.run("python", "-m", "pytest", *session.posargs, env=ONE_THREAD)


def oldest(*names: str) -> list[str]:
    """The dependencies of these names, each pinned to the lowest version that it allows."""
    required = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    lowest = {one.name: spec.version for one in required for spec in one.specifier if spec.operator == ">="}
    return [f"{name}=={lowest[name]}.*" for name in names]
