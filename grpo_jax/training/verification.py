"""Scoring by all processes: each scores its share of the prompts, whole, and every one gets all the scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from grpo_jax import processes
from grpo_jax.rewards import RewardError
from grpo_jax.training import host_state
from grpo_jax.types import Rollout

Score = Callable[[Rollout, np.ndarray], Rollout]


def scored(rows: Rollout, score: Score) -> Rollout:
    """The rollout with its scores. `score` gets some of the rows, all of a prompt together, and their numbers [n].

    Raises: on every process, what `score` raised on the first that failed, with the process named.
    """
    if processes.count() == 1:
        return score(rows, np.arange(len(rows)))
    shares = shares_of(rows.prompt_ids, processes.count())
    own, error = shares[processes.index()], None
    said: dict[str, Any] = {}
    try:
        if len(own):  # there may be fewer prompts than processes
            part = score(rows.take(own), own)
            said = {
                "scores": np.asarray(part.scores, np.float32),
                "channels": list(part.channels),
                "weights": [float(w) for w in part.channel_weights],
                "columns": {name: np.asarray(x) for name, x in part.columns.items()},
            }
    except Exception as caught:
        error, said = caught, {"error": str(caught) or type(caught).__name__}
    parts = [_unpacked(message) for message in processes.gather(_packed(said))]
    if failed := [i for i, part in enumerate(parts) if "error" in part]:
        raise RewardError(f"{processes.name(failed[0])}: {parts[failed[0]]['error']}") from error
    return _joined(rows, shares, parts)


def shares_of(prompt_ids: np.ndarray, count: int) -> list[np.ndarray]:
    """Row numbers of each process: prompts are dealt whole, in the order in which they come, in nearly equal shares."""
    prompts, first, owner = np.unique(prompt_ids, return_index=True, return_inverse=True)
    rank = np.empty(len(prompts), np.int64)
    rank[np.argsort(first)] = np.arange(len(prompts))
    return [np.flatnonzero(np.isin(rank[owner], share)) for share in np.array_split(np.arange(len(prompts)), count)]


def _joined(rows: Rollout, shares: Sequence[np.ndarray], parts: Sequence[dict[str, Any]]) -> Rollout:
    """Channels and columns by name. A function that failed where failures are marked may lack some of its channels."""
    told = [i for i, share in enumerate(shares) if len(share)]
    most = max(told, key=lambda i: len(parts[i]["channels"]))
    channels = parts[most]["channels"]
    scores = np.full((len(rows), len(channels)), np.nan, np.float32)
    columns: dict[str, np.ndarray] = {}
    for i in told:
        part, share = parts[i], shares[i]
        for k, channel in enumerate(part["channels"]):
            if channel in channels:
                scores[share, channels.index(channel)] = part["scores"][:, k]
            elif not np.isnan(part["scores"][:, k]).all():
                raise RewardError(
                    f"{processes.name(i)} scores the channels {part['channels']}, {processes.name(most)} {channels}: "
                    "a reward function has the same channels for all prompts"
                )
        for name, values in part["columns"].items():
            if name not in columns:
                columns[name] = _blank(len(rows), values)
            columns[name][share] = values
    return rows.replace(
        scores=scores,
        channels=tuple(channels),
        channel_weights=tuple(parts[most]["weights"]),
        columns={**rows.columns, **columns},
    )


def _blank(n: int, values: np.ndarray) -> np.ndarray:
    """Room for a column; NaN, or 0 where there is none, in rows of a process that does not have it."""
    return np.full((n, *values.shape[1:]), np.nan if values.dtype.kind == "f" else 0, values.dtype)


def _packed(value: dict[str, Any]) -> bytes:
    document, archive = host_state.encode(value)
    text = document.encode()
    return len(text).to_bytes(8, "little") + text + archive


def _unpacked(message: bytes) -> dict[str, Any]:
    size = int.from_bytes(message[:8], "little")
    return host_state.decode(message[8 : 8 + size].decode(), message[8 + size :])
