"""TEMPO: completions of a prompt form a tree, and each token is credited with what it changed in its branch's value."""

from __future__ import annotations

import jax.numpy as jnp

from grpo_jax.advantages.tree import prefix_gains, prefix_tree
from grpo_jax.methods.grpo import grpo, total_reward
from grpo_jax.types import Method


def tempo(*, prompts: int, group_size: int, clip_low: float = 0.2, clip_high: float = 0.2, kl: float = 0.0) -> Method:
    """A_t = (r - mean + V(s_{t+1}) - V(s_t)) / std per token, in GRPO's loss; V(s) is the mean reward of the group's
    completions that begin with s.

    `branches` among the metrics is the share of tokens at which V changed; elsewhere TEMPO is GRPO.
    Source: arXiv:2509.18314.
    """
    plain = grpo(prompts=prompts, group_size=group_size, clip_low=clip_low, clip_high=clip_high, kl=kl)

    def advantage(batch, arrays, key):
        tree = total_reward(batch), batch.group_ids, batch.completions, batch.lengths
        return batch.replace(
            advantages=jnp.where(batch.completion_mask, prefix_tree(*tree), 0),
            columns={**batch.columns, "branches": prefix_gains(*tree) != 0},
        ), arrays

    def objective(new, batch, arrays):
        loss, reported = plain.objective(new, batch, arrays)
        return loss, {**reported, "branches": batch.columns["branches"]}

    return plain.replace(advantage=advantage, objective=objective)
