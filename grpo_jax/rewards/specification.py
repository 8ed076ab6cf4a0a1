"""What a reward is: a function, a name, a weight; how a configuration names it; which columns it takes."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from grpo_jax.references import load_function
from grpo_jax.rewards.exact import exact_match, numeric_match
from grpo_jax.rewards.format import regex_format, tag_format
from grpo_jax.rewards.length import length_penalty
from grpo_jax.rewards.mathematics import mathematical_equivalence
from grpo_jax.types import RewardFn

# Each makes a reward function from its options.
BUILT_IN: dict[str, Callable[..., RewardFn]] = {
    "exact": exact_match,
    "numeric": numeric_match,
    "math": mathematical_equivalence,
    "tags": tag_format,
    "regex": regex_format,
    "length": length_penalty,
}
STANDARD_COLUMNS = ("step", "prompt_id", "completion_ids", "tokens", "finished", "lengths")


@dataclass(frozen=True, eq=False)
class Reward:
    """A reward function with its name and weight.

    `weight` is a number, or for a function that returns `Scored` one per channel: {"helpful": 1.0, "brief": 0.2}.
    """

    function: RewardFn
    name: str
    weight: float | Mapping[str, float] = 1.0

    def __post_init__(self):
        if not callable(self.function):
            raise ValueError(f"reward {self.name!r}: expected a function, got {self.function!r}")
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a reward's name must be a text that is not empty, got {self.name!r}")
        for weight in self.weight.values() if isinstance(self.weight, Mapping) else [self.weight]:
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ValueError(f"reward {self.name!r}: weight must be a finite number, got {weight!r}")

    def __str__(self) -> str:
        return f"reward {self.name!r} ({_place(self.function)})"


def resolve(spec: str | Callable | Mapping[str, Any] | Reward) -> Reward:
    """The reward that `spec` names.

    `spec` is a built-in's name ("exact", "numeric", "math", "tags", "regex", "length"), "path/to/file.py:function",
    "package.module:function", a function, or a mapping {"function": any of these, "weight": 1.0, "name": "...", and
    options of the function}. An option that is bound so is never replaced by a column of the same name.
    Raises ValueError for an unknown name or option, naming the nearest valid ones.
    """
    if isinstance(spec, Reward):
        return spec
    options: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {"function": spec}
    if "function" not in options:
        raise ValueError(f"a reward given as a mapping needs the key 'function', got only {sorted(options)}")
    source = options.pop("function")
    weight, own_name = options.pop("weight", None), options.pop("name", None)

    function = _find(source) if isinstance(source, str) else source
    if not callable(function) or isinstance(function, Reward):
        raise ValueError(f"a reward is a name, 'path/to/file.py:function' or a function, got {source!r}")
    built_in = [name for name, factory in BUILT_IN.items() if factory is function]
    name = built_in[0] if built_in else _name(function)
    if built_in:
        _check_options(f"the built-in reward {name!r}", function, options, all_of_them=True)
        function = function(**options)
    else:
        _check_options(f"reward {name!r} ({_place(function)})", function, options)
        function = functools.partial(function, **options) if options else function
    return Reward(function, name if own_name is None else own_name, 1.0 if weight is None else weight)


def check(rewards: Iterable[Reward], columns: Iterable[str]) -> None:
    """Raises ValueError if a reward function needs a column that is not among `columns` (names).

    The columns are those of the dataset and `STANDARD_COLUMNS`; `score` asks this too, but a run asks it before it
    samples anything.
    """
    names = set(columns)
    for clash in ("prompts", "completions"):
        if clash in names:
            raise ValueError(f"the column {clash!r} has the name of what every reward function gets: rename the column")
    for reward in rewards:
        bind(reward, names)


def bind(reward: Reward, columns: Iterable[str]) -> tuple[list[str], list[str]]:
    """Which of `prompts`, `completions` and the columns the function takes by position, and which by keyword."""
    function = reward.function
    available = {"prompts": None, "completions": None, **dict.fromkeys(columns)}
    bound = function.keywords if isinstance(function, functools.partial) else {}
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise ValueError(f"{reward}: its signature cannot be read; wrap it in a function of your own") from error
    by_position, by_keyword, missing, takes_all = [], [], [], False
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_all = True
        elif parameter.kind is parameter.VAR_POSITIONAL or parameter.name in bound:
            continue
        elif parameter.name not in available:
            if parameter.default is parameter.empty:
                missing.append(parameter.name)
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            by_position.append(parameter.name)
        else:
            by_keyword.append(parameter.name)
    missing += [name for name in getattr(function, "needs", ()) if name not in available]
    if missing:
        nearest = difflib.get_close_matches(missing[0], available, 1)
        raise ValueError(
            f"{reward} needs {' and '.join(map(repr, missing))}, which no column provides. "
            f"There are: {', '.join(available)}."
            + (f" Did you mean {nearest[0]!r}?" if nearest else "")
            + " Rename the parameter or the column, or give the parameter a default."
        )
    if takes_all:
        by_keyword += [name for name in available if name not in {*bound, *by_position, *by_keyword}]
    return by_position, by_keyword


def _find(source: str) -> Callable:
    """The function that a text names: a built-in, or one in a file or a module."""
    if ":" not in source:
        if source in BUILT_IN:
            return BUILT_IN[source]
        nearest = difflib.get_close_matches(source, BUILT_IN, 3, 0.4)
        module, _, function = source.rpartition(".")
        raise ValueError(
            f"there is no reward {source!r}."
            + (f" Nearest: {', '.join(nearest)}." if nearest else "")
            + f" Built in are {', '.join(BUILT_IN)}; one of your own is 'path/to/file.py:function' or "
            + (f"{module + ':' + function!r}." if module and not source.endswith(".py") else "'module:function'.")
        )
    return load_function(source)


def _check_options(whose: str, function: Callable, options: Mapping[str, Any], *, all_of_them: bool = False) -> None:
    """Raises ValueError for an option that the function lacks, or with `all_of_them` for one that it needs."""
    parameters = inspect.signature(function).parameters if options or all_of_them else {}
    if all_of_them:
        needed = [p.name for p in parameters.values() if p.default is p.empty and p.name not in options]
        if needed:
            raise ValueError(f"{whose} needs the option{'s' * (len(needed) > 1)} {', '.join(map(repr, needed))}")
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for option in options:
        if option not in parameters or parameters[option].kind is inspect.Parameter.POSITIONAL_ONLY:
            nearest = difflib.get_close_matches(option, [*parameters, "weight", "name"], 3, 0.4)
            known = f"; nearest: {', '.join(nearest)}" if nearest else f"; it has {', '.join(parameters)}"
            raise ValueError(f"{whose} has no option {option!r}{known}")


def _plain(function: Callable) -> Callable:
    return _plain(function.func) if isinstance(function, functools.partial) else function


def _name(function: Callable) -> str:
    function = _plain(function)
    name = getattr(function, "__name__", type(function).__name__)
    return "reward" if name == "<lambda>" else name


def _place(function: Callable) -> str:
    function = _plain(function)
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is not None:
        return f"{code.co_filename}:{code.co_firstlineno}"
    return f"{getattr(function, '__module__', '?')}.{type(function).__qualname__}"
