"""Estimators of the divergence from a reference policy, per decision, from the log-probs of what was sampled.

With d = logps - ref_logps and decisions drawn from the policy p that is trained (reference q), each docstring says what
the expectation of the VALUE and of the GRADIENT (as a term of a loss) estimate; they are different things. If the
decisions come from an older policy, both need the ratio in front. Reverse KL is KL(p || q), forward KL is KL(q || p).

A NaN stays NaN, without harm to the gradient where aggregation leaves it out. The reference gets no gradient.
Source: Schulman 2020, "Approximating KL divergence".
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.losses.elementwise import aligned, where_finite

LARGEST_LOG_RATIO = 20.0


def k1(logps: Float[Array, "N T"], ref_logps: Float[Array, "N T"]) -> Float[Array, "N T"]:
    """The plain difference: d.

    Value: reverse KL, unbiased, of high variance, of either sign. Gradient: 1 per log-prob, whose expectation is 0: as
    a loss it only adds noise (as a penalty on the reward it is right).
    """
    return where_finite(lambda d: d, _difference(logps, ref_logps))


def k2(logps: Float[Array, "N T"], ref_logps: Float[Array, "N T"]) -> Float[Array, "N T"]:
    """Half the squared difference: d^2 / 2.

    Value: biased, not negative; second order in d. Gradient: d per log-prob, that of the reverse KL, unbiased.
    """
    return where_finite(lambda d: d * d / 2, _difference(logps, ref_logps))


def k3(logps: Float[Array, "N T"], ref_logps: Float[Array, "N T"]) -> Float[Array, "N T"]:
    """exp(-d) - 1 + d, the term of DeepSeekMath's GRPO; d is clamped to +-20, without gradient beyond.

    Value: reverse KL, unbiased, of low variance, not negative. Gradient: 1 - exp(-d) per log-prob, which is that of the
    FORWARD KL.
    Source: Shao et al. 2024 (arXiv:2402.03300), eq. 4. (verl bounds the value at 10 as well; this does not.)
    """
    bound = LARGEST_LOG_RATIO
    return where_finite(lambda d: jnp.expm1(-d) + d, jnp.clip(_difference(logps, ref_logps), -bound, bound))


def absolute(logps: Float[Array, "N T"], ref_logps: Float[Array, "N T"]) -> Float[Array, "N T"]:
    """The absolute difference: |d|.

    Value: mean absolute log-ratio, no divergence's estimate, not under the reverse KL. Gradient: sign(d) per log-prob,
    a push of constant size; that of the total variation distance times 2.
    """
    return where_finite(jnp.abs, _difference(logps, ref_logps))


def unbiased(logps: Float[Array, "N T"], ref_logps: Float[Array, "N T"]) -> Float[Array, "N T"]:
    """k3's value with k2's gradient (straight-through): both unbiased for the reverse KL.

    Source: what verl's "k3+" is meant to be; Tang & Munos 2025 (arXiv:2506.09477) on why value and gradient differ.
    """
    through = k2(logps, ref_logps)
    return jax.lax.stop_gradient(k3(logps, ref_logps) - through) + through


def corrected(
    ratio: Float[Array, "N T"], logps: Float[Array, "N T"], ref_logps: Float[Array, "N T"]
) -> Float[Array, "N T"]:
    """ratio * k3, for decisions drawn from an older policy: right for both value and gradient.

    ratio: p / p_old of each decision, with its gradient (`token_ratio`). Value: reverse KL, unbiased whatever the older
    policy. Gradient: ratio * d per log-prob, that of the reverse KL, unbiased; where ratio is 1, k2's gradient.
    Source: TRL's `use_bias_correction_kl`, after DeepSeek-V3.2.
    """
    ratio, logps, ref_logps = aligned(ratio=ratio, logps=logps, ref_logps=ref_logps)
    return where_finite(lambda ratio, term: ratio * term, ratio, k3(logps, ref_logps))


def reverse(logps: Float[Array, "... V"], ref_logps: Float[Array, "... V"]) -> Float[Array, "..."]:
    """Reverse KL of two distributions over all V outcomes, sum_v p_v (log p_v - log q_v).

    logps, ref_logps: normalised log-probs of every outcome; -inf for one that is ruled out. Infinite, without gradient,
    where p allows what q rules out. Value and gradient: exact, for the decision at hand in the contexts of the batch;
    nothing is sampled, so nothing is estimated (how p changes the later contexts is left out, as in any term per
    decision).
    """
    logps, ref_logps = aligned(logps=logps, ref_logps=ref_logps)
    return _over_outcomes(logps, jax.lax.stop_gradient(ref_logps))


def forward(logps: Float[Array, "... V"], ref_logps: Float[Array, "... V"]) -> Float[Array, "..."]:
    """Forward KL of two distributions over all V outcomes, sum_v q_v (log q_v - log p_v).

    Arguments as in `reverse`. Infinite, without gradient, where q allows what p rules out. Value and gradient: exact;
    the gradient, -q_v per log-prob, is the cross-entropy's, and is what k3's estimates from samples.
    """
    logps, ref_logps = aligned(logps=logps, ref_logps=ref_logps)
    return _over_outcomes(jax.lax.stop_gradient(ref_logps), logps)


def _over_outcomes(p: Array, q: Array) -> Float[Array, "..."]:
    """sum_v exp(p_v) (p_v - q_v) over the last axis, NaN if any of them is no log-prob."""
    broken = jnp.any(~((p < jnp.inf) & (q < jnp.inf)), axis=-1)
    infinite = jnp.any((p > -jnp.inf) & (q == -jnp.inf), axis=-1)
    counts = (p > -jnp.inf) & ~(broken | infinite)[..., None]
    p, q = jnp.where(counts, p, 0), jnp.where(counts, q, 0)
    total = jnp.sum(jnp.where(counts, jnp.exp(p) * (p - q), 0), axis=-1)
    return jnp.where(broken, jnp.nan, jnp.where(infinite, jnp.inf, total))


def _difference(logps: Array, ref_logps: Array) -> Array:
    logps, ref_logps = aligned(logps=logps, ref_logps=ref_logps)
    return logps - jax.lax.stop_gradient(ref_logps)
