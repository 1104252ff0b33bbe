"""The source of a user's own network, copied beside its weights, so that a saved network can be moved and sent."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from zskd_nni.models.build import own_source_file
from zskd_nni.models.foreign import ONNX_SUFFIX
from zskd_nni.runtime.files import make_folder, write_atomic


def copy_source(reference: str, base: Path | None, description: Path) -> dict[str, str]:
    """Copy what defines a network of the user's own into a folder beside its description.

    Besides the file itself these are the modules and packages beside it that it imports, and those that they import.
    Files that the code reads in other ways are not found.

    Args:
        reference: names the factory, as in :func:`zskd_nni.models.build.build_network`.
        base: the folder that a relative ``file.py`` is in.
        description: the network's JSON file.

    Returns:
        The entries ``network`` and, for a module, ``base`` of the description: they lead to the copy. Networks of the
        zoo and of installed packages are named as they are.
    """
    foreign = _copy_foreign(reference, base, description.with_name(f"{description.stem}_source"))
    if foreign is not None:
        return {"network": foreign}
    file = own_source_file(reference, base)
    if file is None:
        return {"network": reference}
    source, _, factory = reference.rpartition(":")
    is_file = source.endswith(".py")
    # A module a.b of a package lies two folders below the one that Python finds it from.
    depth = 0 if is_file else source.count(".") + (file.name == "__init__.py")
    root = file.parents[depth]
    folder = description.with_name(f"{description.stem}_source")
    for path in sorted(_closure(file, root)):
        copy = folder / path.relative_to(root)
        if copy.resolve() != path.resolve():
            make_folder(copy.parent)
            write_atomic(copy, path.read_bytes())
    if is_file:
        return {"network": f"{folder.name}/{file.name}:{factory}"}
    return {"network": reference, "base": folder.name}


def _copy_foreign(reference: str, base: Path | None, folder: Path) -> str | None:
    """Copy the graph of an ONNX file or the config of a folder of transformers; returns the name of the copy."""
    if reference.lower().endswith(ONNX_SUFFIX):
        source, copy = (base or Path()) / reference, folder / Path(reference).name
        named = f"{folder.name}/{copy.name}"
    elif reference.startswith("transformers:"):
        source = (base or Path()) / reference.removeprefix("transformers:") / "config.json"
        copy, named = folder / source.name, f"transformers:{folder.name}"
    else:
        return None
    if copy.resolve() != source.resolve():
        make_folder(folder)
        write_atomic(copy, source.read_bytes())
    return named


def _closure(file: Path, root: Path) -> set[Path]:
    """The file, and all files under ``root`` that it and they import."""
    found: set[Path] = set()
    waiting = [file, *_package_of(file, root)]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [other for name in _imported(path) for other in _files_of(name, root)]
    return found


def _package_of(file: Path, root: Path) -> list[Path]:
    """All files of the package that a file under ``root`` is in; none if it lies in ``root`` itself."""
    parts = file.relative_to(root).parts
    return sorted((root / parts[0]).rglob("*.py")) if len(parts) > 1 else []


def _imported(file: Path) -> Iterator[str]:
    """First parts of the absolute names that a file imports, at its top or anywhere in it."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _files_of(name: str, root: Path) -> list[Path]:
    single, package = root / f"{name}.py", root / name
    if single.is_file() and not (package / "__init__.py").is_file():  # Python prefers a package to a module
        return [single]
    return sorted(package.rglob("*.py")) if package.is_dir() else []
