"""REINFORCE++: returns token by token, whitened over the whole batch in place of the group."""

from __future__ import annotations

from grpo_jax import losses
from grpo_jax.advantages.returns import at_last
from grpo_jax.advantages.whitening import reinforce_plus_plus as whitened_returns
from grpo_jax.advantages.whitening import reinforce_plus_plus_baseline as whitened_differences
from grpo_jax.methods.grpo import clipped, grpo, total_reward
from grpo_jax.types import Method, Role


def reinforce_plus_plus(
    *,
    prompts: int,
    group_size: int,
    gamma: float = 1.0,
    group_baseline: bool = False,
    kl: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Method:
    """A_t = whitened sum_{u >= t} gamma^(u - t) r_u over all trained tokens of the batch, r the score at the last token
    less kl (log pi_old - log pi_ref) at each; clipped surrogate, mean over tokens.

    group_baseline: whitened r - mean of the prompt instead (REINFORCE++-baseline), with the kl as k2 in the loss.
    gamma: discount per trained token; given tokens in between are passed over. group_size may be 1 without
    group_baseline. Rows in no group (id -1) or without a score are in no statistic.
    Source: Hu et al. 2025 (arXiv:2501.03262), as in verl (where given tokens end the sum).
    """

    def advantage(batch, arrays, key):
        mask = batch.completion_mask
        if group_baseline:
            each = whitened_differences(total_reward(batch), batch.group_ids, mask)
        else:
            counted = mask & (batch.group_ids >= 0)[:, None]
            rewards = at_last(total_reward(batch), counted)
            if kl:
                rewards = rewards - kl * (batch.old.logps - batch.ref.logps)
            each = whitened_returns(rewards, counted, gamma=gamma, across_gaps=True)
        return batch.replace(advantages=each), arrays

    def objective(new, batch, arrays):
        ratio = losses.token_ratio(new.logps, batch.old.logps)
        loss, reported = clipped(ratio, new, batch, clip_low=clip_low, clip_high=clip_high)
        if kl:
            reported["kl"] = losses.kl.k1(new.logps, batch.ref.logps)
        if kl and group_baseline:
            loss = loss + kl * losses.kl.k2(new.logps, batch.ref.logps)
        return loss, reported

    method = grpo(prompts=prompts, group_size=group_size)
    return method.replace(advantage=advantage, objective=objective, roles={"reference": Role()} if kl else {})
