"""Truncated importance sampling between the program that sampled and the program that trains, for any method."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from grpo_jax import losses
from grpo_jax.types import Batch, Decisions, Method, PyTree


def corrected(method: Method, *, cap: float | None) -> Method:
    """The method with the loss of each sampled decision times w = min(pi_old / pi_sampler, cap); None: the method.

    w is a constant; 1 where nothing was sampled. Denominators stay. `importance` is reported: w's mean.

    Raises: ValueError in jit if the method has one loss for the whole batch.
    Source: as for `losses.capped`.
    """
    if cap is None:
        return method

    def objective(new: Decisions, batch: Batch, arrays: PyTree) -> tuple[Array, dict[str, Array]]:
        loss, reported = method.objective(new, batch, arrays)
        if loss.ndim == 0:
            raise ValueError(
                f"training.importance_cap is {cap}, which weighs the loss of each token, but the method has one loss "
                "for the whole batch: leave it out (null)"
            )
        sampler = jnp.where(jnp.isnan(batch.behavior_logps), jnp.nan, batch.sampler_logps)
        weights = losses.truncated_importance(batch.old.logps, sampler, cap=cap)
        return loss * weights, {**reported, "importance": weights}

    return method.replace(objective=objective)


def uncorrected(precision: str | None, *, cap: float | None) -> str:
    """What to say at the start of a run whose rollouts come from rounded weights and are trained on as they are."""
    if precision is None or cap is not None:
        return ""
    return (
        f"sampling with {precision} weights and no correction for the gap to the trained policy (gap_mean, gap_kl in "
        "the metrics): training.importance_cap=2 corrects for it"
    )
