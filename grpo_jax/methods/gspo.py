"""GSPO: one length-normalised ratio for the whole completion."""

from __future__ import annotations

from grpo_jax import losses
from grpo_jax.methods.grpo import clipped, grpo, sequence_mean
from grpo_jax.types import Method


def gspo(
    *,
    prompts: int,
    group_size: int,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    kl: float = 0.0,
    epsilon: float = 1e-6,
) -> Method:
    """s = exp(mean_t(log pi - log pi_old)); loss = max(-A s, -A clip(s, 1 - low, 1 + high)), mean over completions.

    Source: Zheng et al. 2025 (arXiv:2507.18071), eq. 5 and 7.
    """

    def objective(new, batch, arrays):
        ratio = losses.sequence_ratio(new.logps, batch.old.logps, batch.completion_mask)
        return clipped(ratio, new, batch, clip_low=clip_low, clip_high=clip_high, kl=kl)

    method = grpo(prompts=prompts, group_size=group_size, kl=kl, epsilon=epsilon, aggregate=sequence_mean)
    return method.replace(objective=objective)
