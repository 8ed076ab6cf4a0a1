"""GDPO: each reward is normalised in its group before they are added, and their sum over the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from grpo_jax.advantages.channels import decoupled_over_decisions, decoupled_over_rows, gate
from grpo_jax.advantages.shaping import per_decision
from grpo_jax.methods.grpo import grpo, weights_of
from grpo_jax.types import Method

WHITENING = ("rows", "decisions")


def gdpo(
    *,
    prompts: int,
    group_size: int,
    whitening: str = "rows",
    conditions: Mapping[str, Sequence] | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl: float = 0.0,
) -> Method:
    """A = whitened sum_k w_k z_k, z_k the z-score of reward channel k within the prompt, w_k the channel's weight.

    whitening: "rows", mean and standard deviation over the batch's completions (`decoupled_over_rows`, as published
    for TRL), or "decisions", over all of its tokens (`decoupled_over_decisions`, as published for verl).
    conditions: {easy: [hard, t]}, channel `easy` counts 0 where channel `hard` is below t (`gate`; reconstructed).
    With one channel it is GRPO brought to the batch's scale, where the published code falls back to GRPO itself.
    Raises: ValueError for another whitening, and with the batch for a condition on no channel.
    Source: arXiv:2601.05242.
    """
    if whitening not in WHITENING:
        raise ValueError(f"gdpo's whitening is one of {WHITENING}, got {whitening!r}")
    conditions = dict(conditions or {})
    if malformed := [k for k, pair in conditions.items() if isinstance(pair, str) or len(pair) != 2]:
        raise ValueError(
            f"a condition is {{easy: [hard, threshold]}}, got {malformed[0]}: {conditions[malformed[0]]!r}"
        )

    def reward(batch, arrays, key):
        scores = dict(zip(batch.channels, batch.scores.T))
        if unknown := [k for easy, (hard, _) in conditions.items() for k in (easy, hard) if k not in scores]:
            raise ValueError(f"gdpo's conditions name reward channels, got {unknown[0]!r} of {list(batch.channels)}")
        gated = {easy: gate(scores[easy], scores[hard], at_least=t) for easy, (hard, t) in conditions.items()}
        return jnp.stack([gated.get(k, scores[k]) for k in batch.channels], axis=1)

    def advantage(batch, arrays, key):
        weights = weights_of(batch)
        if whitening == "decisions":
            values = decoupled_over_decisions(batch.rewards, batch.group_ids, weights, batch.completion_mask)
        else:
            rows = decoupled_over_rows(batch.rewards, batch.group_ids, weights)
            values = per_decision(rows, batch.completion_mask)
        return batch.replace(advantages=values), arrays

    method = grpo(prompts=prompts, group_size=group_size, clip_low=clip_low, clip_high=clip_high, kl=kl)
    return method.replace(reward=reward, advantage=advantage)
