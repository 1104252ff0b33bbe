"""Wheel and sdist as a user gets them, and what importing the package costs."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import zskd_nni

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(zskd_nni.__file__).parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build", reason="the extra dev is not installed")
    out = tmp_path_factory.mktemp("dist")
    # As a release is made: the wheel out of the sdist, so that the sdist is complete.
    run = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return out


@pytest.fixture(scope="module")
def unpacked(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    folder = built / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_has_all_of_the_package_and_nothing_else(unpacked: Path) -> None:
    here = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    there = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert {name for name in there if not name.startswith("zskd_nni-")} == here
    for name in (
        "py.typed",
        "pipeline/templates/report.html",
        "recipes/packaged/mnist-half.yml",
        "models/zoo/weights/lenet5-mnist.safetensors",
    ):
        assert f"zskd_nni/{name}" in there
    assert any(name.endswith("licenses/LICENSE") for name in there)


def test_the_sdist_has_what_tests_and_site_are_made_of(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "CITATION.cff", "CHANGELOG.md", "LICENSE", "Makefile", "README.md", "constraints.txt", "mkdocs.yml",
        "benchmarks/packaged_recipes.py", "docs/index.md", "docs/_hooks/maths.py", "notebooks/run.py",
        "results/mnist-half.json", "tests/helpers.py",
    ):  # fmt: skip
        assert name in names
    wanted = {
        ".gitignore", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "PKG-INFO", "README.md",
        "SECURITY.md", "benchmarks", "constraints.txt", "docs", "mkdocs.yml", "notebooks", "noxfile.py", "results",
        "pyproject.toml", "tests", "zskd_nni",
    }  # fmt: skip
    assert {name.partition("/")[0] for name in names} == wanted


def test_the_unpacked_wheel_works_without_the_source(unpacked: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(unpacked)!r})\n"
        "import zskd_nni.cli\n"
        f"assert zskd_nni.__file__.startswith({str(unpacked)!r})\n"
        "sys.argv = ['zskd-nni', 'synthesize', 'mnist-half', '--out', 'store', '--size', '4', '--threads', '1',"
        " '--quiet', '--set', 'transfer.synthesis.max_steps=2']\n"
        "zskd_nni.cli.main()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "4 impressions in store" in run.stdout


def test_metadata_agrees(unpacked: Path) -> None:
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    text = metadata.read_text()
    version = re.search(r"^Version: (.+)$", text, re.MULTILINE)
    assert version is not None
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version[1]
    assert citation["license"] == "MIT"
    assert len(citation["references"]) == 4
    assert {"docs", "notebooks", "dev"} <= set(re.findall(r"^Provides-Extra: (.+)$", text, re.MULTILINE))
    assert "mkdocs<2" in text


def test_every_pin_satisfies_and_every_dependency_is_pinned() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            pins[canonicalize_name(requirement.name)] = pin.version
    text = (ROOT / "pyproject.toml").read_text()
    names = "dependencies|timm|transformers|onnx-teacher|notebooks|docs|dev"
    tables = re.findall(rf"^(?:{names}) = \[(.*?)\](?: *#[^\n]*)?$", text, re.MULTILINE | re.DOTALL)
    wanted = [Requirement(found) for table in tables for found in re.findall(r'"([^"]+)"', table)]
    assert len(wanted) > 25
    for requirement in wanted:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_importing_costs_next_to_nothing() -> None:
    code = (
        "import sys, time\n"
        "started = time.process_time(); import zskd_nni; bare = time.process_time() - started\n"
        "loaded = set(name.split('.')[0] for name in sys.modules)\n"
        "started = time.process_time(); import torch; torches = time.process_time() - started\n"
        "started = time.process_time(); from zskd_nni import Teacher, synthesize, distill\n"
        "rest = time.process_time() - started\n"
        "print(bare, torches, rest)\n"
        "print(*sorted(loaded))\n"
        "print(*sorted(set(name.split('.')[0] for name in sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    seconds, bare, whole = run.stdout.splitlines()
    package, torches, rest = map(float, seconds.split())
    heavy = {"nni", "matplotlib", "IPython", "ipywidgets", "jupyterlab", "notebook", "onnxruntime", "sklearn", "pandas"}
    assert not {"torch", "numpy", *heavy} & set(bare.split())
    assert not heavy & set(whole.split())
    assert package < 0.3  # measured: 0.01
    assert rest < 0.3 + torches  # measured: an eighth of torch's own
