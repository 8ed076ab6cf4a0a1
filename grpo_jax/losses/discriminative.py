"""Right completions above wrong ones: scores per completion, an objective over groups, a budget for the drift.

    scores = losses.mean_logp(logps, mask)                                                     # [N]
    loss = losses.discriminative_loss(scores, rewards, group_ids, tau=10.0)                    # []
    loss += losses.kl_constraint(losses.forward_divergence(logps, old_logps, mask))            # []

Only [N] arrays need whole groups. Where rows are divided over a mesh, `segments.across("data", discriminative_loss)`
sees all of them. `weights` [N] says how much a row counts: 0 not at all, c as often as c copies of it (default: 1).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import segments
from grpo_jax.losses.aggregation import token_mean, weighted_sum
from grpo_jax.losses.elementwise import aligned
from grpo_jax.losses.ratios import token_ratio

DIVERGENCES = ("kl", "low_var_kl")
CONSTRAINTS = ("detached", "squared")


def mean_logp(logps: Float[Array, "N T"], mask: Bool[Array, "N T"]) -> Float[Array, "N"]:
    """Length-normalised log-likelihood of each completion, s = (1/L) sum_t m_t logps_t; 0 for an empty one.

    Source: DisCO's "logL", arXiv:2505.12366; GRAO's likelihood, arXiv:2508.07750.
    """
    logps, _ = aligned(logps=logps, mask=mask)
    return _row_mean(logps, mask)


def mean_ratio(
    logps: Float[Array, "N T"], old_logps: Float[Array, "N T"], mask: Bool[Array, "N T"]
) -> Float[Array, "N"]:
    """Mean importance ratio of each completion, s = (1/L) sum_t m_t rho_t; 0 for an empty one.

    Source: DisCO's "Lratio", arXiv:2505.12366; rho as in `token_ratio`.
    """
    ratio, _ = aligned(ratio=token_ratio(logps, old_logps), mask=mask)
    return _row_mean(ratio, mask)


def mean_clipped_ratio(
    logps: Float[Array, "N T"],
    old_logps: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    correct: Bool[Array, "N"],
    *,
    low: float = 0.2,
    high: float = 0.2,
) -> Float[Array, "N"]:
    """The score that GRPO with 0/1 rewards has inside: each side's ratio is clipped where it has gone far enough.

    s = (1/L) sum_t m_t min(rho_t, 1 + high) for a correct row, (1/L) sum_t m_t max(rho_t, 1 - low) for a wrong one.

    What DisCO replaces, to compare with: GRPO is the objective with it, tau = inf and groups weighted by
    sqrt(p (1 - p)). Raises: ValueError for low outside [0, 1] or high < 0.
    Source: arXiv:2505.12366.
    """
    for name, bound, most in (("low", low, 1), ("high", high, math.inf)):
        if isinstance(bound, (int, float)) and not 0 <= bound <= most:
            raise ValueError(f"{name} is the distance of a bound from 1, at least 0 and for low at most 1, got {bound}")
    ratio, _ = aligned(ratio=token_ratio(logps, old_logps), mask=mask)
    right = _per_row("correct", correct, ratio.shape[0]).astype(bool)[:, None]
    bound = jnp.where(right, 1 + high, 1 - low)
    return _row_mean(jnp.where(jnp.where(right, ratio > bound, ratio < bound), bound, ratio), mask)


def discriminative_loss(
    scores: Float[Array, "N"],
    rewards: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    *,
    tau: float,
    weights: Float[Array, "N"] | None = None,
    shares: Float[Array, "N"] | None = None,
) -> Float[Array, ""]:
    """Loss that raises the scores of right completions above those of wrong ones, hard questions as much as easy ones.

    -(1/n_q) sum_q [sum_{i right} u_i s_i - tau log mean_{j wrong} exp(s_j / tau)], u_i = 1 / number of right ones.

    rewards: exactly 1 is right, exactly 0 is wrong, anything else (NaN) is neither. A group without both adds 0 but
    counts in n_q. tau: above 0; small looks only at the highest wrong score, inf is their plain mean (DisCO-b).
    shares: u instead, adding up to 1 over the right rows of a group, as from `preference_weights` (DRPO).
    Raises: ValueError for tau <= 0. The value is the formula's; that of the released code is off by a constant per
    group. Source: arXiv:2505.12366; with shares arXiv:2510.04474.
    """
    if isinstance(tau, (int, float)) and not tau > 0:
        raise ValueError(f"tau is a temperature above 0 (inf: the plain mean of the wrong ones), got {tau}")
    scores, rewards, group_ids, weights = _rows(group_ids, weights, scores=scores, rewards=rewards)
    right, wrong = (rewards == 1) & (weights > 0), (rewards == 0) & (weights > 0)
    mixed = segments.has(right, group_ids) & segments.has(wrong, group_ids)
    right, wrong = right & mixed, wrong & mixed
    if shares is None:
        shares = preference_weights(jnp.zeros_like(scores), right, group_ids, lam=math.inf, weights=weights)
    shares = jax.lax.stop_gradient(jnp.where(right, _per_row("shares", shares, len(scores)), 0))
    above = jnp.sum(jnp.where(right, shares * scores, 0))
    below = _soft_maximum(scores, group_ids, wrong, weights, tau)
    below = jnp.sum(jnp.where(segments.first(wrong, group_ids), below, 0))
    return (below - above) / jnp.maximum(segments.number(group_ids, weights > 0), 1)


def preference_weights(
    preferences: Float[Array, "N"],
    correct: Bool[Array, "N"],
    group_ids: Int[Array, "N"],
    *,
    lam: float = 0.1,
    weights: Float[Array, "N"] | None = None,
) -> Float[Array, "N"]:
    """How the right completions of a group share its weight by a preference (brevity, say): never negative.

    u_i = c_i exp(r_i / lam) / sum_{k right} c_k exp(r_k / lam) over the right rows k of the group, 0 for other rows.

    preferences: constants, for a length in tokens 1 - length / budget. lam: above 0; small presses hard, inf shares
    equally. Raises: ValueError for lam <= 0. Source: DRPO, arXiv:2510.04474.
    """
    if isinstance(lam, (int, float)) and not lam > 0:
        raise ValueError(f"lam is the strength of the prior and must be above 0 (inf: equal shares), got {lam}")
    preferences, group_ids, weights = _rows(group_ids, weights, preferences=preferences)
    right = _per_row("correct", correct, len(preferences)).astype(bool) & (weights > 0) & (group_ids >= 0)
    power = jax.lax.stop_gradient(jnp.where(right, preferences, 0)) / lam
    power = jnp.where(right, weights * jnp.exp(power - segments.maximum(power, group_ids, right)), 0)
    mass = segments.total(power, group_ids)
    return power / jnp.where(mass > 0, mass, 1)


def forward_divergence(
    logps: Float[Array, "N T"],
    old_logps: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    estimator: str = "kl",
    weights: Float[Array, "N"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, ""]:
    """KL(old || new) per decision, from decisions that the old policy drew; a mean over all of them.

    "kl": mean of -d, of either sign. "low_var_kl": mean of exp(d) - 1 - d, not negative. d = logps - old_logps (in the
    latter clamped to +-20). Value and gradient of both are unbiased. 0 if nothing counts. axis_name: over the rows of
    all devices of that axis, inside shard_map.

    Raises: ValueError for another estimator. Source: arXiv:2505.12366 and its released code.
    """
    if estimator not in DIVERGENCES:
        raise ValueError(f"the divergence is estimated by one of {DIVERGENCES}, got {estimator!r}")
    logps, old_logps, _ = aligned(logps=logps, old_logps=old_logps, mask=mask)
    mask = jnp.asarray(mask).astype(bool)
    weights = jnp.ones(len(mask)) if weights is None else _per_row("weights", weights, len(mask))
    mask = mask & (weights > 0)[:, None]
    gain = jnp.where(mask, logps - jax.lax.stop_gradient(old_logps), 0)
    bounded = jnp.clip(gain, -20, 20)
    each = -gain if estimator == "kl" else jnp.expm1(bounded) - bounded
    here = weighted_sum(each, token_mean(weights, mask, axis_name=axis_name))
    return here if axis_name is None else jax.lax.psum(here, axis_name)


def kl_constraint(
    divergence: Float[Array, ""], *, budget: float = 1e-4, penalty: float = 1e3, form: str = "detached"
) -> Float[Array, ""]:
    """One-sided penalty that is silent within the budget delta and pulls back beyond it.

    "detached" (the released code, default): sg(beta [D - delta]_+) D, gradient beta [D - delta]_+ grad D.
    "squared" (the paper): beta [D - delta]_+^2, whose gradient is twice that for the same beta = penalty.

    Raises: ValueError for another form. Source: arXiv:2505.12366.
    """
    if form not in CONSTRAINTS:
        raise ValueError(f"the constraint's form is one of {CONSTRAINTS}, got {form!r}")
    divergence = jnp.asarray(divergence).astype(jnp.float32)
    excess = jnp.maximum(divergence - budget, 0)
    return penalty * excess**2 if form == "squared" else jax.lax.stop_gradient(penalty * excess) * divergence


def _soft_maximum(s: Array, group_ids: Array, where: Array, weights: Array, tau: float) -> Float[Array, "N"]:
    """tau log mean exp(s / tau) of the group's rows; from the maximum by expm1 and log1p, exact for large tau too."""
    if isinstance(tau, (int, float)) and tau == math.inf:
        return _group_mean(s, group_ids, where, weights)
    high = jax.lax.stop_gradient(segments.maximum(s, group_ids, where))
    below = jnp.expm1(jnp.where(where, s - high, 0) / tau)
    return high + tau * jnp.log1p(_group_mean(below, group_ids, where, weights))


def _group_mean(values: Array, group_ids: Array, where: Array, weights: Array) -> Float[Array, "N"]:
    """Mean over rows of the group, a row of weight c counting c times; exact where all values are equal."""
    low = jax.lax.stop_gradient(segments.minimum(values, group_ids, where))
    mass = segments.total(weights, group_ids, where)
    over = segments.total(weights * jnp.where(where, values - low, 0), group_ids, where)
    return low + over / jnp.where(mass > 0, mass, 1)


def _row_mean(values: Float[Array, "N T"], mask: Bool[Array, "N T"]) -> Float[Array, "N"]:
    mask = jnp.asarray(mask).astype(bool)
    return jnp.where(mask, values, 0).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)


def _rows(group_ids: Array, weights: Array | None, **values: Array) -> list[Array]:
    """The values in float32, the ids, and the weights, 0 for rows outside. Raises: ValueError if shapes differ."""
    group_ids, shapes = jnp.asarray(group_ids), {name: list(jnp.shape(value)) for name, value in values.items()}
    if group_ids.ndim != 1 or any(shape != list(group_ids.shape) for shape in shapes.values()):
        given = " and ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"one entry per row is expected, got {given} for group_ids {list(group_ids.shape)}")
    weights = jnp.ones(len(group_ids)) if weights is None else _per_row("weights", weights, len(group_ids))
    weights = jnp.where((group_ids >= 0) & (weights > 0), weights, 0).astype(jnp.float32)
    return [*(jnp.asarray(value).astype(jnp.float32) for value in values.values()), group_ids, weights]


def _per_row(name: str, values: Array, n: int) -> Array:
    if jnp.shape(values) != (n,):
        raise ValueError(f"{name} must have one entry for each of the {n} rows, got shape {list(jnp.shape(values))}")
    return jnp.asarray(values)
