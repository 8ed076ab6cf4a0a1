"""DisCO: raise the scores of right completions above those of wrong ones, within a KL budget. A scalar objective."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from grpo_jax import losses, segments
from grpo_jax.methods.grpo import grpo, token_mean, total_reward
from grpo_jax.types import Method

SCORES = ("logL", "Lratio")
DIVERGENCES = ("kl", "low_var_kl")


def disco(
    *,
    prompts: int,
    group_size: int,
    score: str = "logL",
    tau: float | None = None,
    divergence: str = "kl",
    budget: float = 1e-4,
    penalty: float = 1e3,
) -> Method:
    """loss = sg(max(penalty (D - budget), 0)) D - J, J = 1/n_q sum_q [mean_right s - tau log mean_wrong exp(s / tau)].

    s is the mean log-prob of a completion ("logL") or the mean ratio ("Lratio"). D is the mean over all trained tokens
    of -d ("kl") or exp(d) - 1 - d ("low_var_kl"), d = log pi - log pi_old. Rewards are exactly 0 or 1; a group without
    both counts in n_q and adds nothing.
    tau: temperature over the wrong ones; default 10 for "logL", 1 for "Lratio"; inf for their plain mean (DisCO-b).
    Raises: ValueError for another score or divergence, or tau <= 0.
    Source: arXiv:2505.12366, eq. 7 and 10.
    """
    if score not in SCORES:
        raise ValueError(f"disco's score is one of {SCORES}, got {score!r}")
    if divergence not in DIVERGENCES:
        raise ValueError(f"disco's divergence is one of {DIVERGENCES}, got {divergence!r}")
    tau = {"logL": 10.0, "Lratio": 1.0}[score] if tau is None else tau
    if not tau > 0:
        raise ValueError(f"disco's tau is a temperature above 0 (inf: the plain mean), got {tau}")

    def against(s, groups, wrong, weights):
        """tau log mean_j exp(s_j / tau), a row of weight c counting c times; the mean for tau = inf."""
        if tau == math.inf:
            return _mean(s, groups, wrong, weights)
        share = jnp.log(jnp.where(wrong, weights, 1))
        total = segments.log_mean_exp(s / tau + share, groups, wrong)
        return tau * (total - segments.log_mean_exp(share, groups, wrong))

    def objective(new, batch, arrays):
        mask, groups, rewards = batch.completion_mask, batch.group_ids, total_reward(batch)
        lengths = jnp.maximum(mask.sum(axis=1), 1)
        gain = jnp.where(mask, new.logps - batch.old.logps, 0)
        s = jnp.where(mask, new.logps if score == "logL" else jnp.exp(gain), 0).sum(axis=1) / lengths
        right, wrong = (rewards == 1) & (batch.weights > 0), (rewards == 0) & (batch.weights > 0)
        margin = _mean(s, groups, right, batch.weights) - against(s, groups, wrong, batch.weights)
        mixed = segments.has(right, groups) & segments.has(wrong, groups)
        n_q = jnp.maximum(segments.number(groups), 1)
        gained = jnp.where(mixed & segments.first(groups >= 0, groups), margin, 0).sum() / n_q
        drift = -gain if divergence == "kl" else jnp.expm1(gain) - gain
        drift = losses.weighted_sum(drift, losses.token_mean(batch.weights, mask))
        loss = -gained + jax.lax.stop_gradient(jnp.maximum(penalty * (drift - budget), 0)) * drift
        return loss, {"ratio": jnp.exp(gain), "margin": jnp.broadcast_to(gained, mask.shape)}

    def advantage(batch, arrays, key):  # none: the objective reads rewards and groups
        return batch.replace(advantages=jnp.zeros(batch.completion_mask.shape, jnp.float32)), arrays

    method = grpo(prompts=prompts, group_size=group_size, aggregate=token_mean)
    return method.replace(advantage=advantage, objective=objective)


def _mean(s, groups, where, weights):
    """Mean over rows of a group, a row of weight c counting c times."""
    mass = segments.total(weights, groups, where)
    return segments.total(weights * s, groups, where) / jnp.where(mass > 0, mass, 1)
