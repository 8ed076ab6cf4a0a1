"""Pref-GRPO: the reward is the share of a group's other completions that a judge finds worse, one pair at a time."""

from __future__ import annotations

import jax.numpy as jnp

from grpo_jax.advantages.channels import decoupled, decoupled_over_rows
from grpo_jax.advantages.shaping import per_decision
from grpo_jax.methods.grpo import grpo, weights_of
from grpo_jax.types import Method


def pref_grpo(
    *,
    prompts: int,
    group_size: int,
    whiten: bool = False,
    bound: float = 5.0,
    epsilon: float = 1e-8,
    **options,
) -> Method:
    """A = sum_k w_k (r_k - mean) / (std + epsilon) over the reward channels, cut at +-bound.

    One channel is a win rate: a reward function asks the judge about all pairs of a prompt's completions
    (`tournament` in advantages/preferences.py) and returns the `win_rates`. These are always 0.5 on average: follow
    another channel, of weight 0, to see progress. Released recipes add an absolute reward with about the same weight.
    whiten: brings A to mean 0 and standard deviation 1 over the batch, as current scripts do.
    Raises: ValueError for bound <= 0. Source: arXiv:2508.20751, there for flow models (with clip 1e-4 per step).
    """
    if not bound > 0:
        raise ValueError(f"pref_grpo cuts advantages at +-bound, which must be above 0, got {bound}")
    combined = decoupled_over_rows if whiten else decoupled

    def advantage(batch, arrays, key):
        weights = weights_of(batch)
        scores = jnp.clip(combined(batch.rewards, batch.group_ids, weights, epsilon=epsilon), -bound, bound)
        return batch.replace(advantages=per_decision(scores, batch.completion_mask)), arrays

    return grpo(prompts=prompts, group_size=group_size, **options).replace(advantage=advantage)
