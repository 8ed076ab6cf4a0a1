"""The gap between the program that sampled and the program that trains: statistics and corrections."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.losses.elementwise import aligned
from grpo_jax.losses.ratios import LARGEST_TOKEN_LOG_RATIO


def sampler_gap(
    new_logps: Float[Array, "N T"], sampler_logps: Float[Array, "N T"], mask: Bool[Array, "N T"]
) -> dict[str, Float[Array, ""]]:
    """How far the sampler's log-probs are from the trainer's, over the masked-in decisions.

    {"max": max |new - sampler|, "mean": mean |new - sampler|}, in nats; 0 if the mask is empty, NaN if a masked-in
    log-prob is NaN.
    """
    new_logps, sampler_logps, _ = aligned(new_logps=new_logps, sampler_logps=sampler_logps, mask=mask)
    mask = jnp.asarray(mask).astype(bool)
    gap = jax.lax.stop_gradient(jnp.where(mask, jnp.abs(new_logps - sampler_logps), 0))
    return {"max": gap.max(initial=0), "mean": gap.sum() / jnp.maximum(mask.sum(), 1)}


def truncated_importance(
    old_logps: Float[Array, "N T"], sampler_logps: Float[Array, "N T"], *, cap: float = 2.0
) -> Float[Array, "N T"]:
    """Weight of each decision's loss that makes up for the sampler's slightly different distribution (token TIS).

    w_t = min(exp(clamp(old_logps_t - sampler_logps_t, -20, 20)), cap), a constant; multiply the loss by it.

    1 where either is NaN: nothing was drawn there, so there is nothing to correct.
    Raises: ValueError for cap <= 0.
    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; verl's defaults.
    """
    if isinstance(cap, (int, float)) and not cap > 0:
        raise ValueError(f"cap is the largest weight and must be above 0, got {cap}")
    old_logps, sampler_logps = aligned(old_logps=old_logps, sampler_logps=sampler_logps)
    log_weight = jnp.clip(old_logps - sampler_logps, -LARGEST_TOKEN_LOG_RATIO, LARGEST_TOKEN_LOG_RATIO)
    weight = jnp.minimum(jnp.exp(log_weight), cap)
    return jax.lax.stop_gradient(jnp.where(jnp.isnan(log_weight), 1, weight))
