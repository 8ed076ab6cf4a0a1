"""What a reward function returned, checked and made into arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.types import Scored


class Malformed(Exception):
    """Not one number per completion."""


class Flaw(NamedTuple):
    """Values of a channel that are no finite numbers: how many rows, the first of them, what was there."""

    channel: str
    rows: int
    row: int
    value: str


class Reading(NamedTuple):
    channels: dict[str, np.ndarray]  # float32 [N]; NaN where the reward does not apply and in the rows of a flaw
    columns: dict[str, np.ndarray]  # [N, ...]
    flaws: list[Flaw]


def read(returned: Any, name: str, rows: int) -> Reading:
    """The channels that a function returned: its own `name` for a list, those of a `Scored` otherwise.

    A channel [N, k] of a `Scored` becomes k channels name/0 ... name/k-1. Raises Malformed where there is not one value
    per completion.
    """
    if not isinstance(returned, Scored):
        table, nested, wrong = _table(returned, name, "", rows)
        if nested:
            raise Malformed("returned lists in its list, expected one number (or None) per completion")
        return Reading({name: table[:, 0]}, {}, wrong)
    channels: dict[str, np.ndarray] = {}
    flaws: list[Flaw] = []
    for channel, values in returned.channels.items():
        table, nested, wrong = _table(values, channel, f"in its channel {channel!r} ", rows)
        names = [f"{channel}/{j}" for j in range(table.shape[1])] if nested else [channel]
        channels |= zip(names, table.T)
        flaws += wrong
    return Reading(channels, {key: _column(key, values, rows) for key, values in returned.columns.items()}, flaws)


def _table(values: Any, channel: str, where: str, rows: int) -> tuple[np.ndarray, bool, list[Flaw]]:
    """The values as float32 [N, k], whether there was a row of them per completion, and what is no finite number."""
    if hasattr(values, "tolist"):  # arrays of any library
        values = values.tolist()
    if not isinstance(values, list | tuple):
        kind = "nothing" if values is None else f"{_shown(values)} ({type(values).__name__})"
        hint = "; several named channels are returned as Scored(channels)" if isinstance(values, Mapping) else ""
        raise Malformed(f"returned {where}{kind}, expected a list with one number (or None) per completion{hint}")
    if len(values) != rows:
        value = "value" if len(values) == 1 else "values"
        raise Malformed(f"returned {where}{len(values)} {value} for {rows} completions, expected one for each")
    nested = any(isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0 for value in values)
    if nested:
        lines = [value.tolist() if hasattr(value, "tolist") else value for value in values]
        width = next(len(line) for line in lines if isinstance(line, list | tuple))
        lines = [(None,) * width if line is None else line for line in lines]
        if any(not isinstance(line, list | tuple) or len(line) != width for line in lines):
            raise Malformed(f"returned {where}rows of different lengths, expected {width} numbers for each completion")
    else:
        lines = [(value,) for value in values]
    table = np.array([[_number(value) for value in line] for line in lines], np.float64).reshape(rows, -1)
    with np.errstate(over="ignore"):
        table = table.astype(np.float32)
    flaws = []
    if not np.isfinite(table).all():
        wrong = [
            (i, value)
            for i, line in enumerate(lines)
            for j, value in enumerate(line)
            if value is not None and not np.isfinite(table[i, j])
        ]
        if wrong:
            bad_rows = sorted({i for i, _ in wrong})
            table[bad_rows] = np.nan
            flaws = [Flaw(channel, len(bad_rows), wrong[0][0], _shown(wrong[0][1]))]
    return table, nested, flaws


def _number(value: Any) -> float:
    """The value as a float; NaN for what is none, which `_table` tells from None."""
    if type(value) is float:
        return value
    if value is None or isinstance(value, str | bytes):
        return np.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return np.nan


def _column(name: str, values: Any, rows: int) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise Malformed(f"returned the column {name!r} with {array.dtype} values, expected numbers or booleans")
    if array.ndim == 0 or len(array) != rows:
        raise Malformed(f"returned the column {name!r} of shape {array.shape} for {rows} completions")
    return array


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
