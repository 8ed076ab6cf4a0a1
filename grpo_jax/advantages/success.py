"""How often each prompt of a dataset has succeeded of late: an (init, update) pair over a pytree of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax import segments


class SuccessWindow(NamedTuple):
    """P prompts of the dataset, W rewards remembered of each."""

    recent: Float[Array, "P W"]  # the last W rewards, in a ring
    seen: Int[Array, "P"]  # rewards so far
    rate: Float[Array, "P"]


def success_window(
    *, window: int = 16
) -> tuple[Callable[[int], SuccessWindow], Callable[[SuccessWindow, Array, Array], SuccessWindow]]:
    """Knapsack RL's tracker: (init, update).

    init(prompts) -> state. update(state, rewards [N], prompt_ids [N]) -> state: the rate of a prompt that has `window`
    new rewards or more becomes their mean, that of one with fewer the mean of its last `window` rewards, old and new.

    rewards: in [0, 1], or -1 for a failure, which counts as 0; NaN rows and prompt_ids of -1 are passed over.
    prompt_ids: in [0, P). Raises: ValueError for a window or a number of prompts below 1, or shapes that differ.
    Source: arXiv:2509.25849, its code.
    """
    if window < 1:
        raise ValueError(f"a window holds one reward or more, got {window}")

    def init(prompts: int) -> SuccessWindow:
        if prompts < 1:
            raise ValueError(f"a dataset has one prompt or more, got {prompts}")
        return SuccessWindow(
            jnp.zeros((prompts, window), jnp.float32), jnp.zeros(prompts, jnp.int32), jnp.zeros(prompts, jnp.float32)
        )

    def update(state: SuccessWindow, rewards: Float[Array, "N"], prompt_ids: Int[Array, "N"]) -> SuccessWindow:
        state = SuccessWindow(*map(jnp.asarray, state))
        rewards, prompt_ids = jnp.asarray(rewards).astype(jnp.float32), jnp.asarray(prompt_ids)
        if rewards.ndim != 1 or rewards.shape != prompt_ids.shape:
            raise ValueError(
                f"needs one reward and one prompt per row, got {list(rewards.shape)} and {list(prompt_ids.shape)}"
            )
        counts = ~jnp.isnan(rewards) & (prompt_ids >= 0)
        rewards = jnp.where(counts, jnp.clip(rewards, 0, 1), 0)
        rows = segments.join(jnp.where(counts, prompt_ids, -1))  # ids below N, whatever P is
        new, place = segments.count(rows), segments.rank(jnp.zeros_like(rewards), rows).astype(jnp.int32)
        nowhere = len(state.seen)
        at = jnp.where(counts, prompt_ids, nowhere)
        slot = (state.seen[jnp.maximum(prompt_ids, 0)] + place) % window
        kept = jnp.where(place >= new - window, at, nowhere)  # a ring is written once
        recent = state.recent.at[kept, slot].set(rewards, mode="drop")
        seen = state.seen.at[at].add(1, mode="drop")
        filled = jnp.arange(window) < seen[:, None]
        windowed = jnp.where(filled, recent, 0).sum(axis=1) / jnp.clip(seen, 1, window)
        rate = jnp.where(new >= window, segments.mean(rewards, rows), windowed[jnp.maximum(prompt_ids, 0)])
        return SuccessWindow(recent, seen, state.rate.at[at].set(rate, mode="drop"))

    return init, update


def success_rates(state: SuccessWindow, *, fewest: int = 8) -> Float[Array, "P"]:
    """The rate of every prompt, NaN where fewer than `fewest` rewards have been seen."""
    return jnp.where(state.seen >= fewest, state.rate, jnp.nan)
