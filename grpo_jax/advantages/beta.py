"""Advantages of binary rewards, normalised by a Beta density that is fitted to the batch's success rates."""

from __future__ import annotations

import jax.numpy as jnp
from jax.scipy.special import betaln
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import segments
from grpo_jax.advantages.group import _compared

ROUNDING = 1e-10  # a variance of success rates below it is rounding


def beta_normalized(
    rewards: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    *,
    low: float = 0.0,
    high: float = 1.0,
    limit: float = 1e6,
) -> Float[Array, "N"]:
    """BNPO: the reward over its group's success rate, divided by a Beta density at that rate.

    A_i = w_g (R_i - p_g), R = (r - low) / (high - low), p_g = mean_g(R), w_g the `beta_weights` of p_g under the
    `beta_parameters` of the batch

    low, high: the range of rewards; with one outside it every advantage is NaN. limit: of w; 10 to 100 is safer where
    rewards are not binary. A group of one is left out of the fit and gets 0 (the published code gives it p = 0).
    Raises: ValueError unless low < high. Source: arXiv:2506.02864.
    """
    if not low < high:
        raise ValueError(f"beta_normalized needs the range of rewards with low < high, got {low} and {high}")
    if not limit > 0:
        raise ValueError(f"limit is the largest weight and must be above 0, got {limit}")
    slack = 8 * float(jnp.finfo(jnp.result_type(float, rewards)).eps) * max(1, abs(low), abs(high)) / (high - low)
    rewards, group_ids = _compared(rewards, group_ids)
    group_ids = jnp.where(segments.count(group_ids) > 1, group_ids, -1)
    given = (rewards - low) / (high - low)
    scaled = jnp.clip(given, 0, 1)  # what is out by rounding only
    rates = segments.mean(scaled, group_ids)
    alpha, beta = beta_parameters(rates, segments.first(group_ids >= 0, group_ids))
    mixed = segments.maximum(scaled, group_ids) > segments.minimum(scaled, group_ids)
    weights = jnp.where(mixed, beta_weights(rates, alpha, beta, limit=limit), 0)
    inside = jnp.all((group_ids < 0) | ((given >= -slack) & (given <= 1 + slack)))
    return jnp.where(group_ids < 0, 0, jnp.where(inside, weights * (scaled - rates), jnp.nan))


def beta_parameters(rates: Float[Array, "N"], where: Bool[Array, "N"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The density whose inverse gives the gradient estimate its least variance, from the moments of the success rates.

    alpha = max(1 + a/3, 1), beta = max(1 + b/3, 1), a = c m, b = c (1 - m), c = m (1 - m) / v - 1,
    m and v (ddof 1) the mean and variance of the rates; alpha = beta = 1 if the rates do not differ

    rates in [0, 1]; where: one row for each prompt. Source: arXiv:2506.02864.
    """
    rates, number = jnp.where(where, jnp.asarray(rates).astype(jnp.float32), 0), jnp.sum(where)
    m = jnp.sum(rates) / jnp.maximum(number, 1)
    v = jnp.sum(jnp.where(where, rates - m, 0) ** 2) / jnp.maximum(number - 1, 1)
    differ = v > ROUNDING
    c = jnp.where(differ, m * (1 - m) / jnp.where(differ, v, 1) - 1, 0)
    return jnp.maximum(1 + c * m / 3, 1), jnp.maximum(1 + c * (1 - m) / 3, 1)


def beta_weights(
    rates: Float[Array, "N"], alpha: Float[Array, ""] | float, beta: Float[Array, ""] | float, *, limit: float = 1e6
) -> Float[Array, "N"]:
    """w_i = min(1 / f(p_i; alpha, beta), limit), f the density of the Beta distribution; alpha, beta >= 1, p in [0, 1].

    alpha = beta = 1: 1 everywhere (REINFORCE with the group's mean as baseline). alpha = beta = 3/2: pi/8 over the
    standard deviation sqrt(p (1 - p)) of a binary reward (GRPO up to that constant). Source: arXiv:2506.02864.
    """
    rates = jnp.asarray(rates).astype(jnp.float32)
    alpha, beta = jnp.asarray(alpha, jnp.float32), jnp.asarray(beta, jnp.float32)
    within = (rates > 0) & (rates < 1)
    p = jnp.where(within, rates, 0.5)
    area = betaln(alpha, beta)
    zero = ((rates <= 0) & (alpha > 1)) | ((rates >= 1) & (beta > 1))  # where the density is 0
    ends = jnp.where(zero, jnp.inf, area)
    log_weights = jnp.where(within, area - (alpha - 1) * jnp.log(p) - (beta - 1) * jnp.log1p(-p), ends)
    return jnp.exp(jnp.minimum(log_weights, jnp.log(limit)))
