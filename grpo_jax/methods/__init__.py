"""One short file per published method. A method is plain GRPO with some answers replaced."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo_jax.types import Method


def names() -> list[str]:
    """The methods that can be named in a configuration."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def resolve(name: str, *, options: Mapping[str, Any], settings: Mapping[str, Any]) -> Method:
    """The method of that name, made with its options.

    name: a published method (a file of this folder) or path/to/file.py:function. options: what the user chose; each
    must be an option of the method. settings: what the run knows (prompts, group_size, max_new), passed where wanted.
    Raises: ValueError naming the nearest valid method or option.
    """
    factory = _factory(name)
    parameters = inspect.signature(factory).parameters
    known = {k for k, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):  # the rest goes to plain GRPO
        known |= set(inspect.signature(_factory("grpo")).parameters)
    known -= {"aggregate", *settings}  # a function, for Python only; and what the run itself decides
    unknown = sorted(set(options) - known)
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        raise ValueError(
            f"method {name!r} has no option {unknown[0]!r}"
            + (f"; did you mean {near[0]!r}?" if near else ".")
            + f" Its options are {sorted(known)}"
        )
    wanted = {k: v for k, v in settings.items() if k in parameters}
    return factory(**wanted, **options)


def _factory(name: str) -> Callable[..., Method]:
    if ":" in name:
        path, _, function = name.rpartition(":")
        if not Path(path).is_file():
            raise ValueError(f"method {name!r}: there is no file {path}")
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise ValueError(f"method {name!r}: {path} has no function {function!r}")
        return getattr(module, function)
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"there is no method {name!r}{hint} Known: {', '.join(names())}, or path/to/file.py:function")
    return getattr(importlib.import_module(f"{__name__}.{name}"), name)
