"""Surrogate objectives, as losses per decision: ratio (or log-prob) and advantage in, something to minimise out.

Advantages are constants here: no gradient flows into them. A NaN stays NaN, without harm to the gradient where
aggregation leaves it out.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.losses.elementwise import aligned, constant, where_finite


def reinforce(logps: Float[Array, "N T"], advantages: Float[Array, "N T"]) -> Float[Array, "N T"]:
    """Score-function loss, -A_t logps_t. Its gradient is the policy gradient; its value means nothing.

    Source: Williams 1992.
    """
    logps, advantages = aligned(logps=logps, advantages=advantages)
    return where_finite(lambda logps, advantages: -advantages * logps, logps, constant(advantages))


def ppo_clip(
    ratio: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    *,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = None,
) -> Float[Array, "N T"]:
    """Clipped surrogate.

    l_t = max(-A_t rho_t, -A_t clip(rho_t, 1 - low, 1 + high)); with `dual` = c, at most -A_t c where A_t < 0.

    low, high: distance of the bounds from 1 (DAPO: 0.2, 0.28; GSPO: 3e-4, 4e-4). dual: above 1, e.g. 3.
    The gradient is exactly 0 where a bound binds, and that of -A_t rho_t elsewhere, on the bounds too.
    Raises: ValueError for low outside [0, 1], high < 0, dual <= 1.
    Source: Schulman et al. 2017 (arXiv:1707.06347), eq. 7; dual clip: Ye et al. 2020 (arXiv:1912.09729), eq. 5.
    """
    _check_bounds(low, high, dual)
    ratio, advantages = aligned(ratio=ratio, advantages=advantages)

    def loss(ratio: Array, advantages: Array) -> Array:
        below, above = clip_events(ratio, advantages, low, high)
        bounded = jnp.where(below, 1 - low, jnp.where(above, 1 + high, ratio))
        if dual is not None:
            bounded = jnp.where((advantages < 0) & (ratio > dual), dual, bounded)
        return -advantages * bounded

    return where_finite(loss, ratio, constant(advantages))


def clip_events(
    ratio: Float[Array, "N T"], advantages: Float[Array, "N T"], low: float, high: float
) -> tuple[Bool[Array, "N T"], Bool[Array, "N T"]]:
    """Where each bound of `ppo_clip` binds: (A < 0 and rho < 1 - low, A > 0 and rho > 1 + high).

    A ratio outside the range on the side where the surrogate still has a gradient is no event, nor is A = 0.
    """
    ratio, advantages = aligned(ratio=ratio, advantages=advantages)
    return (advantages < 0) & (ratio < 1 - low), (advantages > 0) & (ratio > 1 + high)


def _check_bounds(low: float, high: float, dual: float | None) -> None:
    def number(value: object) -> bool:  # under vmap over hyper-parameters they are tracers
        return isinstance(value, (int, float))

    if number(low) and not 0 <= low <= 1:
        raise ValueError(f"low is the distance of the lower bound from 1 and lies in [0, 1], got {low}")
    if number(high) and not high >= 0:
        raise ValueError(f"high is the distance of the upper bound from 1 and is not negative, got {high}")
    if number(dual) and not dual > 1:
        raise ValueError(f"dual bounds the ratio from above where A < 0 and must be over 1, got {dual}")
