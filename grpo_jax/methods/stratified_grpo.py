"""Stratified GRPO: completions are compared with those of the same structure, blended with the whole group."""

from __future__ import annotations

import jax.numpy as jnp

from grpo_jax.advantages.shaping import per_decision
from grpo_jax.advantages.strata import stratified
from grpo_jax.methods.grpo import grpo, total_reward
from grpo_jax.types import Method


def stratified_grpo(
    *,
    prompts: int,
    group_size: int,
    stratum: str = "stratum",
    alpha: float = 0.8,
    epsilon: float = 1e-6,
    **options,
) -> Method:
    """A = alpha z(r within prompt and stratum) + (1 - alpha) z(r within the prompt), z over n (`stratified` has n - 1,
    too).

    stratum: the column with a label >= 0 for each completion (say its number of tool calls), which a reward function
    returns beside its scores as `Scored(channels, columns)`; no label (NaN or below 0): only the second term.
    alpha: the paper's value is not known; 0.8 is this project's.
    Raises: ValueError for alpha outside [0, 1], and with the batch if there is no such column.
    Source: arXiv:2510.06214.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"stratified_grpo blends by alpha in [0, 1], got {alpha}")

    def advantage(batch, arrays, key):
        if stratum not in batch.columns or batch.columns[stratum].ndim != 1:
            raise ValueError(
                f"stratified_grpo compares by the column {stratum!r}, one number per completion, but the batch has "
                f"{sorted(batch.columns)}; a reward function returns it by Scored(channels, columns)"
            )
        labels = batch.columns[stratum]
        labels = jnp.where(labels >= 0, labels, -1).astype(jnp.int32)
        values = stratified(total_reward(batch), batch.group_ids, labels, alpha=alpha, epsilon=epsilon)
        return batch.replace(advantages=per_decision(values, batch.completion_mask)), arrays

    return grpo(prompts=prompts, group_size=group_size, **options).replace(advantage=advantage)
