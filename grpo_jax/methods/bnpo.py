"""BNPO: the centred reward over a Beta density that is fitted to the success rates of each batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grpo_jax import losses
from grpo_jax.advantages.beta import beta_normalized
from grpo_jax.advantages.shaping import per_decision
from grpo_jax.methods.grpo import grpo, total_reward, weights_of
from grpo_jax.types import Method


def bnpo(
    *,
    prompts: int,
    group_size: int,
    low: float = 0.0,
    high: float = 1.0,
    limit: float = 1e6,
    decompose: bool = False,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    kl: float = 0.0,
) -> Method:
    """A = w_p (R - p), p the prompt's success rate, w_p one over the Beta density at p (`beta_normalized`).

    The clipped surrogate is summed over tokens and averaged over completions. The published runs take one update per
    batch, where the ratio is 1 and no bound binds; their dual bound of 10 is left out.

    low, high: the range of the reward. limit: of w. decompose: advantages of each reward channel by itself, their mean
    under the channels' weights (the paper's option for several binary rewards); low and high are then each channel's.
    Not TRL's loss_type "bnpo", which is a token mean. Source: arXiv:2506.02864.
    """

    def normalized(rewards, groups):
        return beta_normalized(rewards, groups, low=low, high=high, limit=limit)

    def advantage(batch, arrays, key):
        if decompose:
            each = jax.vmap(normalized, in_axes=(1, None), out_axes=1)(batch.rewards, batch.group_ids)
            weights = jnp.array(weights_of(batch))
            values = jnp.where(weights != 0, each * weights, 0).sum(axis=1) / weights.sum()
        else:
            values = normalized(total_reward(batch), batch.group_ids)
        return batch.replace(advantages=per_decision(values, batch.completion_mask)), arrays

    def aggregate(batch):
        return losses.sequence_sum(batch.weights, batch.completion_mask)

    method = grpo(prompts=prompts, group_size=group_size, clip_low=clip_low, clip_high=clip_high, kl=kl)
    return method.replace(advantage=advantage, aggregate=aggregate)
