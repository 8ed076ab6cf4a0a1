"""Reg-GRPO: the standardised log-ratio of a completion regresses on its advantage, without clip or ratio."""

from __future__ import annotations

import jax.numpy as jnp

from grpo_jax import advantages, losses
from grpo_jax.losses.ratios import token_ratio
from grpo_jax.losses.regression import group_regression, sequence_log_ratio
from grpo_jax.methods.grpo import grpo, total_reward
from grpo_jax.types import Method


def reg_grpo(
    *,
    prompts: int,
    group_size: int,
    kl: float = 0.04,
    epsilon: float = 1e-4,
    ratio_epsilon: float = 0.1,
) -> Method:
    """loss = mean over groups and members of (A - P)^2 + kl k3. A is the group's z-score of the rewards, P that of the
    whole-sequence log-ratios, (rho - mean) / sqrt(var + ratio_epsilon^2), with gradient through all three.

    At the first update of a batch rho = 0 and this is GRPO at the scale 2 / ratio_epsilon, so clip the gradient's norm;
    the method shows from the second update on (training.passes). Groups of equal rewards are left out of the mean. A
    prompt's frames are not perturbed by its difficulty: that half of the paper is for video.
    Raises: ValueError for group_size < 3 (P of two is a sign, without a gradient) and ratio_epsilon <= 0.
    Source: arXiv:2506.07464; ddof 1, both epsilons, and the KL's estimator and coefficient are reconstructed.
    """
    if group_size < 3:
        raise ValueError(f"reg_grpo standardises within a group and needs group_size 3 or more, got {group_size}")
    if not ratio_epsilon > 0:
        raise ValueError(f"reg_grpo's ratio_epsilon must be above 0, or the first update is NaN, got {ratio_epsilon}")

    def objective(new, batch, arrays):
        rewards, old, mask = total_reward(batch), batch.old.logps, batch.completion_mask
        targets = advantages.group_z_score(rewards, batch.group_ids, epsilon=epsilon)
        targets = jnp.where(jnp.isnan(rewards), jnp.nan, targets)
        rho = sequence_log_ratio(new.logps, old, mask)
        loss = group_regression(rho, targets, batch.group_ids, epsilon=ratio_epsilon, weights=batch.weights)
        reported = {"ratio": token_ratio(new.logps, old), "regression": jnp.broadcast_to(loss, mask.shape)}
        if kl:
            spread = losses.sequence_mean(batch.weights, mask)
            loss = loss + kl * losses.weighted_sum(losses.kl.k3(new.logps, batch.ref.logps), spread)
            reported["kl"] = losses.kl.k1(new.logps, batch.ref.logps)
        return loss, reported

    return grpo(prompts=prompts, group_size=group_size, kl=kl, epsilon=epsilon).replace(objective=objective)
