"""SAPO: a smooth gate in place of the clip, which closes faster on bad completions."""

from __future__ import annotations

from grpo_jax import losses
from grpo_jax.losses import surrogates
from grpo_jax.methods.grpo import grpo, sequence_mean
from grpo_jax.types import Method


def sapo(
    *,
    prompts: int,
    group_size: int,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    epsilon: float = 1e-6,
) -> Method:
    """loss = -A (4 / tau) sigmoid(tau (rho - 1)) per token, mean over completions of token means; no KL term.

    tau_positive, tau_negative: how sharply the gate closes where A > 0, and elsewhere.
    Source: Gao et al. 2025 (arXiv:2511.20347).
    """

    def objective(new, batch, arrays):
        ratio = losses.token_ratio(new.logps, batch.old.logps)
        loss = surrogates.sapo(ratio, batch.advantages, tau_positive=tau_positive, tau_negative=tau_negative)
        return loss, {"ratio": ratio}

    method = grpo(prompts=prompts, group_size=group_size, epsilon=epsilon, aggregate=sequence_mean)
    return method.replace(objective=objective)
