"""No function of the package is longer than a screen or takes more arguments than one can keep apart."""

from __future__ import annotations

import ast
from pathlib import Path

import zskd_nni

PACKAGE = Path(zskd_nni.__file__).parent
MOST_LINES = 80
MOST_PARAMETERS = 8

# "file:function": why it stays over.
EXCEPTIONS: dict[str, str] = {}


def too_large(source: str) -> dict[str, str]:
    """By name, what is too large about each function of ``source``."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        parameters = len(names) - (names[:1] in (["self"], ["cls"]))
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MOST_LINES or parameters > MOST_PARAMETERS:
            found[node.name] = f"{lines} lines, {parameters} parameters"
    return found


def test_functions_fit_on_a_screen() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}:{name}": size
        for path in sorted(PACKAGE.rglob("*.py"))
        for name, size in too_large(path.read_text()).items()
    }
    assert {name: size for name, size in found.items() if name not in EXCEPTIONS} == {}
    assert set(EXCEPTIONS) <= set(found), "an exception that is none any longer"


def test_what_counts() -> None:
    long = "def long(a):\n" + "    a += 1\n" * 80
    assert too_large(long) == {"long": "81 lines, 1 parameters"}
    assert too_large("class A:\n    def f(self, a, b, c, d, e, f, g, h): ...\n") == {}
    assert "f" in too_large("def f(a, b, c, d, e, *, f, g, h, i): ...\n")
