"""Advantages within strata: completions of one prompt that differ in structure are compared with their like."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax import segments
from grpo_jax.advantages.group import _compared


def stratified(
    rewards: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    strata: Int[Array, "N"],
    *,
    alpha: float = 0.8,
    ddof: int = 0,
    epsilon: float = 1e-6,
) -> Float[Array, "N"]:
    """Stratified GRPO: the z-score within stratum and group (SAN), blended with the one within the whole group.

    A_i = alpha (r_i - mean_gs) / (std_gs + epsilon) + (1 - alpha) (r_i - mean_g) / (std_g + epsilon)

    The first term is exactly 0 for a stratum of one row or of equal rewards. With alpha = 1 nothing rewards a change
    of stratum; with one stratum per group this is GRPO.

    strata: any label >= 0 of the completion's structure (say its number of tool calls), made without looking at the
    reward; -1 = none, only the second term acts. alpha in [0, 1]: the sources name no value, nor ddof and epsilon.
    Raises: ValueError for alpha outside [0, 1] or shapes that differ. Source: arXiv:2510.06214.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha blends two advantages and lies in [0, 1], got {alpha}")
    if jnp.shape(strata) != jnp.shape(group_ids):
        given = f"strata {list(jnp.shape(strata))} for group_ids {list(jnp.shape(group_ids))}"
        raise ValueError(f"stratified needs one stratum per row, got {given}")
    rewards, group_ids = _compared(rewards, group_ids)
    alike = segments.join(group_ids, jnp.asarray(strata))
    within = segments.z_score(rewards, alike, ddof=ddof, epsilon=epsilon)
    whole = segments.z_score(rewards, group_ids, ddof=ddof, epsilon=epsilon)
    return alpha * within + (1 - alpha) * whole
