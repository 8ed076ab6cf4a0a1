"""GPG: plain policy gradient over the group's mean, larger where few completions succeed."""

from __future__ import annotations

from grpo_jax import advantages, losses
from grpo_jax.advantages.baselines import signal_scaled
from grpo_jax.methods.grpo import grpo, total_reward
from grpo_jax.types import Method


def gpg(*, prompts: int, group_size: int) -> Method:
    """A_i = (N / #{r_j != 0}) (r_i - mean of the prompt); loss = -A log pi, mean over the tokens of the mini-batch.

    No ratio, clip, reference or KL term: one update per batch (`training.updates: 1`). Failure has to score 0.
    Source: Chu et al. 2025 (arXiv:2504.02546), with the factor as in verl.
    """

    def advantage(batch, arrays, key):
        each = signal_scaled(total_reward(batch), batch.group_ids)
        return batch.replace(advantages=advantages.per_decision(each, batch.completion_mask)), arrays

    def objective(new, batch, arrays):
        return losses.reinforce(new.logps, batch.advantages), {}

    return grpo(prompts=prompts, group_size=group_size).replace(advantage=advantage, objective=objective)
