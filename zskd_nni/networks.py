"""Naming a network: ``zoo:lenet5``, ``torchvision:resnet18``, ``package.module:factory``, ``file.py:factory``.

The last two import code that the user wrote; whoever owns the recipe decides what runs. Nothing else in a recipe can.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zskd_nni import zoo
from zskd_nni.errors import UserError

FORMS = "zoo:NAME, torchvision:NAME, package.module:factory or path/to/file.py:factory"


def build_network(reference: str, arguments: Mapping[str, Any] | None = None, base: Path | None = None) -> nn.Module:
    """Make a network from its name.

    Args:
        reference: one of the forms above; a factory is a class or function that returns an ``nn.Module``.
        arguments: keyword arguments of the factory.
        base: the folder that a relative ``file.py`` is meant from.

    Raises:
        UserError: there is no such network, or its factory fails.
    """
    factory = _find_factory(reference, base)
    try:
        network = factory(**dict(arguments or {}))
    except Exception as error:  # a factory may raise anything
        raise UserError(
            f"The network {reference!r} could not be built with {dict(arguments or {})}: {error}"
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{reference!r} made a {type(network).__name__}; a factory must return an nn.Module.")
    return network


def _find_factory(reference: str, base: Path | None) -> Any:
    source, colon, name = reference.rpartition(":")
    if not colon or not source or not name:
        raise UserError(f"A network is named as {FORMS}; not {reference!r}.")
    if source == "zoo":
        if name not in zoo.FACTORIES:
            raise UserError(f"The zoo has no network {name!r}; it has {', '.join(sorted(zoo.FACTORIES))}.")
        return zoo.FACTORIES[name]
    if source == "torchvision":
        import torchvision

        if name not in torchvision.models.list_models():
            raise UserError(f"torchvision has no model {name!r}; torchvision.models.list_models() lists them.")
        return torchvision.models.get_model_builder(name)
    module = _import_file(Path(source), base) if source.endswith(".py") else _import_module(source, base)
    if not hasattr(module, name):
        raise UserError(f"{source} has no {name!r} to build a network with.")
    return getattr(module, name)


def _import_file(path: Path, base: Path | None) -> Any:
    path = path if path.is_absolute() or base is None else base / path
    if not path.is_file():
        raise UserError(f"There is no file {path} to take a network from.")
    name = f"zskd_nni_user_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"{path} cannot be imported: {error}") from error
    return module


def _import_module(name: str, base: Path | None) -> Any:
    # Beside the recipe or in the current folder, as python itself would find it; the command's own folder is another.
    folders = [str(folder) for folder in (base, Path.cwd()) if folder is not None]
    before = list(sys.path)
    sys.path[:0] = folders
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise UserError(f"The module {name!r} cannot be imported: {error}") from error
    finally:
        sys.path[:] = before


def load_into(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Put a state dict into a network, whole.

    Raises:
        UserError: keys are missing or left over, or shapes differ; names them.
    """
    expected = network.state_dict()
    # DataParallel puts "module." in front of all names
    weights = {name if name in expected else name.removeprefix("module."): value for name, value in weights.items()}
    missing = [name for name in expected if name not in weights and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in weights if name not in expected]
    shapes = [
        f"{name} is {list(value.shape)}, not {list(expected[name].shape)}"
        for name, value in weights.items()
        if name in expected and value.shape != expected[name].shape
    ]
    problems = []
    if missing:
        problems.append(f"{_some(missing)} missing")
    if unexpected:
        problems.append(f"{_some(unexpected)} not of this network")
    if shapes:
        problems.append(_some(shapes))
    if problems:
        raise UserError(f"The weights in {source} do not fit the network: {'; '.join(problems)}.")
    network.load_state_dict(weights, strict=False)


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
