"""Advantages as the target of a regression on the policy's own log-ratios (Reg-GRPO)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import segments
from grpo_jax.losses.discriminative import _group_mean, _rows
from grpo_jax.losses.elementwise import aligned


def sequence_log_ratio(
    logps: Float[Array, "N T"], old_logps: Float[Array, "N T"], mask: Bool[Array, "N T"]
) -> Float[Array, "N"]:
    """Log-ratio of the whole completion, rho = sum_t m_t (logps_t - old_logps_t), in nats; 0 for an empty one.

    Not divided by the length. Source: Reg-GRPO, arXiv:2506.07464.
    """
    logps, old_logps, _ = aligned(logps=logps, old_logps=old_logps, mask=mask)
    mask = jnp.asarray(mask).astype(bool)
    return jnp.where(mask, logps - jax.lax.stop_gradient(old_logps), 0).sum(axis=1)


def group_regression(
    log_ratios: Float[Array, "N"],
    advantages: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    *,
    ddof: int = 1,
    epsilon: float = 0.1,
    inside_root: bool = True,
    weights: Float[Array, "N"] | None = None,
) -> Float[Array, ""]:
    """Squared error between the advantages and the log-ratios in standard deviations from their group's mean.

    mean over groups of the mean over members of (A_i - P_i)^2, P_i = (rho_i - mean) / sqrt(var + epsilon^2), the
    gradient through rho, mean and var alike; P_i = (rho_i - mean) / (std + epsilon) if not inside_root.

    log_ratios: as from `sequence_log_ratio`. advantages: constants, the z-score with the same ddof; NaN leaves the row
    out. Left out of the mean are groups with equal advantages and those of under three rows, where P is but a sign.
    weights: a row of weight c counts c times, in the statistics too. There is no clip: at rho = 0 the gradient is
    -2 A / (n epsilon), so with a small epsilon clip its norm.
    Raises: ValueError for epsilon <= 0.
    Source: arXiv:2506.07464. ddof, both epsilons and what happens at std 0 are reconstructed.
    """
    if isinstance(epsilon, (int, float)) and not epsilon > 0:
        raise ValueError(f"epsilon keeps the standard deviation of equal log-ratios away from 0, got {epsilon}")
    rho, targets, group_ids, weights = _rows(group_ids, weights, log_ratios=log_ratios, advantages=advantages)
    absent = jnp.isnan(targets) | (weights == 0)
    targets, group_ids = jnp.where(absent, 0, jax.lax.stop_gradient(targets)), jnp.where(absent, -1, group_ids)
    size = segments.total(weights, group_ids)
    spread = segments.maximum(targets, group_ids) > segments.minimum(targets, group_ids)
    taught = spread & (size >= 3) & (group_ids >= 0)
    centred = jnp.where(taught, rho - _group_mean(rho, group_ids, taught, weights), 0)
    variance = segments.total(weights * centred**2, group_ids, taught) / jnp.maximum(size - ddof, 1)
    if inside_root:
        scale = jnp.sqrt(variance + epsilon**2)
    else:
        scale = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0) + epsilon
    errors = jnp.where(taught, weights / jnp.maximum(size, 1) * (targets - centred / scale) ** 2, 0)
    return jnp.sum(errors) / jnp.maximum(segments.number(group_ids, taught), 1)
