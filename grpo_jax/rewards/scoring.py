"""Prompts and completions in, a column of scores per reward channel out; and what went wrong, by name."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from grpo_jax.rewards import limits, reading, traced
from grpo_jax.rewards.extraction import text_of
from grpo_jax.rewards.specification import Reward, bind, check


class ScoredBatch(NamedTuple):
    """What the reward functions said of a batch. N completions, K channels."""

    scores: Float[np.ndarray | Array, "N K"]  # float32, unweighted; NaN = does not apply, or failed and marked
    channels: tuple[str, ...]  # K different names
    weights: Float[np.ndarray, " K"]  # float32
    columns: dict[str, Any]  # [N, ...]: what functions returned beside their scores
    failures: list[str]  # with on_error="mask": a message for each function that failed


class RewardError(RuntimeError):
    """A reward function raised, did not end, or returned something else than one finite number per completion."""


class _Batch(NamedTuple):
    """What the functions are given."""

    prompts: Sequence[Any]
    completions: Sequence[Any]
    columns: Mapping[str, Any]

    def call(self, reward: Reward, seconds: float) -> Any:
        if traced.is_in_graph(reward):
            return limits.call(partial(traced.call, reward, self.columns), seconds)
        by_position, by_keyword = bind(reward, self.columns)
        given = {"prompts": self.prompts, "completions": self.completions, **self.columns}
        arguments, options = [given[name] for name in by_position], {name: given[name] for name in by_keyword}
        return limits.call(partial(reward.function, *arguments, **options), seconds)

    def row(self, i: int) -> _Batch:
        columns = {name: values[i : i + 1] if _per_row(values) else values for name, values in self.columns.items()}
        return _Batch(self.prompts[i : i + 1], self.completions[i : i + 1], columns)

    def named(self, i: int) -> str:
        """How a message names a completion."""
        ids = self.columns.get("prompt_id")
        prompt = f" (prompt id {ids[i] if _per_row(ids) else ids})" if ids is not None else ""
        completion = self.completions[i]
        is_chat = isinstance(completion, list) and all(isinstance(message, Mapping) for message in completion)
        text = text_of(completion) if is_chat or isinstance(completion, str) else repr(completion)
        shown = text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}"
        return f"completion {i} of {len(self.completions)}{prompt}: {shown!r}"


# A function's channels are the same in every step. Known from an earlier one, they can be marked when it fails.
_channels_of: weakref.WeakKeyDictionary[Reward, tuple[str, ...]] = weakref.WeakKeyDictionary()


def score(
    rewards: Sequence[Reward],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Any],
    *,
    time_limit: float = 60.0,
    on_error: Literal["stop", "mask"] = "stop",
) -> ScoredBatch:
    """Calls each reward function once, on the whole batch; the scores are [N, K], unweighted.

    `columns` holds N values each, or a single value (the step) that is passed as it is; a function gets the columns
    that its signature names, or all with `**columns`. Functions are called in turn, each within `time_limit` seconds;
    what the asynchronous ones return is then awaited together, within as much. None in a function's list means that
    the reward does not apply to that completion: NaN in the scores. A `Scored` gives several channels.

    Raises ValueError where a column that a function needs is not there, and RewardError, which names the function and
    the completion, where a function raises, hangs, or returns a wrong number of values, a NaN, an infinity or no
    number. With on_error="mask" that becomes NaN and a line in `failures`: in the rows of wrong values, else in all
    rows of the function's channels. To name the completion on which a function raises, "stop" calls it again on single
    completions.
    """
    if on_error not in ("stop", "mask"):
        raise ValueError(f"on_error must be 'stop' or 'mask', got {on_error!r}")
    if not 0 < time_limit < math.inf:
        raise ValueError(f"time_limit must be a positive number of seconds, got {time_limit}")
    _check_lengths(prompts, completions, columns)
    check(rewards, columns)
    batch, failures = _Batch(prompts, completions, columns), []

    def fail(error: RewardError) -> None:
        if on_error == "stop":
            raise error from error.__cause__
        failures.append(str(error))

    found: list[dict[str, np.ndarray]] = []
    extra: dict[str, np.ndarray] = {}
    outcomes = _outcomes(rewards, batch, time_limit, stop=on_error == "stop")
    for reward, outcome in zip(rewards, outcomes):
        if isinstance(outcome, BaseException):
            fail(_failed(reward, batch, outcome, time_limit, search=on_error == "stop"))
    for reward, outcome in zip(rewards, outcomes):
        channels = None
        if len(completions) and not isinstance(outcome, BaseException):
            try:
                channels, own_columns, flaws = reading.read(outcome, reward.name, len(completions))
                _check_channels(reward, tuple(channels))
                for name in own_columns.keys() & extra.keys():
                    raise reading.Malformed(f"returned the column {name!r}, as a reward function before it did")
            except reading.Malformed as error:
                channels = None
                fail(RewardError(f"{reward} {error}"))
            else:
                extra |= own_columns
                for flaw in flaws:
                    fail(_flawed(reward, batch, flaw))
        if channels is None:
            names = _channels_of.get(reward) or _expected_channels(reward)
            channels = {name: np.full(len(completions), np.nan, np.float32) for name in names}
        found.append(channels)

    scores = [values for channels in found for values in channels.values()]
    return ScoredBatch(
        scores=np.stack(scores, axis=1) if scores else np.zeros((len(completions), 0), np.float32),
        channels=_distinct([name for channels in found for name in channels]),
        weights=_weights(rewards, found),
        columns=extra,
        failures=failures,
    )


def score_in_graph(rewards: Sequence[Reward], columns: Mapping[str, Array]) -> ScoredBatch:
    """`score` in jit, where every reward is in-graph: scores and columns are traced arrays.

    `columns`: what in-graph rewards take, `tokens` [N, T] among them. Raises: ValueError, as `traced.channels_of`.
    """
    found: list[dict[str, Array]] = []
    extra: dict[str, Array] = {}
    for reward in rewards:
        channels, own_columns = traced.channels_of(reward, columns)
        try:
            _check_channels(reward, tuple(channels))
        except reading.Malformed as error:
            raise ValueError(f"{reward} {error}") from error
        if clash := own_columns.keys() & extra.keys():
            raise ValueError(f"{reward} returned the column {clash.pop()!r}, as a reward function before it did")
        found.append(channels)
        extra |= own_columns
    return ScoredBatch(
        scores=jnp.stack([values for channels in found for values in channels.values()], axis=1),
        channels=_distinct([name for channels in found for name in channels]),
        weights=_weights(rewards, found),
        columns=extra,
        failures=[],
    )


def _outcomes(rewards: Sequence[Reward], batch: _Batch, seconds: float, *, stop: bool) -> list[Any]:
    """What each function returned, awaited, or the exception that it raised; with `stop` up to the first exception."""
    outcomes: list[Any] = []
    waiting: dict[int, Any] = {}
    try:
        for number, reward in enumerate(rewards if len(batch.completions) else ()):
            try:
                outcomes.append(batch.call(reward, seconds))
            except (Exception, SystemExit) as error:
                outcomes.append(error)
                if stop:
                    return outcomes
            if hasattr(outcomes[-1], "__await__"):
                waiting[number] = outcomes[-1]
        handed_over = dict(waiting)
        waiting.clear()
        for number, outcome in zip(handed_over, limits.gather(list(handed_over.values()), seconds)):
            outcomes[number] = outcome
        return outcomes if len(batch.completions) else [None] * len(rewards)
    finally:
        for awaitable in waiting.values():
            if hasattr(awaitable, "close"):
                awaitable.close()  # else Python warns of a coroutine that was never awaited


def _failed(reward: Reward, batch: _Batch, error: BaseException, seconds: float, *, search: bool) -> RewardError:
    """The report of a function that raised or hung; with `search` it names a completion that makes it raise."""
    called = f"it was called on {len(batch.completions)} completions, first {batch.named(0)}"
    if isinstance(error, limits.OutOfTime):
        return RewardError(f"{reward} did not end within {seconds:g} s (time_limit); {called}")
    culprit = _first_that_raises(reward, batch, type(error), seconds) if search else None
    if culprit is not None:
        called = f"called again on single completions it raises on {batch.named(culprit)}"
    report = RewardError(f"{reward} raised {type(error).__name__}: {error}; {called}")
    report.__cause__ = error
    return report


def _first_that_raises(reward: Reward, batch: _Batch, kind: type, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    for i in range(len(batch.completions)):
        (outcome,) = _outcomes([reward], batch.row(i), max(end - time.monotonic(), 1e-3), stop=True)
        if type(outcome) is kind:
            return i
        if time.monotonic() > end:
            return None
    return None


def _flawed(reward: Reward, batch: _Batch, flaw: reading.Flaw) -> RewardError:
    where = "" if flaw.channel == reward.name else f" in its channel {flaw.channel!r}"
    many = f"on {flaw.rows} completions, first " if flaw.rows > 1 else ""
    return RewardError(
        f"{reward} returned {flaw.value}{where}, which is not a finite number, for {many}{batch.named(flaw.row)}. "
        "Where the reward does not apply, return None."
    )


def _check_lengths(prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]) -> None:
    if len(prompts) != len(completions):
        raise ValueError(
            f"each completion needs its prompt: got {len(prompts)} prompts, {len(completions)} completions"
        )
    for name, values in columns.items():
        if _per_row(values) and len(values) != len(completions):
            raise ValueError(f"the column {name!r} has {len(values)} values for {len(completions)} completions")


def _per_row(values: Any) -> bool:
    return hasattr(values, "__len__") and not isinstance(values, str | bytes | Mapping)


def _expected_channels(reward: Reward) -> tuple[str, ...]:
    return tuple(reward.weight) if isinstance(reward.weight, Mapping) else (reward.name,)


def _check_channels(reward: Reward, names: tuple[str, ...]) -> None:
    if isinstance(reward.weight, Mapping):
        weighed = [name if name in reward.weight else _group(name) for name in names]
        if set(weighed) != set(reward.weight):
            raise reading.Malformed(f"returned the channels {list(names)}, but has weights for {list(reward.weight)}")
    if names != _channels_of.setdefault(reward, names):
        raise reading.Malformed(f"returned the channels {list(names)}, earlier {list(_channels_of[reward])}: keep them")


def _weights(rewards: Sequence[Reward], found: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.array([_weight(r, name) for r, channels in zip(rewards, found) for name in channels], np.float32)


def _weight(reward: Reward, channel: str) -> float:
    if isinstance(reward.weight, Mapping):
        return reward.weight[channel] if channel in reward.weight else reward.weight[_group(channel)]
    return reward.weight


def _group(channel: str) -> str:
    """steps/0 is a channel of the group steps, and weighed as that."""
    return channel.rpartition("/")[0]


def _distinct(names: list[str]) -> tuple[str, ...]:
    """The names, a second "x" as "x_2"."""
    distinct: list[str] = []
    for name in names:
        number, new = 2, name
        while new in distinct:
            number, new = number + 1, f"{name}_{number}"
        distinct.append(new)
    return tuple(distinct)
