"""One short file per published method. A method is plain GRPO with some answers replaced."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from grpo_jax.references import load_function
from grpo_jax.training.correction import corrected
from grpo_jax.types import Method

if TYPE_CHECKING:
    from grpo_jax.training.configuration import Config


def names() -> list[str]:
    """The methods that can be named in a configuration."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def summaries() -> dict[str, str]:
    """What each of them does, in a line: the first line of its file."""
    return {name: inspect.getdoc(importlib.import_module(f"{__name__}.{name}")).splitlines()[0] for name in names()}


def resolve(name: str, *, options: Mapping[str, Any], settings: Mapping[str, Any]) -> Method:
    """The method of that name, made with its options.

    name: a published method (a file of this folder) or path/to/file.py:function. options: what the user chose; each
    must be an option of the method. settings: what the run knows (prompts, group_size, max_new, steps), for those that
    want it.
    Raises: ValueError naming the nearest valid method or option.
    """
    factory = _factory(name)
    parameters = inspect.signature(factory).parameters
    known = {p.name for p in _options(factory)} - set(settings)
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


def configured(config: Config) -> Method:
    """The method that a configuration names, told of its batch, its completions and its steps. Raises: as `resolve`."""
    settings = {
        "prompts": config.batch.prompts,
        "group_size": config.batch.group_size,
        "max_new": config.sampling.max_new,
        "steps": config.steps,
    }
    method = resolve(config.method.name, options=config.method.options, settings=settings)
    return corrected(method, cap=config.training.importance_cap)


def explain(name: str) -> str:
    """What a method does and its options with their defaults, for people."""
    factory = _factory(name)
    options = ", ".join(str(p).replace("'", "") for p in _options(factory) if p.default is not p.empty)
    module = inspect.getdoc(sys.modules[factory.__module__]) or ""
    return "\n\n".join([module.partition("\n")[0], inspect.getdoc(factory) or "", f"options: {options}"])


def _options(factory: Callable[..., Method]) -> list[inspect.Parameter]:
    """What a configuration may choose; what a method passes on with **options goes to plain GRPO."""
    parameters = dict(inspect.signature(factory).parameters)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        parameters = {k: p for k, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
        parameters = {**parameters, **dict(inspect.signature(_factory("grpo")).parameters), **parameters}
    return [p for p in parameters.values() if p.name != "aggregate"]  # a function, for Python only


def _factory(name: str) -> Callable[..., Method]:
    if ":" in name:
        return load_function(name)
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"there is no method {name!r}{hint} Known: {', '.join(names())}, or path/to/file.py:function")
    return getattr(importlib.import_module(f"{__name__}.{name}"), name)
