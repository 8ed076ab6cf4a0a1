"""NeMo RL's GRPO (NVIDIA-NeMo/RL, 7ea279a).

Known of it: the leave-one-out baseline is on, a spread of 0 is not divided by, 1e-6, k3 with weight 0.01. Not compared
with its source: that the spread, too, is that of the others, the clip range, and the names of the loss's options.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import losses, segments
from grpo_jax.advantages import group
from grpo_jax.losses import kl
from grpo_jax.presets.choices import reference, spread


def advantages(
    rewards: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    *,
    use_leave_one_out_baseline: bool = True,
    normalize_rewards: bool = True,
) -> Float[Array, "N"]:
    """(r - baseline) / (std + 1e-6), not divided where the std is 0; a group of one gets 0.

    Baseline and std are those of the group's other rows, or with use_leave_one_out_baseline off of all its rows; std
    over one less than the number of rows that enter it, 0 for fewer than two.
    """
    rewards, group_ids = jnp.asarray(rewards).astype(jnp.float32), jnp.asarray(group_ids)
    if not use_leave_one_out_baseline:
        values, variance = group.group_centered(rewards, group_ids), _variance(rewards, group_ids)
    else:
        values, variance = group.leave_one_out(rewards, group_ids), _variance_of_others(rewards, group_ids)
    if not normalize_rewards:
        return values
    return jnp.where(variance > 0, values / (jnp.sqrt(jnp.where(variance > 0, variance, 1)) + 1e-6), values)


def loss(
    logps: Float[Array, "N T"],
    old_logps: Float[Array, "N T"],
    advantages: Float[Array, "N"] | Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    ratio_clip_min: float = 0.2,
    ratio_clip_max: float = 0.2,
    ratio_clip_c: float | None = None,
    reference_policy_kl_penalty: float = 0.01,
    ref_logps: Float[Array, "N T"] | None = None,
    token_level_loss: bool = True,
    importance_weights: Float[Array, "N T"] | float = 1.0,
) -> Float[Array, ""]:
    """The clipped surrogate, times importance_weights (`mismatch.token_importance`), plus k3 times its weight.

    ratio_clip_c: dual clip. token_level_loss: the mean over tokens; off, over sequences.
    Raises: ValueError for a penalty without ref_logps.
    """
    mask = jnp.asarray(mask).astype(bool)
    ref_logps = reference(reference_policy_kl_penalty, ref_logps, "reference_policy_kl_penalty")
    each = jnp.where(mask, importance_weights, 0) * losses.ppo_clip(
        losses.token_ratio(logps, old_logps),
        spread(advantages, mask),
        low=ratio_clip_min,
        high=ratio_clip_max,
        dual=ratio_clip_c,
    )
    if ref_logps is not None:
        each = each + reference_policy_kl_penalty * kl.k3(logps, ref_logps)
    scheme = losses.token_mean if token_level_loss else losses.sequence_mean
    return losses.weighted_sum(each, scheme(jnp.ones(len(mask)), mask))


def _variance(rewards: Array, group_ids: Array) -> Float[Array, "N"]:
    applies = ~jnp.isnan(rewards)
    return segments.variance(jnp.where(applies, rewards, 0), group_ids, applies, ddof=1)


def _variance_of_others(rewards: Array, group_ids: Array) -> Float[Array, "N"]:
    """Variance, over n - 2, of the group's other n - 1 rows; exactly 0 if they are equal. Memory N^2."""
    applies = ~jnp.isnan(rewards)
    ids = jnp.where(applies, group_ids, -1)
    rows = jnp.where((ids[:, None] == ids) & (ids >= 0) & ~jnp.eye(len(ids), dtype=bool), 1.0, 0.0)
    others = rows.sum(1)
    safe = jnp.where(applies, rewards, 0)
    mean = rows @ safe / jnp.maximum(others, 1)
    squares = (rows * (safe - mean[:, None]) ** 2).sum(1)
    highest, lowest = (jnp.where(rows > 0, s * safe, -jnp.inf).max(1) for s in (1, -1))
    return jnp.where(highest > -lowest, squares / jnp.maximum(others - 1, 1), 0)
