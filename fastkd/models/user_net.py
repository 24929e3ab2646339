"""Networks from a user's own code: ``package.module:factory`` or ``my/net.py:factory``.

The factory is called as ``factory(num_classes=K)`` and returns a `torch.nn.Module` that maps normalised float32 images
[B, 3, H, W] to logits [B, K].
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from fastkd import artifacts
from fastkd.errors import InputError
from fastkd.recipe import model_name
from fastkd.validation import refuse_model_code, user_model

_loaded: dict[Path, tuple[str, ModuleType]] = {}
"""Modules of user files, with the digest of the source that they were made from."""


def build_user_net(name: str, num_classes: int) -> nn.Module:
    """Call a user's factory.

    Raises
    ------
    InputError
        The code is not found, cannot be imported, fails, or returns something other than a module; or no code may run.
    """
    refuse_model_code(name, f"model {name}")
    source, function = user_model(name) or ("", "")
    factory = getattr(_module(name, source), function, None)
    if not callable(factory):
        raise InputError(f"model {name}: {source} has no function {function}; expected {function}(num_classes)")
    try:
        net = factory(num_classes=num_classes)
    except Exception as error:  # a user's code raises anything
        call = f"{function}(num_classes={num_classes})"
        raise InputError(f"model {name}: {call} failed: {type(error).__name__}: {error}") from error
    if not isinstance(net, nn.Module):
        raise InputError(f"model {name}: {function} returned {type(net).__name__}, expected a torch.nn.Module")
    return net


def model_key_fields(name: str) -> dict[str, Any]:
    """Return the key fields of a model: its name, and the digest of the source file if it is a user's.

    Files that the source imports are not included.
    """
    if not user_model(name):
        return {"model": name}
    return {"model": model_name(name), "source": source_digest(name)}


def source_digest(name: str) -> str:
    """Return the xxh3-128 of the source file of a user's model (32 hex digits)."""
    source, _ = user_model(name) or ("", "")
    return artifacts.file_digest(_source_file(name, source))


def _source_file(name: str, source: str) -> Path:
    """Return the file of a module, which is not imported; the packages that contain it are."""
    if source.endswith(".py"):
        path = Path(source)
    else:
        try:
            spec = importlib.util.find_spec(source)
        except Exception as error:  # importing its packages
            raise InputError(f"model {name}: {source} cannot be imported: {type(error).__name__}: {error}") from error
        if spec is None or not spec.origin:
            raise InputError(f"model {name}: there is no module {source} on the Python path")
        path = Path(spec.origin)
    if not path.is_file():
        raise InputError(f"model {name}: {path}: no such file")
    return path


def _module(name: str, source: str) -> ModuleType:
    """Import a user's module, or its file; a file that has changed is imported again."""
    path = _source_file(name, source)
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        digest = artifacts.file_digest(path)
        if path not in _loaded or _loaded[path][0] != digest:
            module_name = f"fastkd_model_{path.stem}"
            spec = importlib.util.spec_from_file_location(module_name, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[module_name] = module  # dataclasses look there
            spec.loader.exec_module(module)
            _loaded[path] = digest, module
        return _loaded[path][1]
    except Exception as error:
        raise InputError(f"model {name}: {path} cannot be imported: {type(error).__name__}: {error}") from error
