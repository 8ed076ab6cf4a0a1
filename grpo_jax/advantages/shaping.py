"""From reward channels to one reward, and from one value per row to one per decision."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def combine(rewards: Float[Array, "N K"], weights: Float[Array, "K"] | Sequence[float]) -> Float[Array, "N"]:
    """Weighted sum of the channels that apply: r_i = sum_k w_k r_ik over r_ik that are not NaN; NaN if none applies.

    Raises: ValueError if there is not one weight per channel.
    """
    rewards, weights = jnp.asarray(rewards).astype(jnp.float32), jnp.asarray(weights, jnp.float32)
    if rewards.ndim != 2 or weights.shape != rewards.shape[1:]:
        raise ValueError(
            f"combine needs rewards [N, K] and K weights, got {list(rewards.shape)} and {list(weights.shape)}"
        )
    applies = ~jnp.isnan(rewards)
    total = jnp.sum(jnp.where(applies, weights * jnp.where(applies, rewards, 0), 0), axis=1)
    return jnp.where(applies.any(axis=1), total, jnp.nan)


def soft_overlong(lengths: Int[Array, "N"], *, maximum: int, buffer: int) -> Float[Array, "N"]:
    """DAPO's soft punishment of long completions, to be added to the reward.

    clip((maximum - buffer - L) / buffer, -1, 0): 0 up to maximum - buffer, then linear down to -1 at maximum.

    lengths, maximum, buffer: decisions (tokens), never characters.
    Raises: ValueError unless 0 < buffer <= maximum.
    Source: Yu et al. 2025 (arXiv:2503.14476), eq. 13.
    """
    if not 0 < buffer <= maximum:
        raise ValueError(
            f"soft_overlong punishes the last `buffer` of `maximum` tokens and needs 0 < buffer <= maximum, "
            f"got buffer {buffer}, maximum {maximum}"
        )
    return jnp.clip((maximum - buffer - jnp.asarray(lengths)).astype(jnp.float32) / buffer, -1, 0)


def per_decision(values: Float[Array, "N"], mask: Bool[Array, "N T"]) -> Float[Array, "N T"]:
    """A row's value on each of its decisions: x_i where m_it, 0 where masked out."""
    values, mask = jnp.asarray(values).astype(jnp.float32), jnp.asarray(mask).astype(bool)
    if mask.ndim != 2 or values.shape != mask.shape[:1]:
        raise ValueError(
            f"per_decision needs values [N] and a mask [N, T], got {list(values.shape)} and {list(mask.shape)}"
        )
    return jnp.where(mask, values[:, None], 0)
