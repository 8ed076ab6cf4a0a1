"""GRPO-lambda: only the groups that are answered best are also paid for brevity; the others for being right alone."""

from __future__ import annotations

import jax.numpy as jnp

from grpo_jax.advantages.gates import top_groups
from grpo_jax.advantages.lengths import brevity
from grpo_jax.methods.grpo import grpo
from grpo_jax.types import Method


def grpo_lambda(*, prompts: int, group_size: int, fraction: float = 0.2, alpha: float = 0.6, **options) -> Method:
    """In the ceil(fraction B) groups of the batch with the largest share of right completions a right one earns
    1 - alpha sigmoid((length - mean) / std), over the right ones of its group; in the others 1. Wrong ones earn 0.

    The first reward channel says 1 for right and 0 for wrong; a truncated completion is wrong. Further channels stay.

    fraction: the paper's lambda (a share of groups, not an accuracy); 0 is plain GRPO with truncated ones wrong, 1 pays
    for brevity everywhere.
    alpha: 0.6 is a third party's value; the paper's is not known, and the order of ties is reconstructed.
    Source: arXiv:2505.18086. Eligibility traces of the same name (arXiv:2510.00194) are another method.
    """

    def reward(batch, arrays, key):
        verdict = batch.scores[:, 0]
        right = jnp.where(jnp.isnan(verdict), verdict, (verdict > 0.5) & batch.finished)
        top = top_groups(right, batch.group_ids, fraction=fraction)
        shaped = jnp.where(top, brevity(right, batch.lengths, batch.group_ids, alpha=alpha), right)
        return jnp.concatenate([shaped[:, None], batch.scores[:, 1:]], axis=1)

    return grpo(prompts=prompts, group_size=group_size, **options).replace(reward=reward)
