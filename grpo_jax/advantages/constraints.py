"""Faithful GRPO: qualities as constraints, each with a multiplier that rises while the batch falls short of a target.

The multipliers are an array [K], state to be kept: `dual_init` once; at each step `constrained` with those of the step
before, then `dual_update`. The advantage's form and all numbers are reconstructed (arXiv:2604.08476 by its abstract).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.advantages.group import group_z_score

NORMS = ("group", "batch")


def dual_init(count: int) -> Float[Array, "K"]:
    """Multipliers of `count` constraints before the first step: 0."""
    return jnp.zeros(count, jnp.float32)


def constrained(
    rewards: Float[Array, "N"],
    signals: Float[Array, "N K"],
    group_ids: Int[Array, "N"],
    duals: Float[Array, "K"],
    *,
    constraint_norm: str = "group",
    rescale: bool = False,
    epsilon: float = 1e-4,
) -> Float[Array, "N"]:
    """Task advantage plus each quality's own, weighed by its multiplier.

    A = z(r) + sum_k lambda_k z(r^k), z(x) = (x - mean) / (std + epsilon), ddof 1, each signal alone; with `rescale`
    divided by 1 + sum_k lambda_k. Reconstructed.

    signals: in [0, 1]; NaN = no verdict, outside that signal's statistics, and 0 in its term. Score malformed output 0
    in every signal. constraint_norm: "group" compares qualities within the prompt; "batch" over all rows, so that a
    group whose rows are all unfaithful is pushed down as one.
    Raises: ValueError for other shapes or another norm.
    """
    signals, group_ids, duals = _aligned(signals, group_ids, duals)
    if constraint_norm not in NORMS:
        raise ValueError(f"constraint_norm is one of {NORMS}, got {constraint_norm!r}")
    within = group_ids if constraint_norm == "group" else jnp.where(group_ids < 0, -1, 0)
    z_scores = jax.vmap(lambda x: group_z_score(x, within, epsilon=epsilon), in_axes=1, out_axes=1)(signals)
    combined = group_z_score(rewards, group_ids, epsilon=epsilon) + jnp.sum(duals * z_scores, axis=1)
    return combined / (1 + duals.sum()) if rescale else combined


def dual_update(
    duals: Float[Array, "K"],
    signals: Float[Array, "N K"],
    group_ids: Int[Array, "N"],
    *,
    targets: Float[Array, "K"] | Sequence[float],
    eta: float = 0.05,
    cap: float = 5.0,
) -> Float[Array, "K"]:
    """One dual step: lambda_k <- clip(lambda_k + eta (target_k - mean r^k), 0, cap).

    The mean is over every row of the global batch that has the signal (not NaN, id not -1); a signal that no row has
    leaves its multiplier. Raises: ValueError for other shapes, eta < 0, cap < 0.
    """
    for name, value in (("eta", eta), ("cap", cap)):
        if isinstance(value, (int, float)) and not value >= 0:
            raise ValueError(f"{name} is not negative (a dual step, a largest multiplier), got {value}")
    signals, group_ids, duals = _aligned(signals, group_ids, duals)
    targets = jnp.asarray(targets, jnp.float32)
    if targets.shape != duals.shape:
        raise ValueError(f"there is one target per multiplier, got {list(targets.shape)} for {list(duals.shape)}")
    given = ~jnp.isnan(signals) & (group_ids >= 0)[:, None]
    size = given.sum(axis=0)
    mean = jnp.sum(jnp.where(given, signals, 0), axis=0) / jnp.maximum(size, 1)
    return jnp.where(size > 0, jnp.clip(duals + eta * (targets - mean), 0, cap), duals)


def _aligned(signals: Array, group_ids: Array, duals: Array) -> tuple[Array, Array, Array]:
    signals, duals = jnp.asarray(signals).astype(jnp.float32), jnp.asarray(duals).astype(jnp.float32)
    group_ids = jnp.asarray(group_ids)
    if group_ids.ndim != 1 or duals.ndim != 1 or signals.shape != group_ids.shape + duals.shape:
        raise ValueError(
            "constraints need signals [N, K], group_ids [N] and duals [K], got "
            f"{list(signals.shape)}, {list(group_ids.shape)} and {list(duals.shape)}"
        )
    return signals, group_ids, duals
