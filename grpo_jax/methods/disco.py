"""DisCO: raise the scores of right completions above those of wrong ones, within a KL budget. A scalar objective."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.losses.discriminative import (
    DIVERGENCES,
    discriminative_loss,
    forward_divergence,
    kl_constraint,
    mean_logp,
    mean_ratio,
)
from grpo_jax.losses.ratios import token_ratio
from grpo_jax.methods.grpo import at_least, grpo, token_mean, total_reward
from grpo_jax.types import Batch, Decisions, Method

SCORES = {"logL": 10.0, "Lratio": 1.0}  # and the temperature that goes with each


def disco(
    *,
    prompts: int,
    group_size: int,
    score: str = "logL",
    tau: float | None = None,
    divergence: str = "kl",
    budget: float = 1e-4,
    penalty: float = 1e3,
) -> Method:
    """loss = sg(max(penalty (D - budget), 0)) D - J, J = 1/n_q sum_q [mean_right s - tau log mean_wrong exp(s / tau)].

    s is the mean log-prob of a completion ("logL") or the mean ratio ("Lratio"). D is the mean over all trained tokens
    of -d ("kl") or exp(d) - 1 - d ("low_var_kl"), d = log pi - log pi_old. Rewards are exactly 0 or 1; a group without
    both counts in n_q and adds nothing.
    tau: temperature over the wrong ones; default 10 for "logL", 1 for "Lratio"; inf for their plain mean (DisCO-b).
    Raises: ValueError for another score or divergence, or tau <= 0.
    Source: arXiv:2505.12366, eq. 7 and 10.
    """
    if score not in SCORES:
        raise ValueError(f"disco's score is one of {tuple(SCORES)}, got {score!r}")
    tau = SCORES[score] if tau is None else tau
    at_least(0, penalty=penalty)
    _check(tau, divergence)

    def objective(new, batch, arrays):
        old, mask = batch.old.logps, batch.completion_mask
        s = mean_logp(new.logps, mask) if score == "logL" else mean_ratio(new.logps, old, mask)
        loss = discriminative_loss(s, total_reward(batch), batch.group_ids, tau=tau, weights=batch.weights)
        return constrained(loss, new, batch, divergence=divergence, budget=budget, penalty=penalty)

    method = grpo(prompts=prompts, group_size=group_size, aggregate=token_mean)
    return method.replace(advantage=no_advantage, objective=objective)


def constrained(
    loss: Float[Array, ""], new: Decisions, batch: Batch, *, divergence: str, budget: float, penalty: float
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The discriminative loss with its KL constraint, and what to report of it."""
    old, mask = batch.old.logps, batch.completion_mask
    drift = forward_divergence(new.logps, old, mask, estimator=divergence, weights=batch.weights)
    reported = {"ratio": token_ratio(new.logps, old), "margin": jnp.broadcast_to(-loss, mask.shape)}
    return loss + kl_constraint(drift, budget=budget, penalty=penalty), reported


def no_advantage(batch: Batch, arrays, key):
    """None: the objective reads rewards and groups."""
    return batch.replace(advantages=jnp.zeros(batch.completion_mask.shape, jnp.float32)), arrays


def _check(tau: float, divergence: str) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is one of {DIVERGENCES}, got {divergence!r}")
    if not tau > 0:
        raise ValueError(f"tau is a temperature above 0 (inf: the plain mean), got {tau}")
