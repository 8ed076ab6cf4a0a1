"""DRPO: DisCO in which shorter right completions weigh more among the right ones, and none is pushed down."""

from __future__ import annotations

from grpo_jax.losses.discriminative import discriminative_loss, mean_logp, preference_weights
from grpo_jax.methods.disco import constrained, disco
from grpo_jax.methods.grpo import at_least, total_reward
from grpo_jax.types import Method


def drpo(
    *,
    prompts: int,
    group_size: int,
    max_new: int,
    lam: float = 0.1,
    tau: float = 10.0,
    divergence: str = "kl",
    budget: float = 1e-4,
    penalty: float = 1e3,
) -> Method:
    """J = 1/n_q sum_q [sum_right u_i s_i - tau log mean_wrong exp(s / tau)], u_i ~ exp((1 - length_i / max_new) / lam)
    within the right ones of a group; the loss, its KL constraint and the edge cases as in `disco` with "logL".

    lam: strength of the preference for short ones, above 0; small presses hard, inf is DisCO. Twice the
    budget max_new at the same lam is half the pressure. A group without both right and wrong ones teaches nothing.
    Raises: ValueError for lam <= 0 and what `disco` refuses.
    Source: arXiv:2510.04474.
    """
    if not lam > 0:
        raise ValueError(f"drpo's lam is the strength of the preference and must be above 0 (inf: none), got {lam}")

    at_least(0, penalty=penalty)

    def objective(new, batch, arrays):
        rewards, groups, weights = total_reward(batch), batch.group_ids, batch.weights
        shares = preference_weights(1 - batch.lengths / max_new, rewards == 1, groups, lam=lam, weights=weights)
        s = mean_logp(new.logps, batch.completion_mask)
        loss = discriminative_loss(s, rewards, groups, tau=tau, weights=weights, shares=shares)
        return constrained(loss, new, batch, divergence=divergence, budget=budget, penalty=penalty)

    method = disco(prompts=prompts, group_size=group_size, tau=tau, divergence=divergence)
    return method.replace(objective=objective)
