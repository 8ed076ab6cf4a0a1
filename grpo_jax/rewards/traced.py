"""Rewards that are JAX functions of tokens: part of the compiled iteration where all are, else called like others."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from grpo_jax.rewards.specification import Reward, bind
from grpo_jax.types import Scored

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = {"tokens": np.int32, "lengths": np.int32, "prompt_id": np.int32, "step": np.int32, "finished": np.bool_}
NUMBERS = (bool, int, float, np.number, np.bool_)
LARGEST = 1e38  # beyond it a number is no float32
ON_THE_HOST = "leave @in_graph out, and it is called on the host"


def in_graph(function: F) -> F:
    """Mark a reward as a JAX function of arrays, which the compiled iteration can then hold.

    It takes by name what it needs of: tokens [N, T] (0 beyond a completion's end), lengths [N] (stop token included),
    finished [N], prompt_id [N], step [], and the dataset's columns of numbers [N] (float32, NaN where a row has none).
    It returns one number per completion [N], or `Scored` of channels [N] or [N, k] and columns [N, ...], in jax.numpy
    alone. NaN: it does not apply. Each row is scored for itself: some may be padding, of length 0.
    """
    function.in_graph = True  # type: ignore[attr-defined]
    return function


def is_in_graph(reward: Reward) -> bool:
    function: Any = reward.function
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "in_graph", False)


def channels_of(reward: Reward, columns: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """In jit: its channels, each [N] float32, and the columns that it returns.

    Raises: ValueError where it asks for text, cannot be traced, or returns another shape.
    """
    if texts := sorted({"prompts", "completions"} & inspect.signature(reward.function).parameters.keys()):
        raise ValueError(f"{reward} is in-graph, but asks for the text {texts[0]!r}: take `tokens`, or {ON_THE_HOST}")
    by_position, by_keyword = bind(reward, columns)
    given = {name: columns[name] for name in by_keyword if name in columns}
    try:
        returned = reward.function(*(columns[name] for name in by_position), **given)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        raise ValueError(
            f"{reward} is in-graph, but needs the value of an array while it is compiled: {str(error).splitlines()[0]} "
            f"Use jax.numpy on its arguments, and no if, float() or loop over their values; or {ON_THE_HOST}"
        ) from error
    channels: dict[str, Array] = {}
    scored = returned if isinstance(returned, Scored) else Scored({reward.name: returned})
    for name, values in scored.channels.items():
        table = _table(reward, values, len(columns["tokens"]), several=scored is returned)
        nested = jnp.ndim(values) == 2
        channels |= {f"{name}/{j}" if nested else name: table[:, j] for j in range(table.shape[1])}
    return channels, {name: jnp.asarray(values) for name, values in scored.columns.items()}


def _table(reward: Reward, values: Any, rows: int, *, several: bool) -> Array:
    shape = jnp.shape(values)
    if shape[:1] != (rows,) or len(shape) > 1 + several:
        raise ValueError(
            f"{reward} is in-graph and returned the shape {list(shape)} for {rows} completions, expected one number "
            f"for each [{rows}]; several channels are returned as Scored(channels)"
        )
    return jnp.asarray(values, jnp.float32).reshape(rows, -1)


def call(reward: Reward, columns: Mapping[str, Any]) -> Scored:
    """The same on the host, in a program of its own: numbers, and None where the reward does not apply."""
    arrays = {name: array for name, values in columns.items() if (array := _array(name, values)) is not None}
    names, program = _program(reward)
    values, own_columns = jax.device_get(program(arrays))
    scores = {name: [None if math.isnan(x) else x for x in column.tolist()] for name, column in zip(names, values)}
    return Scored(scores, own_columns)


@functools.cache
def _program(reward: Reward) -> tuple[list[str], Callable[..., Any]]:
    """The jitted channels, and their names: filled when it is traced, for a dict would come back sorted."""
    names: list[str] = []

    def program(columns: dict[str, Array]):
        channels, own_columns = channels_of(reward, columns)
        names[:] = channels
        return tuple(channels.values()), own_columns

    return names, jax.jit(program)


def _array(name: str, values: Any) -> np.ndarray | None:
    """A column as the compiled iteration has it; None for one that does not hold numbers."""
    if name in DTYPES:
        return np.asarray(values, DTYPES[name])
    return numeric(values) if isinstance(values, list) else None


def numeric(values: list[Any]) -> np.ndarray | None:
    """A dataset's column as float32, NaN where a row has nothing; None if it does not hold numbers of that size."""
    if not all(v is None or (isinstance(v, NUMBERS) and abs(v) < LARGEST) for v in values):  # type: ignore[operator]
        return None
    return np.asarray(values, np.float32)
