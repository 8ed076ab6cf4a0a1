"""Multi-objective GRPO: several objectives in one fixed weighting, added up before or after they are normalised."""

from __future__ import annotations

import jax.numpy as jnp

from grpo_jax.advantages.channels import decoupled_over_rows, gate
from grpo_jax.advantages.group import group_z_score
from grpo_jax.advantages.shaping import combine, per_decision
from grpo_jax.methods.grpo import grpo, sequence_mean, weights_of
from grpo_jax.types import Method

MODES = ("sum_then_normalize", "normalize_then_sum")


def multi_objective_grpo(
    *,
    prompts: int,
    group_size: int,
    mode: str = "sum_then_normalize",
    gated_by: str | None = None,
    floor: float = 0.5,
    kl: float = 0.04,
    epsilon: float = 1e-4,
    **options,
) -> Method:
    """Each reward channel is an objective, with its weight in the configuration; one that does not apply is left out.

    mode: "sum_then_normalize", the paper's: R = sum_k w_k s_k, A = (R - mean) / (std + epsilon) within the group. Then
    the objective of the largest spread leads, whatever its weight. "normalize_then_sum": each objective's z-score in
    the group first, their weighted sum over the batch after (`decoupled_over_rows`).
    gated_by: the name of a channel (safety); where it is below `floor` the others count 0. Not in the paper.
    Mean over tokens, then over completions. The weights, KL coefficient and group size are reconstructed.
    Raises: ValueError for another mode, and at the first batch for a gate that no channel has the name of.
    Source: arXiv:2503.21819; both modes: TRL's GRPO trainer.
    """
    if mode not in MODES:
        raise ValueError(f"multi_objective_grpo's mode is one of {MODES}, got {mode!r}")

    def reward(batch, arrays, key):
        if gated_by is None:
            return batch.scores
        if gated_by not in batch.channels:
            raise ValueError(f"gated_by names a reward channel: there is no {gated_by!r} in {list(batch.channels)}")
        place = batch.channels.index(gated_by)
        gated = [gate(scores, batch.scores[:, place], at_least=floor) for scores in batch.scores.T]
        return jnp.stack(gated, axis=1).at[:, place].set(batch.scores[:, place])

    def advantage(batch, arrays, key):
        weights = weights_of(batch)
        if mode == "sum_then_normalize":
            scores = group_z_score(combine(batch.rewards, weights), batch.group_ids, epsilon=epsilon)
        else:
            scores = decoupled_over_rows(batch.rewards, batch.group_ids, weights, epsilon=epsilon)
        return batch.replace(advantages=per_decision(scores, batch.completion_mask)), arrays

    method = grpo(prompts=prompts, group_size=group_size, kl=kl, aggregate=sequence_mean, **options)
    return method.replace(reward=reward, advantage=advantage)
