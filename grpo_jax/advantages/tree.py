"""TEMPO: the completions of a group form a tree of prefixes, and the rewards below a prefix say what it is worth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax import segments
from grpo_jax.advantages.group import _compared

SMALLEST_STD = 1e-6  # of the largest reward in the group: below it a difference is rounding


def prefix_gains(
    rewards: Float[Array, "N"], group_ids: Int[Array, "N"], tokens: Int[Array, "N T"], lengths: Int[Array, "N"]
) -> Float[Array, "N T"]:
    """What each token changes in the value of the prefix: the temporal difference on the tree.

    delta_t = V(s_{t+1}) - V(s_t), V(s) = mean reward of the group's completions that begin with s; V(s_0) is the
    group's mean. Exactly 0 where all completions with the prefix go on alike, after a completion has become unique,
    and beyond its length. The sum over t is V(whole completion) - mean, r - mean if no other is the same.

    tokens: >= 0, as sampled (not text tokenised again), the stop included; those beyond `lengths` are not looked at.
    Exact matching, by sorting (prefix, token) pairs token after token: O(T N log N) time, and O(N) memory beside the
    result. Raises: ValueError for other shapes.
    """
    rewards, group_ids = _compared(rewards, group_ids)
    rewards = segments.centered(rewards, group_ids)  # values are differences; these round less
    tokens, lengths = jnp.asarray(tokens), jnp.asarray(lengths)
    if tokens.ndim != 2 or tokens.shape[:1] != rewards.shape or lengths.shape != rewards.shape:
        raise ValueError(
            f"the prefix tree needs tokens [N, T] and lengths [N] for {rewards.shape[0]} rewards, got "
            f"{list(tokens.shape)} and {list(lengths.shape)}"
        )

    def grow(prefix: tuple, column: tuple) -> tuple:
        ids, size, value = prefix
        token, place = column
        ids = segments.join(ids, jnp.where(place < lengths, token, -1))
        below, worth = segments.count(ids), segments.mean(rewards, ids)
        gain = jnp.where((below > 0) & (below < size), worth - value, 0)  # as many below: the very same ones
        return (ids, below, worth), gain

    start = group_ids, segments.count(group_ids), segments.mean(rewards, group_ids)
    return jax.lax.scan(grow, start, (tokens.T, jnp.arange(tokens.shape[1])))[1].T


def prefix_tree(
    rewards: Float[Array, "N"], group_ids: Int[Array, "N"], tokens: Int[Array, "N T"], lengths: Int[Array, "N"]
) -> Float[Array, "N T"]:
    """Advantage of each token: GRPO's, plus what the token changed in the value of the prefix.

    A_t = (r - mean_g + delta_t) / std_g, std over n - 1, delta from `prefix_gains`; 0 beyond a completion's length, and
    for a group of one, of equal rewards, or whose std is below 1e-6 of its largest |r|. Without branches it is GRPO's
    advantage on every token.

    The value of a prefix counts the completion itself, so a unique branch is worth its own reward: there is no
    leave-one-out. Source: arXiv:2509.18314; the paper's std and end-of-sequence details are not known, these are ours.
    """
    gains = prefix_gains(rewards, group_ids, tokens, lengths)
    rewards, group_ids = _compared(rewards, group_ids)
    std = segments.std(rewards, group_ids, ddof=1)[:, None]
    base = segments.centered(rewards, group_ids)[:, None]
    differ = std > SMALLEST_STD * segments.maximum(jnp.abs(rewards), group_ids)[:, None]
    live = (jnp.arange(gains.shape[1]) < jnp.asarray(lengths)[:, None]) & differ
    return jnp.where(live & (group_ids >= 0)[:, None], (base + gains) / jnp.where(live, std, 1), 0)
