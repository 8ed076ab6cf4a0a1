"""Advantages around the group's median, which one lucky completion of a tiny group does not move."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import segments
from grpo_jax.advantages.group import _compared

SCALES = ("mad", "std", "none")


def median_centered(
    rewards: Float[Array, "N"], group_ids: Int[Array, "N"], *, scale: str = "mad", epsilon: float = 1e-3
) -> tuple[Float[Array, "N"], Bool[Array, "N"]]:
    """MC-GRPO: advantages around the lower median of the group, and the pivot: the one row per group to train without.

    A_i = (r_i - M_g) / (s_g + epsilon), M_g the reward at place floor((n - 1) / 2); the pivot is the first row at M_g.
    Sample one completion more than shall be trained, an odd number: of an even one the lower median favours A > 0.

    scale: s_g is "mad" the lower median of |r - M_g| (the paper's; 0 in every mixed group of binary rewards, where
    A becomes +-1 / epsilon), or "std" the standard deviation (ddof 1); "none" leaves r - M_g as it is.
    Raises: ValueError for another scale. Source: arXiv:2601.22582.
    """
    if scale not in SCALES:
        raise ValueError(f"the scale around the median is one of {SCALES}, got {scale!r}")
    if isinstance(epsilon, (int, float)) and not epsilon >= 0:
        raise ValueError(f"epsilon is added to a spread and is not negative, got {epsilon}")
    rewards, group_ids = _compared(rewards, group_ids)
    inside = group_ids >= 0
    centered = jnp.where(inside, rewards - segments.lower_median(rewards, group_ids), 0)
    pivot = segments.first(centered == 0, group_ids)
    if scale == "none":
        return centered, pivot
    if scale == "mad":
        spread = segments.lower_median(jnp.abs(centered), group_ids)
    else:
        spread = segments.std(rewards, group_ids, ddof=1)
    return centered / (spread + epsilon), pivot


def compensated(advantages: Float[Array, "N"], group_ids: Int[Array, "N"]) -> Float[Array, "N"]:
    """Advantages scaled up for the rows of the group that got none: A_i n_g / #{j in g: |A_j| > 1e-6}.

    What one of MC-GRPO's two published trainers (GSM8K) does before the pivot is dropped, which counts in n_g; the
    other (MATH) does not. Rows with id -1 get 0. Source: the code of arXiv:2601.22582.
    """
    advantages, group_ids = _compared(advantages, group_ids)
    counts = jnp.abs(advantages) > 1e-6
    share = segments.count(group_ids) / jnp.maximum(segments.count(group_ids, counts), 1)
    return jnp.where(group_ids < 0, 0, jnp.where(counts, advantages * share, advantages))
