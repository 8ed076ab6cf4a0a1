"""Dr. GRPO: no division by the spread of the group, none by the length of the completion."""

from __future__ import annotations

from grpo_jax import advantages, losses
from grpo_jax.methods.grpo import grpo, total_reward
from grpo_jax.types import Method


def dr_grpo(
    *, prompts: int, group_size: int, max_new: int, clip_low: float = 0.2, clip_high: float = 0.2, kl: float = 0.0
) -> Method:
    """A = r - mean within the prompt; loss summed over tokens and divided by (completions * max_new).

    max_new: the generation budget in tokens (taken from `sampling.max_new`).
    Source: Liu et al. 2025 (arXiv:2503.20783), section 3.2.
    """

    def advantage(batch, arrays, key):
        centered = advantages.group_centered(total_reward(batch), batch.group_ids)
        return batch.replace(advantages=advantages.per_decision(centered, batch.completion_mask)), arrays

    def aggregate(batch):
        return losses.fixed_length(batch.weights, batch.completion_mask, length=max_new)

    method = grpo(prompts=prompts, group_size=group_size, clip_low=clip_low, clip_high=clip_high, kl=kl)
    return method.replace(advantage=advantage, aggregate=aggregate)
