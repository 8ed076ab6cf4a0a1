"""Importance ratios between the policy that is trained and the one that started the update.

A unit is a set of a row's decisions that share one ratio: the whole sequence, a turn, a rank, a denoising step. Its
ratio is the geometric mean of its decisions' ratios (normalised by length), their product, or their arithmetic mean.
Two gradients exist. Straight-through (`sequence_ratio`, `unit_ratio`): the unit's value, each decision's own gradient.
Whole (`unit_geometric`, `unit_product`, `unit_arithmetic`, `sequence_product`): every entry has the gradient of the
unit's ratio with respect to all its decisions. For the geometric mean the two agree in sum where advantage and weight
are the same on all decisions of a unit, and differ where they are not.
"""

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
    total, size, inside = _log_ratio_of_units(logps, old_logps, mask, unit_ids)
    return _straight_through(jnp.where(inside, logps, 0), total / jnp.maximum(size, 1), inside)


def unit_geometric(
    logps: Float[Array, "N T"], old_logps: Float[Array, "N T"], mask: Bool[Array, "N T"], unit_ids: Int[Array, "N T"]
) -> Float[Array, "N T"]:
    """`unit_ratio` with the whole gradient on every entry: d s_t = s_u mean_{v in u} d logps_v.

    This is the ratio of Rank-GRPO, where decisions of one rank may have different advantages. The log is bounded by 10,
    without gradient beyond; 1 where masked out or in no unit. unit_ids: in [0, T) within a row, -1 for no unit.
    """
    total, size, inside = _log_ratio_of_units(logps, old_logps, mask, unit_ids)
    log_ratio = jnp.minimum(total / jnp.maximum(size, 1), LARGEST_UNIT_LOG_RATIO)
    return jnp.where(inside, where_finite(jnp.exp, log_ratio), 1)


def unit_product(
    logps: Float[Array, "N T"], old_logps: Float[Array, "N T"], mask: Bool[Array, "N T"], unit_ids: Int[Array, "N T"]
) -> Float[Array, "N T"]:
    """Importance ratio of each unit as a whole, not normalised: what `sequence_product` is to the sequence.

    w_u = exp(clamp(sum_{t in u} (logps_t - old_logps_t), -20, 20)), with the whole gradient on every entry; 1 where
    masked out or in no unit. `unit_mean` counts it once per unit. unit_ids: in [0, T) within a row, -1 for no unit.
    """
    total, _, inside = _log_ratio_of_units(logps, old_logps, mask, unit_ids)
    bound = LARGEST_TOKEN_LOG_RATIO
    return jnp.where(inside, where_finite(jnp.exp, jnp.clip(total, -bound, bound)), 1)


def unit_arithmetic(
    logps: Float[Array, "N T"], old_logps: Float[Array, "N T"], mask: Bool[Array, "N T"], unit_ids: Int[Array, "N T"]
) -> Float[Array, "N T"]:
    """Arithmetic mean of a unit's token ratios, on each of its decisions.

    a_u = mean_{t in u} rho_t, with the whole gradient on every entry, d a_u = mean_t rho_t d logps_t; 1 where masked
    out or in no unit. Never below `unit_geometric`. unit_ids: in [0, T) within a row, -1 for no unit.
    """
    logps, old_logps, mask = _masked(logps, old_logps, mask)
    unit_ids, inside = _units(unit_ids, mask)
    total, size = _over_units(token_ratio(logps, old_logps), unit_ids, inside)
    return jnp.where(inside, total / jnp.maximum(size, 1), 1)


def _masked(logps: Array, old_logps: Array, mask: Array) -> tuple[Array, Array, Array]:
    logps, old_logps, _ = aligned(logps=logps, old_logps=old_logps, mask=mask)
    mask = jnp.asarray(mask).astype(bool)
    # Zero before any arithmetic, so that garbage under the mask reaches neither the value nor the gradient.
    return jnp.where(mask, logps, 0), jax.lax.stop_gradient(jnp.where(mask, old_logps, 0)), mask


def _units(unit_ids: Array, mask: Array) -> tuple[Int[Array, "N T"], Bool[Array, "N T"]]:
    """The ids as an array, and the masked-in decisions that belong to a unit."""
    if jnp.shape(unit_ids) != mask.shape:
        raise ValueError(
            f"unit_ids must have one id per decision, got {list(jnp.shape(unit_ids))} for {list(mask.shape)}"
        )
    unit_ids = jnp.asarray(unit_ids)
    return unit_ids, mask & (unit_ids >= 0)


def _over_units(values: Array, unit_ids: Array, inside: Array) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    """Sum over each decision's unit, and the unit's size."""
    return jax.vmap(segments.total)(values, unit_ids, inside), jax.vmap(segments.count)(unit_ids, inside)


def _log_ratio_of_units(
    logps: Array, old_logps: Array, mask: Array, unit_ids: Array
) -> tuple[Float[Array, "N T"], Float[Array, "N T"], Bool[Array, "N T"]]:
    """The unit's summed log-ratio and its size, and the decisions that are in one."""
    logps, old_logps, mask = _masked(logps, old_logps, mask)
    unit_ids, inside = _units(unit_ids, mask)
    return *_over_units(jnp.where(inside, logps - old_logps, 0), unit_ids, inside), inside


def _straight_through(logps: Array, log_ratio: Array, mask: Array) -> Array:
    """exp(log_ratio) with the gradient exp(log_ratio) d logps; none beyond the bound."""
    log_ratio = jax.lax.stop_gradient(log_ratio)
    finite, bound = jnp.isfinite(log_ratio), LARGEST_UNIT_LOG_RATIO
    ratio = jnp.where(finite, jnp.exp(jnp.minimum(log_ratio, bound)), jnp.nan)
    slope = jnp.where(finite & (log_ratio <= bound), ratio, 0)  # never NaN: zero times it must be zero
    return jnp.where(mask, ratio + slope * (logps - jax.lax.stop_gradient(logps)), 1)
