"""GMPO: the geometric mean of a completion's token ratios, each clipped on the side where it would gain."""

from __future__ import annotations

from grpo_jax import losses
from grpo_jax.losses import surrogates
from grpo_jax.methods.grpo import grpo, sequence_mean
from grpo_jax.types import Method


def gmpo(
    *, prompts: int, group_size: int, clip_low: float = 0.4, clip_high: float = 0.4, epsilon: float = 1e-6
) -> Method:
    """loss = -A exp(mean_t d'_t) per completion, d' = log rho clipped to [-low, high] on one side; no KL term.

    clip_low, clip_high: in log space; a token's ratio counts as at most e^high (A > 0), at least e^-low (A < 0).
    Source: Zhao et al. 2025 (arXiv:2507.20673).
    """

    def objective(new, batch, arrays):
        a, mask = batch.advantages, batch.completion_mask
        ratio = losses.token_ratio(new.logps, batch.old.logps)
        loss = surrogates.gmpo(new.logps, batch.old.logps, a, mask, low=clip_low, high=clip_high)
        gain = new.logps - batch.old.logps
        return loss, {
            "ratio": ratio,
            "clip_low": (a < 0) & (gain < -clip_low),
            "clip_high": (a > 0) & (gain > clip_high),
        }

    method = grpo(prompts=prompts, group_size=group_size, epsilon=epsilon, aggregate=sequence_mean)
    return method.replace(objective=objective)
