"""Importance ratios between the policy that is trained and the one that started the update."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import segments
from grpo_jax.losses.elementwise import aligned, where_finite

LARGEST_TOKEN_LOG_RATIO = 20.0  # e^20 = 5e8: far outside every clip range, and its square is finite in float32
LARGEST_UNIT_LOG_RATIO = 10.0


def token_ratio(logps: Float[Array, "N T"], old_logps: Float[Array, "N T"]) -> Float[Array, "N T"]:
    """Importance ratio of each decision.

    rho_t = exp(clamp(logps_t - old_logps_t, -20, 20)); exactly 1 where the two are equal.

    Beyond the clamp the gradient is 0. A NaN stays NaN, without harm to the gradient where aggregation leaves it out.
    Source: Shao et al. 2024 (arXiv:2402.03300), eq. 3; the clamp is verl's (TRL has none).
    """
    logps, old_logps = aligned(logps=logps, old_logps=old_logps)
    bound = LARGEST_TOKEN_LOG_RATIO
    return where_finite(jnp.exp, jnp.clip(logps - jax.lax.stop_gradient(old_logps), -bound, bound))


def sequence_ratio(
    logps: Float[Array, "N T"], old_logps: Float[Array, "N T"], mask: Bool[Array, "N T"]
) -> Float[Array, "N T"]:
    """Length-normalised ratio of the whole completion, on each of its decisions.

    s = exp(min(mean_t (logps_t - old_logps_t), 10)) over the masked-in decisions; 1 where masked out.

    Value s everywhere, but each decision's gradient is its own: d s_t = s d logps_t (the GSPO-token form). With one
    advantage per row and the same weight on all its decisions the sum is the gradient of GSPO's s.
    Source: Zheng et al. 2025 (arXiv:2507.18071), eqs. 7, 13, 14; the bound is verl's.
    """
    logps, old_logps, mask = _masked(logps, old_logps, mask)
    size = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    log_ratio = jnp.sum(logps - old_logps, axis=-1, keepdims=True) / size
    return _straight_through(logps, jnp.broadcast_to(log_ratio, logps.shape), mask)


def sequence_product(
    logps: Float[Array, "N T"], old_logps: Float[Array, "N T"], mask: Bool[Array, "N T"]
) -> Float[Array, "N T"]:
    """Importance ratio of the whole completion, not normalised, on each of its decisions.

    w = exp(clamp(sum_t (logps_t - old_logps_t), -20, 20)) over the masked-in decisions; 1 where masked out.

    Unlike `sequence_ratio`, every entry has the gradient of w with respect to the whole row, w sum_t d logps_t: take it
    to `sequence_mean`, where a row's equal entries add up to one. Its spread grows with the length.
    Source: RLOO, Ahmadian et al. 2024 (arXiv:2402.14740), as TRL clips it.
    """
    logps, old_logps, mask = _masked(logps, old_logps, mask)
    bound = LARGEST_TOKEN_LOG_RATIO
    log_ratio = jnp.clip(jnp.sum(logps - old_logps, axis=-1, keepdims=True), -bound, bound)
    return jnp.where(mask, where_finite(jnp.exp, log_ratio), 1)


def unit_ratio(
    logps: Float[Array, "N T"],
    old_logps: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    unit_ids: Int[Array, "N T"],
) -> Float[Array, "N T"]:
    """Length-normalised ratio of each unit (a turn, a rank, a step), on each of its decisions.

    s_u = exp(min(mean_{t in u} (logps_t - old_logps_t), 10)); 1 where masked out or in no unit.

    unit_ids: in [0, T) within a row, -1 for no unit. One unit per row is `sequence_ratio`; a unit per decision is
    `token_ratio`. The gradient is that of `sequence_ratio`: each decision's own, d s_t = s_u d logps_t.
    """
    logps, old_logps, mask = _masked(logps, old_logps, mask)
    if jnp.shape(unit_ids) != mask.shape:
        raise ValueError(
            f"unit_ids must have one id per decision, got {list(jnp.shape(unit_ids))} for {list(mask.shape)}"
        )
    unit_ids = jnp.asarray(unit_ids)
    mask = mask & (unit_ids >= 0)
    log_ratio = jax.vmap(_segment_mean)(jnp.where(mask, logps - old_logps, 0), unit_ids, mask)
    return _straight_through(logps, log_ratio, mask)


def _masked(logps: Array, old_logps: Array, mask: Array) -> tuple[Array, Array, Array]:
    logps, old_logps, _ = aligned(logps=logps, old_logps=old_logps, mask=mask)
    mask = jnp.asarray(mask).astype(bool)
    # Zero before any arithmetic, so that garbage under the mask reaches neither the value nor the gradient.
    return jnp.where(mask, logps, 0), jax.lax.stop_gradient(jnp.where(mask, old_logps, 0)), mask


def _segment_mean(values: Float[Array, "T"], ids: Int[Array, "T"], inside: Bool[Array, "T"]) -> Float[Array, "T"]:
    return segments.total(values, ids, inside) / jnp.maximum(segments.count(ids, inside), 1)


def _straight_through(logps: Array, log_ratio: Array, mask: Array) -> Array:
    """exp(log_ratio) with the gradient exp(log_ratio) d logps; none beyond the bound."""
    log_ratio = jax.lax.stop_gradient(log_ratio)
    finite, bound = jnp.isfinite(log_ratio), LARGEST_UNIT_LOG_RATIO
    ratio = jnp.where(finite, jnp.exp(jnp.minimum(log_ratio, bound)), jnp.nan)
    slope = jnp.where(finite & (log_ratio <= bound), ratio, 0)  # never NaN: zero times it must be zero
    return jnp.where(mask, ratio + slope * (logps - jax.lax.stop_gradient(logps)), 1)
