"""Networks by name: ``zoo:lenet5``, ``torchvision:resnet18``, ``package.module:factory``, ``file.py:factory``.

Those of timm (``timm:NAME``), folders of transformers (``transformers:FOLDER``) and ONNX files are in ``foreign``.
The last two import code of the user. Nothing else in a recipe runs code. A factory must be a class derived from
``nn.Module``, a function of the user's own code, or a function of an installed package that is annotated to return an
``nn.Module``: ``os:system`` and ``torch:load`` are refused.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import logging
import re
import sys
import sysconfig
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from zskd_nni.models import zoo
from zskd_nni.models.foreign import ONNX_SUFFIX, has_weights, onnx_factory, timm_factory, transformers_factory
from zskd_nni.models.state_dicts import Fit, fit
from zskd_nni.models.zoo.trained import trained_weights
from zskd_nni.runtime.errors import UserError
from zskd_nni.runtime.files import is_file, sha256_of_file
from zskd_nni.runtime.tensors import load_state_dicts

_logger = logging.getLogger(__name__)

FORMS = (
    "zoo:NAME, torchvision:NAME, timm:NAME, transformers:FOLDER, file.onnx, package.module:factory or "
    "path/to/file.py:factory"
)
_UNTRAINED = ("zoo:", "torchvision:", "timm:")


def build_network(reference: str, arguments: Mapping[str, Any] | None = None, base: Path | None = None) -> nn.Module:
    """Build a network from its name.

    Args:
        reference: in one of the forms above; a factory is a class or function that returns an ``nn.Module``.
        arguments: keyword arguments of the factory.
        base: the folder that a relative ``file.py`` is in.

    Raises:
        UserError: there is no such network, or its factory fails.

    Example:
        >>> build_network("zoo:lenet5", {"num_classes": 26}).fc3.out_features
        26
    """
    factory = _find_factory(reference, base)
    arguments = dict(arguments or {})
    try:
        network = factory(**arguments)
    except UserError:
        raise
    except Exception as error:  # a factory may raise anything
        raise UserError(f"The network {reference!r} could not be built with {arguments}: {error}") from error
    if not isinstance(network, nn.Module):
        raise UserError(
            f"{reference!r} returned {type(network).__name__}, not a network; a factory must return an nn.Module."
        )
    for path, module in network.named_modules():
        if any(isinstance(value, UninitializedParameter) for value in module.parameters(recurse=False)):
            raise UserError(
                f"{reference!r} has a layer {path!r} whose size is only known after a forward pass "
                f"({type(module).__name__}); let the factory call the network once on an input of its size."
            )
    return network


def _find_factory(reference: str, base: Path | None) -> Any:
    if reference.lower().endswith(ONNX_SUFFIX):
        return onnx_factory((base or Path()) / reference)
    if reference.startswith("transformers:"):
        return transformers_factory((base or Path()) / reference.removeprefix("transformers:"))
    if reference.startswith("timm:"):
        return timm_factory(reference.removeprefix("timm:"))
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
            near = difflib.get_close_matches(name, torchvision.models.list_models(), 1)
            hint = f"did you mean {near[0]}?" if near else "torchvision.models.list_models() lists them."
            raise UserError(f"torchvision has no model {name!r}; {hint}")
        return torchvision.models.get_model_builder(name)
    module = _import_file(Path(source), base) if source.endswith(".py") else _import_module(source, base)
    if not hasattr(module, name):
        raise UserError(f"{source} has no {name!r} to build a network with.")
    factory = getattr(module, name)
    if callable(factory) and not _returns_networks(factory):
        raise UserError(
            f"{reference!r} is not a network factory: name a class derived from nn.Module, a function of your own, or "
            "one of a package that is annotated to return an nn.Module. A file.py beside the recipe may call any other."
        )
    return factory


def _definition(factory: Any) -> tuple[Any, str]:
    """The function or class behind partials and decorators, and the module that defines it."""
    while isinstance(factory, partial):
        factory = factory.func
    factory = inspect.unwrap(factory)
    return factory, getattr(factory, "__module__", None) or type(factory).__module__


def _returns_networks(factory: Any) -> bool:
    """Whether ``factory`` may be called as a network factory with a recipe's arguments."""
    factory, module = _definition(factory)
    made = factory
    if not isinstance(factory, type):
        if not _is_installed(module):
            return True
        try:
            made = get_type_hints(factory).get("return")
        except Exception:  # annotations may be anything
            return False
    return isinstance(made, type) and (issubclass(made, nn.Module) or not _is_installed(module))


def _is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def _is_installed(module: str) -> bool:
    """Whether a module belongs to Python or a package, and is not a file of the user's own."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or _is_standard(module) or module.partition(".")[0] == __name__.partition(".")[0]:
        return True
    folders = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib", "stdlib")}
    path = Path(file).resolve()
    return any(folder in path.parents for folder in folders) or "dist-packages" in path.parts


def _import_file(path: Path, base: Path | None) -> Any:
    path = path if path.is_absolute() or base is None else base / path
    if not is_file(path):
        raise UserError(f"There is no file {path} to take a network from.")
    name = f"zskd_nni_user_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # the file may import its neighbours, as when python runs it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"{path} cannot be imported: {error}") from error
    finally:
        if folder in sys.path:  # what the file itself has added stays
            sys.path.remove(folder)
    return module


def _import_module(name: str, base: Path | None) -> Any:
    if _is_standard(name):
        raise UserError(f"The module {name!r} is part of Python itself and has no network factories.")
    before = list(sys.path)
    # As python itself would find it, which the command, in a folder of its own, does not.
    sys.path[:0] = [str(folder) for folder in (base, Path.cwd()) if folder is not None]
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise UserError(f"The module {name!r} cannot be imported: {error}") from error
    finally:
        sys.path[:] = before


def network_fingerprint(network: nn.Module) -> str:
    """SHA-256 over a network's modules, their settings and its weights."""
    digest = hashlib.sha256(repr(network).encode())
    update_with_weights(digest, network)
    return digest.hexdigest()


def update_with_weights(digest: Any, network: nn.Module) -> None:
    """Update a hash (``hashlib``) with the names, shapes, types and bytes of a network's state dict."""
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def starts_at_random(reference: str, base: Path | None = None) -> bool:
    """Whether a network needs weights to be a teacher."""
    if reference.startswith("transformers:"):
        return not has_weights((base or Path()) / reference.removeprefix("transformers:"))
    return reference.startswith(_UNTRAINED)


def _is_packaged(reference: str) -> bool:
    return reference.startswith((*_UNTRAINED, "transformers:")) or reference.lower().endswith(ONNX_SUFFIX)


def code_fingerprint(reference: str, base: Path | None = None) -> str | None:
    """SHA-256 of the file that defines a factory of the user's own; None for networks of packages.

    What that file imports is not included.
    """
    if _is_packaged(reference):
        return None
    _, module = _definition(_find_factory(reference, base))
    if _is_installed(module):
        return None
    file = sys.modules[module].__file__
    return sha256_of_file(file) if file is not None and is_file(Path(file)) else None


def own_source_file(reference: str, base: Path | None = None) -> Path | None:
    """The file of the user's own that a network's name leads to; None for networks of packages.

    Raises:
        UserError: there is no such network.
    """
    if _is_packaged(reference):
        return None
    source, _, _ = reference.rpartition(":")
    if source.endswith(".py"):
        return (Path(source) if base is None else base / source).resolve()
    module = _import_module(source, base)
    file = getattr(module, "__file__", None)
    if _is_installed(source) or file is None or not is_file(Path(file)):
        return None
    return Path(file).resolve()


def load_into(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> Fit:
    """Load a complete state dict into a network.

    Args:
        network: changed in place, unless there is an error.
        weights: names as in the network's state dict, or as :func:`~zskd_nni.models.state_dicts.fit` finds them.
        source: where they are from, for messages.

    Returns:
        Which entries were loaded.

    Raises:
        UserError: keys are missing or left over, or shapes differ; names them.
    """
    expected = network.state_dict()
    found = fit(expected, weights)
    given = ((found.missing, " missing"), (found.left_over, " not of this network"), (found.shapes, ""))
    problems = [_first_few(names) + what for names, what in given if names]
    if problems:
        advice = _about_parametrised(found.left_over)
        raise UserError(f"The weights in {source} do not fit the network: {'; '.join(problems)}.{advice}")
    state = OrderedDict(found.weights)
    # Modules that have changed their layout ask for the version that they were saved with.
    state._metadata = _versions(network, weights, found)  # type: ignore[attr-defined]
    try:
        network.load_state_dict(state, strict=False)
    except Exception as error:  # a module may refuse what it is given
        raise UserError(f"The weights in {source} cannot be loaded into {type(network).__name__}: {error}") from error
    return found


# What the names of a weight that is computed from others end in, and what makes it a plain one again.
_PARAMETRISED = (
    (r"\.parametrizations\.", "a parametrisation", "torch.nn.utils.parametrize.remove_parametrizations(layer, ...)"),
    (r"_(?:orig|mask)$", "a mask of torch.nn.utils.prune", "torch.nn.utils.prune.remove(layer, 'weight')"),
    (r"_[gv]$", "weight_norm", "torch.nn.utils.remove_weight_norm(layer)"),
    (r"_[uv]$|_orig$", "spectral_norm", "torch.nn.utils.remove_spectral_norm(layer)"),
)


def _about_parametrised(left_over: list[str]) -> str:
    """What to do about weights that were saved in the parts that they are computed from; empty for others."""
    for pattern, kind, remedy in _PARAMETRISED:
        named = [name for name in left_over if re.search(pattern, name)]
        if named and len(named) == len(left_over):
            return (
                f" {named[0]} belongs to {kind}: before the network is saved, make its weights plain ones, "
                f"{remedy}; or give the network of the recipe the same."
            )
    return ""


def _versions(network: nn.Module, weights: Mapping[str, Tensor], found: Fit) -> dict[str, Any]:
    """The versions of a network's modules: of the weights where these know them, else the present ones."""
    versions = dict(network.state_dict()._metadata)  # type: ignore[attr-defined]
    saved = getattr(weights, "_metadata", {})
    for name, source in found.names.items():
        path, saved_path = name, source
        while path:  # the layer, and the modules around it
            path, saved_path = path.rpartition(".")[0], saved_path.rpartition(".")[0]
            known = saved.get(saved_path)
            if isinstance(known, dict) and path in versions:
                versions[path] = {**versions[path], **known}
    return versions


def load_named_weights(network: nn.Module, weights: str, base: Path | None = None, allow_pt: bool = False) -> None:
    """Load the weights that a recipe names into a network.

    Of a checkpoint with several state dicts the first is taken that fits, averaged ones first. A line on the log says
    which, and what was taken off the names.

    Args:
        network: changed in place.
        weights: ``zoo:NAME`` for a shipped teacher's, or a file.
        base: the folder that a relative file is in.
        allow_pt: also read PyTorch's own format.

    Raises:
        UserError: there are no such weights, or they do not fit the network.
    """
    shipped = weights.startswith("zoo:")
    file = trained_weights(weights.removeprefix("zoo:")) if shipped else (base or Path()) / weights
    choices = load_state_dicts(file, allow_pt)
    expected = network.state_dict()
    place = next((place for place, state in choices.items() if fit(expected, state).complete), None)
    if place is None:
        closest = min(choices, key=lambda place: len(fit(expected, choices[place]).missing))
        load_into(network, choices[closest], weights + (f" under {closest!r}" if closest else ""))
        return
    found = load_into(network, choices[place], weights)
    others = [f"{other!r}" for other in choices if other != place]
    notes = [
        f"the weights are those under {place!r}" if place else "",
        f"{found.removed!r} is taken off their names" if found.removed else "",
        f"{_first_few(found.beside)} are passed over" if found.beside else "",
        f"the file also has {', '.join(others[:5])}" if others else "",
    ]
    if any(notes):
        _logger.warning("%s: %s.", weights, "; ".join(filter(None, notes)))


def _first_few(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
