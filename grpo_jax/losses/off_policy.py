"""Completions that the policy did not draw on its own: shaped probabilities and ratios, and a plain likelihood.

A shaped value f takes the place of the ratio, without clipping; the loss of a decision is -A f:

    shaped = losses.shaped_probability(logps)
    loss = jnp.where(off[:, None], losses.reinforce(shaped, advantages), losses.ppo_clip(ratio, advantages))

A NaN stays NaN, without harm to the gradient where aggregation leaves it out.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.losses.aggregation import sequence_mean, sequence_sum, weighted_sum
from grpo_jax.losses.elementwise import aligned, constant, where_finite
from grpo_jax.losses.ratios import token_ratio
from grpo_jax.losses.surrogates import ppo_clip

OFFSETS = ("released", "intended")
LARGEST_OFFSET, LARGEST_ADVANTAGE, RARE = 1e-3, 4.0, 1e-2


def shaped_probability(logps: Float[Array, "N T"], *, gamma: float = 0.1) -> Float[Array, "N T"]:
    """f = p / (p + gamma), p = exp(logps): the ratio of a row whose behaviour probability is taken as 1.

    Its slope, p gamma / (p + gamma)^2 per log-prob, is largest at p = gamma: rare decisions keep a gradient. Take one
    update per batch, since nothing holds f near the old policy.
    Raises: ValueError for gamma <= 0.
    Source: LUFFY's released code; RGR-GRPO, arXiv:2511.12344, reconstructed from it.
    """
    if isinstance(gamma, (int, float)) and not gamma > 0:
        raise ValueError(f"gamma is the probability whose gradient is largest and must be above 0, got {gamma}")
    (logps,) = aligned(logps=logps)
    return where_finite(lambda logps: jax.nn.sigmoid(logps - jnp.log(gamma)), logps)


def shaped_ratio(
    ratio: Float[Array, "N T"], mask: Bool[Array, "N T"], *, quantile: float = 0.9, floor: float = 1e-4
) -> Float[Array, "N T"]:
    """f_t = rho_t / (rho_t + gamma), gamma the row's `quantile` of rho over masked-in decisions, at least `floor`.

    gamma is a constant, so the slope rho gamma / (rho + gamma)^2 is largest around it. (A fixed gamma and rho^gamma are
    the released code's other forms: `ratio / (ratio + gamma)`, `ratio**gamma`.)

    ratio: `token_ratio` with the old log-probs under the context that was really drawn under.
    Raises: ValueError for a quantile outside [0, 1].
    Source: Guide-GRPO, arXiv:2506.13923, and its released code, where the quantile also runs over padding.
    """
    if isinstance(quantile, (int, float)) and not 0 <= quantile <= 1:
        raise ValueError(f"quantile says which ratio of the row gamma is and lies in [0, 1], got {quantile}")
    ratio, _ = aligned(ratio=ratio, mask=mask)
    if not ratio.shape[1]:
        return ratio
    now = jnp.where(jnp.asarray(mask).astype(bool), jax.lax.stop_gradient(ratio), jnp.nan)
    gamma = jnp.nanquantile(now, quantile, axis=1, keepdims=True)
    gamma = jnp.broadcast_to(jnp.maximum(jnp.where(jnp.isfinite(gamma), gamma, 0), floor), ratio.shape)
    return where_finite(lambda ratio, gamma: ratio / (ratio + gamma), ratio, gamma)


def advantage_aware_ratio(
    logps: Float[Array, "N T"], advantages: Float[Array, "N T"], *, offset: str = "released", bound: float = math.inf
) -> Float[Array, "N T"]:
    """Ratio of a decision in a text that a teacher has edited, close to 1 in value.

    f = p / D with D = sg(p) + gamma; f = 1.0001 where D <= 0 and 0.9999 where D > 1. Its slope per log-prob is f.

    offset: gamma = -0.001 for all ("released", what the published code computes) or clip(A, -4, 4) / 4000
    ("intended"). bound: the largest f; for p just above 0.001 the released one has none.
    Raises: ValueError for another offset, bound < 1.
    Source: ThinkTuning, arXiv:2508.07616.
    """
    if offset not in OFFSETS:
        raise ValueError(f"the offset of the ratio is one of {OFFSETS}, got {offset!r}")
    if isinstance(bound, (int, float)) and not bound >= 1:
        raise ValueError(f"bound is the largest ratio and must be at least 1, got {bound}")
    logps, advantages = aligned(logps=logps, advantages=advantages)

    def shaped(logps: Array, advantages: Array) -> Array:
        p, unit = jnp.exp(jax.lax.stop_gradient(logps)), LARGEST_OFFSET / LARGEST_ADVANTAGE
        slanted = jnp.clip(advantages, -LARGEST_ADVANTAGE, LARGEST_ADVANTAGE) * unit
        below = p + (-LARGEST_OFFSET if offset == "released" else slanted)
        value = jnp.where(below > 1, 0.9999, p / jnp.where(below > 0, below, 1))
        value = jnp.minimum(jnp.where(below > 0, value, 1.0001), bound)
        return value * (1 + logps - jax.lax.stop_gradient(logps))

    return where_finite(shaped, logps, constant(advantages))


def think_tuning(
    logps: Float[Array, "N T"],
    old_logps: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    edited: Bool[Array, "N T"],
    *,
    offset: str = "released",
    bound: float = math.inf,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = 3.0,
) -> Float[Array, "N T"]:
    """ThinkTuning's loss: -A f on edited decisions, f the `advantage_aware_ratio`, and `ppo_clip` on all others.

    An edited decision with A < 0 and p < 0.01 is left to `ppo_clip` too: no unclipped push on what is rare already.

    edited: in the released code every decision of an edited row. old_logps: taken after the edit.
    Source: arXiv:2508.07616.
    """
    logps, old_logps, advantages, _ = aligned(logps=logps, old_logps=old_logps, advantages=advantages, edited=edited)
    rare = (advantages < 0) & (jnp.exp(jax.lax.stop_gradient(logps)) < RARE)
    shaped = advantage_aware_ratio(logps, advantages, offset=offset, bound=bound)
    free = where_finite(lambda f, a: -a * f, shaped, constant(advantages))
    held = ppo_clip(token_ratio(logps, old_logps), advantages, low=low, high=high, dual=dual)
    return jnp.where(jnp.asarray(edited).astype(bool) & ~rare, free, held)


def explanation_likelihood(
    logps: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    weights: Float[Array, "N"] | None = None,
    per_token: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, ""]:
    """ExPO's auxiliary term, to be added to the loss with a coefficient: the negative log-likelihood of explanations.

    -mean_i sum_t m_it logps_it over rows that have a decision, or the mean of their token means with per_token.

    logps: of the explanation and the answer after it, under the bare question. The coefficient (0.04 in the paper)
    goes with the sum. weights: a row of weight c counts c times. axis_name: over the rows of all devices of that axis,
    inside shard_map.
    Source: arXiv:2507.02834; whether the paper's is the sum is reconstructed.
    """
    logps, _ = aligned(logps=logps, mask=mask)
    weights = jnp.ones(logps.shape[0]) if weights is None else weights
    here = weighted_sum(-logps, (sequence_mean if per_token else sequence_sum)(weights, mask, axis_name=axis_name))
    return here if axis_name is None else jax.lax.psum(here, axis_name)
