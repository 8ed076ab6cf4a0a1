"""Surrogate objectives, as losses per decision: ratio (or log-prob) and advantage in, something to minimise out.

Advantages are constants here: no gradient flows into them. A NaN stays NaN, without harm to the gradient where
aggregation leaves it out, and so does an infinite ratio or log-prob. Published losses that are a ratio, a surrogate and
an aggregation put together:

    GSPO         ppo_clip(sequence_ratio(...), A, low=3e-4, high=4e-4) under sequence_mean
    GSPO-token   the same with an advantage of its own for each decision
    RLOO         ppo_clip(sequence_product(...), A) under sequence_mean
    LUSPO        ppo_clip(sequence_ratio(...), A) under sequence_sum
    two-sided    TRL's `delta` is `dual` (for delta above 1 + high)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.losses.elementwise import aligned, constant, where_finite
from grpo_jax.losses.ratios import LARGEST_TOKEN_LOG_RATIO


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


def cispo(
    logps: Float[Array, "N T"],
    ratio: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    *,
    low: float = 1.0,
    high: float = 4.0,
) -> Float[Array, "N T"]:
    """Policy gradient with a bounded importance weight: every decision keeps its gradient.

    l_t = -sg[clip(rho_t, 1 - low, 1 + high)] A_t logps_t. The value means nothing.

    low, high: distance of the bounds from 1; low = 1 is no lower bound, as in the paper, which gives no number for
    high. TRL's `epsilon_high` is the largest weight itself (5 there is high = 4 here), verl's is the distance (0.2).
    Raises: ValueError for low outside [0, 1] or high < 0.
    Source: MiniMax-M1 2025 (arXiv:2506.13585).
    """
    _check_bounds(low, high, None)
    logps, ratio, advantages = aligned(logps=logps, ratio=ratio, advantages=advantages)
    weight = constant(jnp.clip(ratio, 1 - low, 1 + high))
    return where_finite(
        lambda logps, weight, advantages: -weight * advantages * logps, logps, weight, constant(advantages)
    )


def sapo(
    ratio: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> Float[Array, "N T"]:
    """Soft gate in place of the clip: the gradient fades smoothly as the ratio leaves 1. Goes with `sequence_mean`.

    l_t = -A_t (4 / tau) sigmoid(tau (rho_t - 1)), tau = tau_positive where A_t > 0 and tau_negative elsewhere.

    At rho = 1 the gradient is that of -A_t rho_t.
    Raises: ValueError for a tau that is not above 0.
    Source: Gao et al. 2025 (arXiv:2511.20347).
    """
    for name, tau in (("tau_positive", tau_positive), ("tau_negative", tau_negative)):
        if isinstance(tau, (int, float)) and not tau > 0:
            raise ValueError(f"{name} is how sharply the gate closes and must be above 0, got {tau}")
    ratio, advantages = aligned(ratio=ratio, advantages=advantages)

    def loss(ratio: Array, advantages: Array) -> Array:
        tau = jnp.where(advantages > 0, tau_positive, tau_negative)
        return -advantages * 4 / tau * jax.nn.sigmoid(tau * (ratio - 1))

    return where_finite(loss, ratio, constant(advantages))


def gmpo(
    logps: Float[Array, "N T"],
    old_logps: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    low: float = 0.4,
    high: float = 0.4,
) -> Float[Array, "N T"]:
    """Geometric mean of clipped token ratios, the completion's loss on each of its decisions. For `sequence_mean`.

    l_i = -A_i exp(mean_t d'_t) over the masked-in decisions, d'_t = d_t = logps_t - old_logps_t clipped, on the side
    where it would gain, to [-low, high]: min(d_t, high) for A > 0, max(d_t, -low) for A < 0. 0 where masked out.

    low, high: in log space, 0.4 is a factor of e^0.4. advantages: the same on all decisions of a row (else A_i is their
    mean, and each decision is clipped by its own).
    Every entry has the whole row's gradient. Raises: ValueError for low or high < 0.
    Source: Zhao et al. 2025 (arXiv:2507.20673).
    """
    for name, bound in (("low", low), ("high", high)):
        if isinstance(bound, (int, float)) and not bound >= 0:
            raise ValueError(f"{name} bounds the log-ratio and is not negative, got {bound}")
    logps, old_logps, advantages, _ = aligned(logps=logps, old_logps=old_logps, advantages=advantages, mask=mask)
    mask = jnp.asarray(mask).astype(bool)
    advantages = constant(jnp.where(mask, advantages, 0))
    gain = jnp.where(mask, logps, 0) - jax.lax.stop_gradient(jnp.where(mask, old_logps, 0))
    gain = jnp.where((advantages > 0) & (gain > high), high, gain)
    gain = jnp.where((advantages < 0) & (gain < -low), -low, gain)
    size = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    mean_gain = jnp.clip(gain.sum(-1, keepdims=True) / size, -LARGEST_TOKEN_LOG_RATIO, LARGEST_TOKEN_LOG_RATIO)
    row = where_finite(lambda d, a: -a * jnp.exp(d), mean_gain, advantages.sum(-1, keepdims=True) / size)
    return jnp.where(mask, row, 0)


def _check_bounds(low: float, high: float, dual: float | None) -> None:
    def number(value: object) -> bool:  # under vmap over hyper-parameters they are tracers
        return isinstance(value, (int, float))

    if number(low) and not 0 <= low <= 1:
        raise ValueError(f"low is the distance of the lower bound from 1 and lies in [0, 1], got {low}")
    if number(high) and not high >= 0:
        raise ValueError(f"high is the distance of the upper bound from 1 and is not negative, got {high}")
    if number(dual) and not dual > 1:
        raise ValueError(f"dual bounds the ratio from above where A < 0 and must be over 1, got {dual}")
