"""What importing costs, and which module may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import zskd_nni

PACKAGE = Path(zskd_nni.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


# From the ground up: a room imports those before it, never those behind it.
ROOMS = (
    "runtime",
    "models",
    "data",
    "training",
    "synthesis",
    "methods",
    "recipes",
    "compression",
    "pipeline",
    "research",
)
ADAPTERS = {"compression", "search"}  # of nni.compression, and of NNI's experiments


def module_name(path: Path) -> str:
    parts = ("zskd_nni", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def for_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(path: Path, lazy: bool) -> set[str]:
    """Names of the imported modules; with those inside functions where ``lazy``."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if for_typing_only(node):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            found.update(
                name if (name := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            )
        if not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stderr == ""
    return set(run.stdout.split())


def test_importing_the_package_costs_nothing() -> None:
    loaded = loaded_by("import zskd_nni; dir(zskd_nni); import zskd_nni.cli")
    assert not loaded & {"torch", "torchvision", "nni", "numpy", "matplotlib", "sklearn", "pydantic"}


def test_the_core_does_not_need_nni() -> None:
    core = (
        "models.teacher models.serialization models.onnx_export synthesis training.distillation methods.zskd "
        "recipes.load pipeline.run pipeline.report research.train_teacher cli"
    )
    loaded = loaded_by("import " + ", ".join(f"zskd_nni.{name}" for name in core.split()))
    assert "torch" in loaded
    assert not loaded & {"nni", "matplotlib", "onnxruntime", "sklearn"}


def definition_of(name: str) -> ast.ClassDef | ast.FunctionDef:
    home = MODULES[zskd_nni._HOMES[name]]
    files = home.parent.glob("*.py") if home.name == "__init__.py" else [home]
    (found,) = [
        node
        for file in files
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name
    ]
    return found


@pytest.mark.parametrize("name", zskd_nni.__all__)
def test_public_names_have_an_example(name: str) -> None:
    """Which test_docstring_examples.py runs."""
    assert name == "UserError" or "Example:\n    >>> " in (ast.get_docstring(definition_of(name)) or "")


def test_public_names_are_there_and_lead_home() -> None:
    for name in zskd_nni.__all__:
        home = zskd_nni._HOMES[name]
        if ".compression." in home:  # it imports NNI
            assert definition_of(name)
        else:
            assert getattr(zskd_nni, name).__module__.startswith(home)
    assert set(zskd_nni.__all__) == set(zskd_nni._HOMES) <= set(dir(zskd_nni))
    with pytest.raises(AttributeError, match="no attribute 'Techer'"):
        zskd_nni.Techer  # noqa: B018


def test_type_checkers_see_the_same_public_names() -> None:
    (block,) = [node for node in ast.parse(Path(zskd_nni.__file__).read_text()).body if for_typing_only(node)]
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == zskd_nni._HOMES


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_the_adapter_imports_nni(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports_of(path, lazy=True)}
    if not ADAPTERS & set(path.relative_to(PACKAGE).parts):
        assert "nni" not in roots
        assert "importlib.import_module('nni" not in path.read_text().replace('"', "'")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_the_core_reaches_the_adapter_only_from_within_functions(path: Path) -> None:
    if not ADAPTERS & set(path.relative_to(PACKAGE).parts):
        assert not {name for name in imports_of(path, lazy=False) if name.startswith("zskd_nni.compression")}


def cycle_in(graph: dict[str, set[str]]) -> list[str] | None:
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> list[str] | None:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return None
        for other in sorted(graph[name]):
            found = walk(other, [*trail, name])
            if found:
                return found
        done.add(name)
        return None

    return next((found for name in sorted(graph) if (found := walk(name, []))), None)


@pytest.mark.parametrize("lazy", [False, True], ids=["at import", "within functions too"])
def test_imports_have_a_direction(lazy: bool) -> None:
    graph = {name: (imports_of(path, lazy) & set(MODULES)) - {name} for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 50
    assert cycle_in(graph) is None
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


@pytest.mark.parametrize("name", ["zskd", "class_impressions", "sts", "zskt"])
def test_data_free_methods_cannot_reach_what_reads_images(name: str) -> None:
    graph = {module: imports_of(path, lazy=True) & set(MODULES) for module, path in MODULES.items()}
    seen, todo = (
        set(),
        {name if (name := f"zskd_nni.methods.{name}.method") in MODULES else name.removesuffix(".method")},
    )
    while todo:
        module = todo.pop()
        seen.add(module)
        todo |= graph[module] - seen
    assert "zskd_nni.data.datasets" not in seen
    assert "zskd_nni.data.datasets" in graph["zskd_nni.data.candidates"]
    assert "zskd_nni.data.candidates" in graph["zskd_nni.methods.ats.method"]


def test_the_package_has_ten_rooms_and_each_says_what_it_holds() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(ROOMS)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py"}
    for room in ROOMS:
        told = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
        assert told and "May import: " in told, room


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_room_imports_only_those_below_it(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    if room not in ROOMS:
        return
    imported = {name.split(".")[1] for name in imports_of(path, lazy=True) if name.startswith("zskd_nni.")}
    assert imported <= set(ROOMS[: ROOMS.index(room) + 1])
