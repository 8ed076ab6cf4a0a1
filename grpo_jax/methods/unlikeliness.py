"""Unlikeliness: right completions that the policy finds likely earn less, so that rare right ones are learnt."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from grpo_jax import losses
from grpo_jax.advantages.group import group_z_score
from grpo_jax.advantages.shaping import per_decision
from grpo_jax.advantages.unlikely import discount_likely
from grpo_jax.methods.grpo import at_least, grpo, mixed, total_reward
from grpo_jax.types import Method, Request, concat


def unlikeliness(
    *,
    prompts: int,
    group_size: int,
    penalty: float = 0.25,
    form: str = "code",
    buffer: int = 256,
    max_rounds: int = 10,
    kl: float = 0.1,
    epsilon: float = 1e-6,
    **options,
) -> Method:
    """Rounds of `prompts` are sampled until `buffer` completions are in groups with both right and wrong ones; these
    are one batch, which the paper passes over twice (training.passes). A right one earns 1 - penalty k / G, k its place
    by mean log-prob, likeliest last.

    The filter looks at rewards before the discount: in a group that is all right only likelihood would be compared.
    After `max_rounds` the step trains on what there is. Rewards are 0 or 1.
    form: "code" or "paper", see `discount_likely`. Gradients of norm 20 and more, which the published code skips, are
    clipped like others here.
    Raises: ValueError for another form, or a penalty outside [0, 1].
    Source: He et al. 2025 (arXiv:2506.02355).
    """
    at_least(1, max_rounds=max_rounds, buffer=buffer)
    discount_likely(np.zeros(1), np.zeros(1), np.zeros(1, int), penalty=penalty, form=form)  # complains at once

    def plan(state, draw, key):
        kept = []
        for _ in range(max_rounds):
            rows = yield [Request(p, count=group_size) for p in draw(state, prompts)]
            rows = yield rows
            kept += [g for g in rows.groups() if mixed(g)]
            if sum(map(len, kept)) >= buffer:
                break
        return state.host, [concat(*kept)] if kept else []

    def advantage(batch, arrays, key):
        mask = batch.completion_mask
        likelihoods = jnp.where(mask.any(axis=1), losses.mean_logp(batch.old.logps, mask), jnp.nan)
        rewards = discount_likely(total_reward(batch), likelihoods, batch.group_ids, penalty=penalty, form=form)
        scores = group_z_score(rewards, batch.group_ids, epsilon=epsilon)
        return batch.replace(advantages=per_decision(scores, batch.completion_mask)), arrays

    method = grpo(prompts=prompts, group_size=group_size, kl=kl, epsilon=epsilon, **options)
    return method.replace(plan=plan, advantage=advantage)
