"""The gap between the program that sampled and the program that trains: statistics and corrections.

    weight = token_importance(old_logps, sampler_logps)       how much likelier the trainer's policy is
    loss = capped(weight, cap=2.0) * loss                     truncated importance sampling
    loss = banded(weight, low=0.5, high=5.0) * loss           masked importance sampling; with these numbers IcePop

The same with `sequence_importance`, one weight per completion. A weight acts on the loss and leaves denominators alone;
`rejection_mask` changes the mask, and with it the denominators. Everything here is a constant of the loss. Where either
log-prob is NaN nothing was drawn, so there is nothing to correct. If the sampler's log-probs stand in for the old
policy's in the ratio, that ratio already holds the weight: do not multiply by it again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.losses import kl
from grpo_jax.losses.elementwise import aligned
from grpo_jax.losses.ratios import LARGEST_TOKEN_LOG_RATIO

ESTIMATORS = ("k1", "k2", "k3")
SPANS = ("token", "sequence_sum", "sequence_mean", "sequence_max")


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


def token_importance(old_logps: Float[Array, "N T"], sampler_logps: Float[Array, "N T"]) -> Float[Array, "N T"]:
    """w_t = exp(clamp(old_logps_t - sampler_logps_t, -20, 20)), a constant; 1 where either is NaN.

    Multiplied on the loss of a decision that the sampler drew, it makes up for the sampler's different distribution.
    """
    old_logps, sampler_logps = aligned(old_logps=old_logps, sampler_logps=sampler_logps)
    return _bounded_exp(jnp.where(jnp.isnan(old_logps - sampler_logps), 0, old_logps - sampler_logps))


def sequence_importance(
    old_logps: Float[Array, "N T"], sampler_logps: Float[Array, "N T"], mask: Bool[Array, "N T"]
) -> Float[Array, "N T"]:
    """The whole completion's weight on each of its decisions, a constant; 1 where masked out.

    w = exp(clamp(sum_t (old_logps_t - sampler_logps_t), -20, 20)) over the masked-in decisions, NaN left out.
    """
    log_weight, mask = _drawn(old_logps, sampler_logps, mask)
    return jnp.where(mask, _bounded_exp(log_weight.sum(-1, keepdims=True)), 1)


def capped(weights: Float[Array, "N T"], *, cap: float = 2.0, floor: float = 0.0) -> Float[Array, "N T"]:
    """Truncated importance sampling: clip(w, floor, cap), biased, of bounded variance. On token or sequence weights.

    Raises: ValueError unless 0 <= floor <= cap and cap > 0.
    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; verl's cap.
    """
    _check_bounds("floor", floor, "cap", cap)
    return jnp.clip(jnp.asarray(weights).astype(jnp.float32), floor, cap)


def banded(weights: Float[Array, "N T"], *, low: float = 0.5, high: float = 5.0) -> Float[Array, "N T"]:
    """Masked importance sampling: w inside [low, high], 0 outside. Denominators stay as they are.

    On token weights with [0.5, 5] this is IcePop; TRL's default is [0, 3] on sequence weights.
    Raises: ValueError unless 0 <= low <= high and high > 0.
    Source: IcePop, 2025 (arXiv:2510.18855).
    """
    _check_bounds("low", low, "high", high)
    weights = jnp.asarray(weights).astype(jnp.float32)
    return jnp.where((weights >= low) & (weights <= high), weights, 0)


def truncated_importance(
    old_logps: Float[Array, "N T"], sampler_logps: Float[Array, "N T"], *, cap: float = 2.0
) -> Float[Array, "N T"]:
    """`capped` token weights, min(w_t, cap): token-level truncated importance sampling (TIS) in one call.

    Raises: ValueError for cap <= 0. Source: as for `capped`.
    """
    return capped(token_importance(old_logps, sampler_logps), cap=cap)


def rejection_mask(
    old_logps: Float[Array, "N T"],
    sampler_logps: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    estimator: str = "k1",
    over: str = "token",
    high: float,
    low: float | None = None,
) -> Bool[Array, "N T"]:
    """The mask without what the sampler drew too differently, judged by decision or by completion.

    Kept where statistic <= bound, the statistic being an estimate of KL(sampler || trainer) with d = sampler - old:
    k2 = d^2 / 2 or k3 = exp(-d) - 1 + d, at most `high`; k1 = d, within [log low, log high].

    estimator: "k1", "k2", "k3". over: "token", or the completion's "sequence_sum", "sequence_mean", "sequence_max".
    high, low: for k1 bounds on exp(d), the INVERSE of the importance weight (low None: 1 / high); otherwise in nats and
    without `low`. "sequence_mean" of k1 bounds the geometric mean. Several masks join by `&`.
    Raises: ValueError for another estimator or span, a `low` for k2 or k3, or bounds in the wrong order.
    Source: verl's rollout rejection.
    """
    low = _check_rejection(estimator, over, low, high)
    log_weight, mask = _drawn(old_logps, sampler_logps, mask)
    gap = -jnp.clip(log_weight, -LARGEST_TOKEN_LOG_RATIO, LARGEST_TOKEN_LOG_RATIO)
    statistic = getattr(kl, estimator)(gap, jnp.zeros_like(gap))
    if over != "token":
        size = jnp.maximum(mask.sum(-1, keepdims=True), 1)
        statistic = {
            "sequence_sum": lambda: statistic.sum(-1, keepdims=True),
            "sequence_mean": lambda: statistic.sum(-1, keepdims=True) / size,
            "sequence_max": lambda: jnp.where(mask, statistic, -jnp.inf).max(-1, keepdims=True, initial=-jnp.inf),
        }[over]()
    if estimator == "k1":
        return mask & (statistic >= jnp.log(low)) & (statistic <= jnp.log(high))
    return mask & (statistic <= high)


def drifted(
    logps: Float[Array, "N T"],
    sampler_logps: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    threshold: float,
) -> Bool[Array, "N"]:
    """Completions to leave out because they are bad and have become unlikely: A_i < 0 and mean_t d_t > threshold.

    d_t = sampler_logps_t - logps_t over the masked-in decisions, logps of the policy as it is now; in nats. A_i is the
    row's mean advantage. False for a row without decisions. Multiply the loss by ~drifted, or take it to the mask
    as `without_truncated(mask, ~drifted)`, which changes the denominators too.
    Source: DeepSeek-V3.2's off-policy sequence masking, as in TRL.
    """
    log_weight, drawn = _drawn(logps, sampler_logps, mask)
    advantages, _ = aligned(advantages=advantages, mask=mask)
    size = jnp.maximum(drawn.sum(-1), 1)
    advantage = jnp.where(drawn, advantages, 0).sum(-1) / size
    return jax.lax.stop_gradient((advantage < 0) & (-log_weight.sum(-1) / size > threshold))


def importance_statistics(
    weights: Float[Array, "N T"], applied: Float[Array, "N T"], mask: Bool[Array, "N T"]
) -> dict[str, Float[Array, ""]]:
    """What to log of a correction, over the masked-in decisions: the weights before it, and what became of them.

    mean, max: of w. truncated, masked: share of decisions whose weight the correction changed, or set to 0. effective:
    effective sample size (sum w)^2 / sum w^2 as a share of the decisions. k3: mean of w - 1 - log w, an estimate of
    KL(sampler || trainer) in nats. All 0 if the mask is empty.

    weights: `token_importance` or `sequence_importance`; applied: what `capped` or `banded` made of it.
    """
    weights, applied, _ = aligned(weights=weights, applied=applied, mask=mask)
    mask = jnp.asarray(mask).astype(bool)
    weights, applied = (jax.lax.stop_gradient(jnp.where(mask, x, 1)) for x in (weights, applied))
    size = jnp.maximum(mask.sum(), 1)

    def mean(x: Array) -> Float[Array, ""]:
        return jnp.where(mask, x, 0).sum() / size

    dropped = (applied == 0) & (weights > 0)
    scaled = jnp.where(mask, weights, 0) / jnp.maximum(jnp.where(mask, weights, 0).max(initial=0), 1e-30)
    return {
        "mean": mean(weights),
        "max": jnp.where(mask, weights, 0).max(initial=0),
        "truncated": mean((applied != weights) & ~dropped),
        "masked": mean(dropped),
        "effective": scaled.sum() ** 2 / (jnp.maximum((scaled**2).sum(), 1e-30) * size),
        "k3": mean(kl.k3(jnp.zeros_like(weights), jnp.log(jnp.maximum(weights, 1e-30)))),
    }


def _drawn(old_logps: Array, sampler_logps: Array, mask: Array) -> tuple[Float[Array, "N T"], Bool[Array, "N T"]]:
    """log w where it counts and both are known, 0 elsewhere; and the mask."""
    old_logps, sampler_logps, _ = aligned(old_logps=old_logps, sampler_logps=sampler_logps, mask=mask)
    mask = jnp.asarray(mask).astype(bool)
    log_weight = old_logps - sampler_logps
    return jax.lax.stop_gradient(jnp.where(mask & ~jnp.isnan(log_weight), log_weight, 0)), mask


def _bounded_exp(log_weight: Array) -> Array:
    return jax.lax.stop_gradient(jnp.exp(jnp.clip(log_weight, -LARGEST_TOKEN_LOG_RATIO, LARGEST_TOKEN_LOG_RATIO)))


def _check_bounds(low_name: str, low: float, high_name: str, high: float) -> None:
    if not (isinstance(low, (int, float)) and isinstance(high, (int, float))):
        return  # under vmap over bounds they are tracers
    if not (high > 0 and 0 <= low <= high):
        raise ValueError(
            f"{high_name} is the largest weight and must be above 0, {low_name} the smallest, in [0, {high_name}]: "
            f"got {low_name} {low}, got {high}"
        )


def _check_rejection(estimator: str, over: str, low: float | None, high: float) -> float | None:
    """The lower bound of k1's range."""
    if estimator not in ESTIMATORS or over not in SPANS:
        raise ValueError(
            f"rejection is by an estimator of {ESTIMATORS} over one of {SPANS}, got {estimator!r}, {over!r}"
        )
    if estimator != "k1":
        if low is not None:
            raise ValueError(f"{estimator} is never negative and has no lower bound; leave out low, got {low}")
        return None
    low = 1 / high if low is None else low
    if all(isinstance(x, (int, float)) for x in (low, high)) and not 0 < low <= high:
        raise ValueError(f"for k1, low and high bound a ratio and need 0 < low <= high, got {low} and {high}")
    return low
