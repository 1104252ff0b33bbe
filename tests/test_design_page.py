"""Files and functions that the design page, CONTRIBUTING and the list of public names refer to are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import zskd_nni

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(zskd_nni.__file__).parent
# `folder/file.py` or `folder/file.py:Class.method`, in the package or in the repository.
REFERENCE = re.compile(r"`(?P<file>[\w./-]+\.py)(?::(?P<name>[\w.]+))?`")


def defined_in(file: Path) -> set[str]:
    """Functions, classes, constants, methods and fields of a file, the latter two as ``Class.name``."""

    def names(body: list[ast.stmt], prefix: str = "") -> set[str]:
        found = set()
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                found |= names(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
        return found

    return names(ast.parse(file.read_text()).body)


def missing_in(text: str) -> list[str]:
    missing = []
    for match in REFERENCE.finditer(text):
        files = [folder / match["file"] for folder in (PACKAGE, ROOT) if (folder / match["file"]).is_file()]
        if not files or (match["name"] and match["name"] not in defined_in(files[0])):
            missing.append(match[0])
    return missing


@pytest.mark.parametrize("page", ["docs/design.md", "CONTRIBUTING.md"])
def test_what_is_named_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    assert len(REFERENCE.findall(text)) > 10
    assert not missing_in(text)


def test_what_is_gone_is_found() -> None:
    given = "`training/loop.py:fit`, `training/loop.py:fitt`, `tests/conftest.py`, `training/none.py`, `cli.py:main.x`"
    assert missing_in(given) == ["`training/loop.py:fitt`", "`training/none.py`", "`cli.py:main.x`"]


def test_the_page_shows_every_room() -> None:
    rooms = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())
    table, drawing = (ROOT / "docs/design.md").read_text(), (ROOT / "docs/pictures/rooms.svg").read_text()
    assert len(rooms) == 10
    for room in rooms:
        assert f"| `{room}/` |" in table
        assert f">{room}</text>" in drawing


def test_the_list_of_public_names_is_whole() -> None:
    listed = re.findall(r"\[`(\w+)`\]\[(zskd_nni[\w.]+)\.\1\]", (ROOT / "docs/api/public.md").read_text())
    assert {name for name, _ in listed} == set(zskd_nni.__all__)
    for name, module in listed:
        assert name in defined_in(ROOT / f"{module.replace('.', '/')}.py")
