"""RLOO: REINFORCE with the mean of the other completions as the baseline."""

from __future__ import annotations

from grpo_jax import advantages, losses
from grpo_jax.methods.grpo import clipped, grpo, total_reward
from grpo_jax.types import Batch, Method


def rloo(*, prompts: int, group_size: int, clip: float = 0.2, **options) -> Method:
    """A_i = r_i - mean_{j != i} r_j; one ratio for the whole completion, clipped; mean over completions.

    The ratio is that of the sequence, prod_t rho_t, as in REINFORCE over whole completions.
    Source: Ahmadian et al. 2024 (arXiv:2402.14740), eq. 6.
    """
    kl = options.get("kl", 0.0)

    def advantage(batch, arrays, key):
        over_others = advantages.leave_one_out(total_reward(batch), batch.group_ids)
        return batch.replace(advantages=advantages.per_decision(over_others, batch.completion_mask)), arrays

    def objective(new, batch, arrays):
        ratio = losses.sequence_product(new.logps, batch.old.logps, batch.completion_mask)
        return clipped(ratio, new, batch, clip_low=clip, clip_high=clip, kl=kl)

    def aggregate(batch: Batch):
        return losses.sequence_mean(batch.weights, batch.completion_mask)

    method = grpo(prompts=prompts, group_size=group_size, **options)
    return method.replace(advantage=advantage, objective=objective, aggregate=aggregate)
