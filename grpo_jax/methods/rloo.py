"""RLOO: REINFORCE with the mean of the other completions as the baseline."""

from __future__ import annotations

from grpo_jax import advantages, losses
from grpo_jax.methods.grpo import clipped, grpo, sequence_mean, total_reward
from grpo_jax.types import Method


def rloo(*, prompts: int, group_size: int, clip: float = 0.2, kl: float = 0.0) -> Method:
    """A_i = r_i - mean_{j != i} r_j; one ratio for the whole completion, clipped; mean over completions.

    The ratio is that of the sequence, w = prod_t rho_t, as in REINFORCE over whole completions: the loss is
    mean_i max(-A_i w_i, -A_i clip(w_i, 1 - clip, 1 + clip)). kl: coefficient of k3 against the reference, per token.
    Source: Ahmadian et al. 2024 (arXiv:2402.14740), eq. 6.
    """

    def advantage(batch, arrays, key):
        over_others = advantages.leave_one_out(total_reward(batch), batch.group_ids)
        return batch.replace(advantages=advantages.per_decision(over_others, batch.completion_mask)), arrays

    def objective(new, batch, arrays):
        ratio = losses.sequence_product(new.logps, batch.old.logps, batch.completion_mask)
        return clipped(ratio, new, batch, clip_low=clip, clip_high=clip, kl=kl)

    # A row's equal entries, averaged over the row, have the gradient of w_i once.
    method = grpo(prompts=prompts, group_size=group_size, kl=kl, aggregate=sequence_mean)
    return method.replace(advantage=advantage, objective=objective)
