"""Ranked lists: a reward for each rank, compared rank by rank, and spread over the decisions that wrote the item.

K ranks of the list that is asked for; the item id of a decision is the line it stands on, from 0; ids of K and more are
overflow, -1 is padding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.advantages.group import group_z_score


def rank_rewards(hits: Float[Array, "N K"], *, decay: str | float = "exp_inf") -> Float[Array, "N K"]:
    """What each rank earns: its own hit and, with a finite decay, those of later ranks, never of earlier ones.

    "exp_inf": R_k = h_k.  "log_decay": R_k = sum_{j >= k} h_j / log2(j + 1), ranks from 1.
    A number: R_k = sum_{j >= k} h_j / decay^(j - k).

    hits: usually 0 or 1; a NaN earns nothing for earlier ranks and stays NaN. decay: a number of at least 1.
    Raises: ValueError for another decay or another number of axes. Source: Rank-GRPO, Zhu et al. (ICLR 2026).
    """
    hits = jnp.asarray(hits).astype(jnp.float32)
    if hits.ndim != 2:
        raise ValueError(f"rank_rewards needs one hit per rank, [N, K], got {list(hits.shape)}")
    absent = jnp.isnan(hits)
    earned = jnp.where(absent, 0, hits)[:, None] * _share(hits.shape[1], decay)
    return jnp.where(absent, jnp.nan, earned.sum(axis=2))


def rank_z_scores(
    rewards: Float[Array, "N K"], group_ids: Int[Array, "N"], *, ddof: int = 1, epsilon: float = 1e-4
) -> Float[Array, "N K"]:
    """Each rank compared with the same rank of the other lists of the group.

    A_ik = (R_ik - mean_g(R_k)) / (std_g(R_k) + epsilon); exactly 0 for a rank at which the group agrees, and for a
    group of one (the published code gives NaN there).

    Raises: ValueError if rewards are not [N, K] with one id per row. Source: Rank-GRPO, Zhu et al. (ICLR 2026).
    """
    rewards, group_ids = jnp.asarray(rewards), jnp.asarray(group_ids)
    if rewards.ndim != 2 or group_ids.shape != rewards.shape[:1]:
        raise ValueError(
            f"rank_z_scores needs rewards [N, K] and one id per row, got {list(rewards.shape)} and group_ids "
            f"{list(group_ids.shape)}"
        )
    score = lambda column: group_z_score(column, group_ids, ddof=ddof, epsilon=epsilon)  # noqa: E731
    return jax.vmap(score, in_axes=1, out_axes=1)(rewards)


def item_ids(newlines: Int[Array, "N T"], exists: Bool[Array, "N T"]) -> Int[Array, "N T"]:
    """On which line each decision stands: k_t = sum_{s < t} newlines_s, so that a newline belongs to the line it ends.

    newlines: how many each decision's text holds (`tokens == 10` for bytes, a table [V] looked up otherwise; a token
    with two leaves an empty line). exists: the decisions of the completion, from the first to the stop token; -1
    elsewhere.
    """
    exists = jnp.asarray(exists).astype(bool)
    if exists.ndim != 2 or jnp.shape(newlines) != exists.shape:
        raise ValueError(
            f"newlines and exists have one entry per decision [N, T], got {list(jnp.shape(newlines))} and "
            f"{list(exists.shape)}"
        )
    ended = jnp.asarray(newlines).astype(jnp.int32)
    return jnp.where(exists, jnp.cumsum(ended, axis=1) - ended, -1)


def per_rank(values: Float[Array, "N K"], items: Int[Array, "N T"]) -> Float[Array, "N T"]:
    """The value of its item on each decision, x_{i, k_it}; 0 for ids outside [0, K).

    items: as from `item_ids`. Raises: ValueError if the rows are not as many.
    """
    values, items = jnp.asarray(values).astype(jnp.float32), jnp.asarray(items)
    if values.ndim != 2 or items.ndim != 2 or len(values) != len(items):
        raise ValueError(
            f"per_rank needs values [N, K] and item ids [N, T] of the same rows, got {list(values.shape)} and "
            f"{list(items.shape)}"
        )
    ranks = values.shape[1]
    inside = (items >= 0) & (items < ranks)
    return jnp.where(inside, jnp.take_along_axis(values, jnp.clip(items, 0, ranks - 1), axis=1), 0)


def with_length_terms(
    advantages: Float[Array, "N T"],
    items: Int[Array, "N T"],
    ends: Bool[Array, "N T"],
    *,
    ranks: int,
    size: float = 0.1,
) -> Float[Array, "N T"]:
    """Advantages with a constant in place of those that decide the length of the list.

    -size on overflow (k_t >= ranks); on the stop token +size for a list of exactly `ranks` lines, -size for a shorter
    one; a_t elsewhere. Constants come after the normalisation, so they act in groups that agree, too.

    ends: True on the stop token; a list that was cut off has none, and no term for it. A newline before the stop token
    makes that overflow. Source: Rank-GRPO, Zhu et al. (ICLR 2026), its code; the paper's formula has no such terms.
    """
    items = jnp.asarray(items)
    lines = items.max(axis=1, keepdims=True, initial=-1) + 1
    at_end = jnp.where(lines == ranks, size, -size)
    return jnp.where(items >= ranks, -size, jnp.where(ends & (items >= 0), at_end, advantages))


def _share(ranks: int, decay: str | float) -> np.ndarray:
    """[K, K]: how much of the hit at rank j rank k earns."""
    k, j = np.ogrid[:ranks, :ranks]
    if decay == "exp_inf":
        share = k == j
    elif decay == "log_decay":
        share = (k <= j) / np.log2(j + 2)
    elif isinstance(decay, (int, float)) and decay >= 1:
        share = np.where(k <= j, float(decay) ** -np.maximum(j - k, 0.0), 0)
    else:
        raise ValueError(f'decay is "exp_inf", "log_decay" or a number of at least 1, got {decay!r}')
    return share.astype(np.float32)
