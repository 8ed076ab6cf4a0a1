"""Right completions that the policy found unlikely count for more."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import segments


def novelty_sharpened(
    advantages: Float[Array, "N"],
    mean_logps: Float[Array, "N"],
    correct: Bool[Array, "N"],
    group_ids: Int[Array, "N"],
    *,
    strength: float = 2.5,
    cap: float = 0.5,
) -> Float[Array, "N"]:
    """XRPO: A_i + min(max(strength (1 - eta_i), 0), cap A_i) for right completions, eta_i = exp(l_i - mean_g l).

    The bonus lies in [0, cap A_i], and is 0 where A_i <= 0; wrong completions keep their advantage, as do groups that
    are all right (A = 0).

    mean_logps: l_i, log-probs averaged over the completion's decisions (sums would make every long one novel), under
    the policy that drew it; a NaN leaves the row out of the group's mean, without a bonus.
    strength, cap: lambda_novelty and kappa. Raises: ValueError for arrays of different shapes, or a negative option.
    Source: arXiv:2510.06672.
    """
    if strength < 0 or cap < 0:
        raise ValueError(f"a bonus is not negative, got strength {strength}, cap {cap}")
    arrays = advantages, mean_logps, correct, group_ids = tuple(
        map(jnp.asarray, (advantages, mean_logps, correct, group_ids))
    )
    if advantages.ndim != 1 or len({array.shape for array in arrays}) > 1:
        raise ValueError(f"needs four arrays of one value per row, got {[list(array.shape) for array in arrays]}")
    known = jnp.isfinite(mean_logps) & (group_ids >= 0)
    logps = mean_logps.astype(jnp.float32)
    advantages = jnp.where(group_ids < 0, 0, advantages).astype(jnp.float32)
    novelty = 1 - jnp.exp(jnp.where(known, logps - segments.mean(logps, group_ids, known), 0))
    bonus = jnp.minimum(jnp.maximum(strength * novelty, 0), cap * jnp.maximum(advantages, 0))
    return jnp.where(correct.astype(bool) & known, advantages + bonus, advantages)
