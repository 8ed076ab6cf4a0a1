"""DisCO: raise the scores of right completions above those of wrong ones, within a KL budget. A scalar objective."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grpo_jax import segments
from grpo_jax.methods.grpo import grpo, token_mean, total_reward
from grpo_jax.types import Method

SCORES = ("logL", "Lratio")


def disco(
    *,
    prompts: int,
    group_size: int,
    score: str = "logL",
    tau: float | None = None,
    budget: float = 1e-4,
    penalty: float = 1e3,
) -> Method:
    """J = (1/n_q) sum_q [mean_{right} s - tau log mean_{wrong} exp(s / tau)], loss = -J + sg(max(penalty (D - budget), 0)) D.

    s is the mean log-prob of a completion ("logL") or the mean ratio ("Lratio"); D = mean over all trained tokens of
    (log pi_old - log pi). Rewards are exactly 0 or 1; a group without both counts in n_q and adds nothing.
    tau: temperature over the wrong ones; default 10 for "logL", 1 for "Lratio".
    Raises: ValueError for another score.
    Source: arXiv:2505.12366, eq. 7 and 10.
    """
    if score not in SCORES:
        raise ValueError(f"disco's score is one of {SCORES}, got {score!r}")
    tau = tau or {"logL": 10.0, "Lratio": 1.0}[score]

    def objective(new, batch, arrays):
        mask, groups, rewards = batch.completion_mask, batch.group_ids, total_reward(batch)
        lengths = jnp.maximum(mask.sum(axis=1), 1)
        gain = jnp.where(mask, new.logps - batch.old.logps, 0)
        s = jnp.where(mask, new.logps if score == "logL" else jnp.exp(gain), 0).sum(axis=1) / lengths
        right, wrong = rewards == 1, rewards == 0
        margin = segments.mean(s, groups, right) - tau * segments.log_mean_exp(s / tau, groups, wrong)
        mixed = segments.has(right, groups) & segments.has(wrong, groups)
        n_q = jnp.maximum(segments.number(groups), 1)
        gained = jnp.where(mixed & segments.first(groups >= 0, groups), margin, 0).sum() / n_q
        divergence = -gain.sum() / jnp.maximum(mask.sum(), 1)
        loss = -gained + jax.lax.stop_gradient(jnp.maximum(penalty * (divergence - budget), 0)) * divergence
        return loss, {"ratio": jnp.exp(gain), "margin": jnp.broadcast_to(gained, mask.shape)}

    def advantage(batch, arrays, key):  # none: the objective reads rewards and groups
        return batch.replace(advantages=jnp.zeros(batch.completion_mask.shape, jnp.float32)), arrays

    method = grpo(prompts=prompts, group_size=group_size, aggregate=token_mean)
    return method.replace(advantage=advantage, objective=objective)
