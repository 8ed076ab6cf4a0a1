"""CISPO: bound the importance weight, not the objective, so that every token keeps its gradient."""

from __future__ import annotations

from grpo_jax import losses
from grpo_jax.losses import surrogates
from grpo_jax.methods.grpo import grpo
from grpo_jax.types import Method


def cispo(
    *, prompts: int, group_size: int, clip_low: float = 1.0, clip_high: float = 4.0, epsilon: float = 1e-6
) -> Method:
    """loss = -sg[clip(rho, 1 - low, 1 + high)] A log pi per token, mean over the tokens of the mini-batch; no KL term.

    clip_low, clip_high: distance of the weight's bounds from 1; clip_low = 1 is no lower bound.
    Source: MiniMax-M1 2025 (arXiv:2506.13585).
    """

    def objective(new, batch, arrays):
        ratio = losses.token_ratio(new.logps, batch.old.logps)
        loss = surrogates.cispo(new.logps, ratio, batch.advantages, low=clip_low, high=clip_high)
        return loss, {"ratio": ratio, "clip_low": ratio < 1 - clip_low, "clip_high": ratio > 1 + clip_high}

    return grpo(prompts=prompts, group_size=group_size, epsilon=epsilon).replace(objective=objective)
