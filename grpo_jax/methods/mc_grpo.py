"""MC-GRPO: centre on the group's median, and train on all rows but the median one."""

from __future__ import annotations

import jax.numpy as jnp

from grpo_jax.advantages.median import SCALES, compensated, median_centered
from grpo_jax.advantages.shaping import per_decision
from grpo_jax.methods.grpo import at_least, grpo, total_reward
from grpo_jax.types import Method


def mc_grpo(
    *,
    prompts: int,
    group_size: int,
    scale: str = "mad",
    compensate: bool = False,
    epsilon: float = 1e-3,
    **options,
) -> Method:
    """A = (r - median) / (scale + epsilon) over group_size + 1 completions; the pivot, one row at the median, is
    dropped, so that `group_size` rows carry gradient. The published recipes add k3 with kl 0.04 and pass over each
    batch twice (training.passes); their control, which samples as many and drops the smallest |r|, is not here.

    scale: "mad" the median absolute deviation (the paper's; 0 in every mixed group of binary rewards, where advantages
    become +-1/epsilon), "std" the standard deviation (ddof 1), "none" no scale. compensate: `compensated`, which one
    of the two published trainers (GSM8K) does and the other does not.
    Raises: ValueError for an odd group_size (the median of an even number of rows is biased) or another scale.
    Source: arXiv:2601.22582, section 3.
    """
    at_least(2, group_size=group_size)
    if group_size % 2:
        raise ValueError(
            f"mc_grpo samples group_size + 1 rows and needs an odd number of them: group_size {group_size} must be even"
        )
    if scale not in SCALES:
        raise ValueError(f"mc_grpo's scale is one of {SCALES}, got {scale!r}")

    def advantage(batch, arrays, key):
        rewards = total_reward(batch)
        values, pivot = median_centered(rewards, batch.group_ids, scale=scale, epsilon=epsilon)
        if compensate:
            values = compensated(values, jnp.where(jnp.isnan(rewards), -1, batch.group_ids))
        return batch.replace(
            advantages=per_decision(values, batch.completion_mask),
            weights=jnp.where(pivot, 0.0, batch.weights),
        ), arrays

    return grpo(prompts=prompts, group_size=group_size + 1, **options).replace(advantage=advantage)
