"""Advantages that do not vanish where every completion fails."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax import segments
from grpo_jax.advantages.group import _compared

ROUNDING = 1e-6  # a sum of channels that should be r_max may miss it by this much of it


def with_virtual_best(
    rewards: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    *,
    r_max: float = 1.0,
    n_v: int = 1,
    epsilon: float = 1e-6,
) -> Float[Array, "N"]:
    """NGRPO: z-score in the group together with n_v imagined completions of reward r_max.

    A_i = (r_i - mu') / (sigma' + epsilon), mu' and sigma' (ddof 1) over {r_j in g} and n_v times r_max

    A group of n wrong ones gets -1 / sqrt(n + 1) each (r_max 1, n_v 1); one where all have r_max gets 0. Sums over a
    group are negative by design, so do not whiten afterwards.

    r_max: the highest reward there is; above it signs are wrong. A group of one gets 0 (the published code's reading is
    that of `keep_singletons`).
    Raises: ValueError for n_v < 0. Source: arXiv:2509.18851.
    """
    if n_v < 0:
        raise ValueError(f"n_v is a number of imagined completions, 0 or more, got {n_v}")
    best = jnp.asarray(r_max, jnp.result_type(float, rewards)).astype(jnp.float32)  # as the rewards are rounded
    rewards, group_ids = _compared(rewards, group_ids)
    n, mean = segments.count(group_ids), segments.mean(rewards, group_ids)
    size = jnp.maximum(n + n_v, 1)
    # Both around the mean of the real ones, which is exact for equal rewards: then best alone decides, 0 included.
    lift = (best - mean) * n_v / size
    squares = n * segments.variance(rewards, group_ids) + n * lift**2 + n_v * (best - mean - lift) ** 2
    centered = rewards - mean - lift
    variance = squares / jnp.maximum(n + n_v - 1, 1)
    spread = (n > 1) & (variance > (ROUNDING * best) ** 2)
    sigma = jnp.sqrt(jnp.where(spread, variance, 1))
    return jnp.where(spread, centered / (sigma + epsilon), 0)


def weighted_signs(
    rewards: Float[Array, "N"], group_ids: Int[Array, "N"], *, positive: float = 0.1, negative: float = 1.0
) -> Float[Array, "N"]:
    """REINFORCE with weights for right and wrong completions: A_i = positive r_i - negative (1 - r_i); no baseline.

    (1, 0): only right ones push (PSR); (0, 1): only wrong ones do (NSR); (0.1, 1): the weighted form.

    rewards: 0 or 1; group ids only say which rows take part (>= 0). What arXiv:2509.18851 compares NGRPO with.
    """
    rewards, group_ids = _compared(rewards, group_ids)
    return jnp.where(group_ids < 0, 0, positive * rewards - negative * (1 - rewards))
