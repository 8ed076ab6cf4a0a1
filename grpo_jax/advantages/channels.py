"""Advantages from several rewards at once: [N, K] channels in, each compared within its group before they are added.

A NaN channel says nothing of its row: it is outside that channel's statistics and adds 0. A row without any channel,
or with id -1, gets 0, as does a group of one or of equal rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.advantages.group import group_z_score
from grpo_jax.advantages.shaping import per_decision
from grpo_jax.advantages.whitening import whiten_rows, whiten_tokens

ROUNDING = 1e-6  # of the terms that are added
Weights = Float[Array, "K"] | Sequence[float]


def decoupled(
    rewards: Float[Array, "N K"],
    group_ids: Int[Array, "N"],
    weights: Weights,
    *,
    ddof: int = 1,
    epsilon: float = 1e-4,
) -> Float[Array, "N"]:
    """Weighted sum of the channels' z-scores within the group, so that no channel drowns another by its scale.

    s_i = sum_k w_k (r_ik - mean_g(r_k)) / (std_g(r_k) + epsilon), exactly 0 from a channel that is constant in a group.

    epsilon: 1e-4 as in TRL, 1e-6 as in verl. Missing rewards are left out as in TRL; the paper's code counts them as 0
    (fill the NaN with 0 for that). Raises: ValueError if there is not one weight per channel.
    Source: GDPO, arXiv:2601.05242; TRL's multi_objective_aggregation="normalize_then_sum".
    """
    rewards, group_ids, weights = _checked(rewards, group_ids, weights)
    score = jax.vmap(lambda r: group_z_score(r, group_ids, ddof=ddof, epsilon=epsilon), in_axes=1, out_axes=1)
    terms = score(rewards) * weights
    total, size = terms.sum(axis=1), jnp.abs(terms).sum(axis=1)
    return jnp.where(jnp.abs(total) > ROUNDING * size, total, 0)  # channels that cancel leave no rounding behind


def decoupled_over_rows(
    rewards: Float[Array, "N K"], group_ids: Int[Array, "N"], weights: Weights, *, epsilon: float = 1e-4
) -> Float[Array, "N"]:
    """GDPO: `decoupled`, brought to one scale over the batch, whatever the number of channels.

    A_i = (s_i - mean(s)) / (std(s) + epsilon), mean and std (ddof 1) over all completions that have a reward.

    Source: arXiv:2601.05242 and its TRL implementation, which differs from its verl one: `decoupled_over_decisions`.
    """
    rewards, group_ids, weights = _checked(rewards, group_ids, weights)
    sums = decoupled(rewards, group_ids, weights, epsilon=epsilon)
    return whiten_rows(sums, _applies(rewards, group_ids), epsilon=epsilon)


def decoupled_over_decisions(
    rewards: Float[Array, "N K"],
    group_ids: Int[Array, "N"],
    weights: Weights,
    mask: Bool[Array, "N T"],
    *,
    epsilon: float = 1e-6,
) -> Float[Array, "N T"]:
    """GDPO as in its verl implementation: the batch statistics are over decisions, so that long completions weigh more.

    A_it = (s_i - mean(s)) / sqrt(var(s) + 1e-8), mean and variance (ddof 1) over all it with m_it; 0 where masked out.

    The sums are the same as in `decoupled_over_rows` up to epsilon, the sum of A over completions is not 0.
    Raises: ValueError if the mask has not one row per completion.
    Source: arXiv:2601.05242 and its verl implementation.
    """
    rewards, group_ids, weights = _checked(rewards, group_ids, weights)
    mask = jnp.asarray(mask).astype(bool)
    if mask.ndim != 2 or mask.shape[0] != rewards.shape[0]:
        raise ValueError(f"the mask is [N, T] with N = {rewards.shape[0]} completions, got {list(mask.shape)}")
    counted = mask & _applies(rewards, group_ids)[:, None]
    return whiten_tokens(per_decision(decoupled(rewards, group_ids, weights, epsilon=epsilon), mask), counted)


def gate(rewards: Float[Array, "N"], on: Float[Array, "N"], *, at_least: float) -> Float[Array, "N"]:
    """An easy reward that counts only where a harder one is reached: r_i where on_i >= at_least, else 0.

    NaN where either does not apply. Reconstructed: the conditioned reward of GDPO (arXiv:2601.05242) from its
    description; the published code has none. Raises: ValueError for two shapes.
    """
    rewards, on = jnp.asarray(rewards).astype(jnp.float32), jnp.asarray(on).astype(jnp.float32)
    if rewards.shape != on.shape:
        raise ValueError(f"a reward is gated row by row, got rewards {list(rewards.shape)} and on {list(on.shape)}")
    return jnp.where(jnp.isnan(rewards) | jnp.isnan(on), jnp.nan, jnp.where(on >= at_least, rewards, 0))


def _checked(rewards: Array, group_ids: Array, weights: Weights) -> tuple[Array, Array, Array]:
    rewards, group_ids = jnp.asarray(rewards).astype(jnp.float32), jnp.asarray(group_ids)
    weights = jnp.asarray(weights, jnp.float32)
    if rewards.ndim != 2 or group_ids.shape != rewards.shape[:1] or weights.shape != rewards.shape[1:]:
        raise ValueError(
            "channels are compared by rewards [N, K], one id per row and one weight per channel, got rewards "
            f"{list(rewards.shape)}, group_ids {list(group_ids.shape)} and weights {list(weights.shape)}"
        )
    return rewards, group_ids, weights


def _applies(rewards: Float[Array, "N K"], group_ids: Int[Array, "N"]) -> Bool[Array, "N"]:
    """Rows that have a reward and are in a group."""
    return (group_ids >= 0) & ~jnp.isnan(rewards).all(axis=1)
