"""Functions of one's own that a configuration names: "path/to/file.py:function" or "package.module:function"."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def load_function(reference: str) -> Callable:
    """The function that a text names; a file is loaded once, whatever is asked of it.

    Raises: ValueError if there is no such file, module or function, naming the nearest.
    """
    place, _, attribute = reference.rpartition(":")
    found: Any = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    own = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
    for part in attribute.split("."):
        if not hasattr(found, part):
            nearest = difflib.get_close_matches(attribute, own, 3, 0.4) or own
            raise ValueError(f"{place} has no function {attribute!r}; it has {', '.join(nearest) or 'none'}")
        found = getattr(found, part)
    return found


def _load_file(path: Path) -> ModuleType:
    full = path.expanduser().resolve()
    if not full.is_file():
        raise ValueError(f"there is no file {str(path)!r} (looked for {full})")
    name = "grpo_jax_file_" + str(full).encode().hex()  # one module per file, whatever its functions are called
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, full)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file that can be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception):
            raise ValueError(f"{path} could not be loaded: {type(error).__name__}: {error}") from error
        raise
    return module


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ValueError(f"the module {name!r} could not be loaded: {type(error).__name__}: {error}") from error
