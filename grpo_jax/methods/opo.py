"""OPO: exactly on-policy REINFORCE over the baseline of least variance, the group's mean weighted by length."""

from __future__ import annotations

from grpo_jax import advantages, losses
from grpo_jax.advantages.baselines import length_weighted
from grpo_jax.methods.grpo import grpo, total_reward
from grpo_jax.types import Method


def opo(*, prompts: int, group_size: int) -> Method:
    """A_i = r_i - sum_j L_j r_j / sum_j L_j within the prompt; loss = -A log pi summed over tokens, mean over
    completions. No ratio, clip, KL or entropy term: one update per batch (`training.updates: 1`).

    The sum over tokens is what the baseline is the best for; a mean over tokens would weigh lengths once more.
    Source: Hao et al. 2025 (arXiv:2505.23585).
    """

    def advantage(batch, arrays, key):
        lengths = batch.completion_mask.sum(-1)
        each = length_weighted(total_reward(batch), lengths, batch.group_ids)
        return batch.replace(advantages=advantages.per_decision(each, batch.completion_mask)), arrays

    def objective(new, batch, arrays):
        return losses.reinforce(new.logps, batch.advantages), {}

    def aggregate(batch):
        return losses.sequence_sum(batch.weights, batch.completion_mask)

    method = grpo(prompts=prompts, group_size=group_size, aggregate=aggregate)
    return method.replace(advantage=advantage, objective=objective)
