"""Advantages from comparison within a group: [N] rewards and [N] group ids in, [N] out.

Ids lie in [0, N); a row with id -1 is compared with nobody. A NaN reward (nothing applied to the row) is outside every
statistic. Both get advantage 0, as does a group of one or of equal rewards.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax import segments


def group_z_score(
    rewards: Float[Array, "N"], group_ids: Int[Array, "N"], *, ddof: int = 1, epsilon: float = 1e-6
) -> Float[Array, "N"]:
    """GRPO: reward in standard deviations from the group's mean.

    A_i = (r_i - mean_g) / (std_g + epsilon), std over n - ddof; exactly 0 for a group of one or of equal rewards.

    ddof, epsilon: verl 1, 1e-6; TRL 1, 1e-4.
    Source: Shao et al. 2024 (arXiv:2402.03300), section 4.1.2.
    """
    rewards, group_ids = _compared(rewards, group_ids)
    return segments.z_score(rewards, group_ids, ddof=ddof, epsilon=epsilon)


def group_centered(rewards: Float[Array, "N"], group_ids: Int[Array, "N"]) -> Float[Array, "N"]:
    """Dr. GRPO: A_i = r_i - mean_g, without the division that makes easy and hard prompts count more.

    Goes with `losses.fixed_length`. Source: Liu et al. 2025 (arXiv:2503.20783), section 3.2.
    """
    rewards, group_ids = _compared(rewards, group_ids)
    return jnp.where(group_ids < 0, 0, rewards - segments.mean(rewards, group_ids))


def leave_one_out(rewards: Float[Array, "N"], group_ids: Int[Array, "N"]) -> Float[Array, "N"]:
    """RLOO: advantage over the mean of the others, which is independent of the row and so leaves no bias.

    A_i = r_i - mean_{j != i, g_j = g_i} r_j; 0 for a group of one.

    Source: Ahmadian et al. 2024 (arXiv:2402.14740), section 3.
    """
    rewards, group_ids = _compared(rewards, group_ids)
    others = segments.count(group_ids) > 1
    return jnp.where(others, rewards - segments.leave_one_out_mean(rewards, group_ids), 0)


def _compared(rewards: Array, group_ids: Array) -> tuple[Float[Array, "N"], Int[Array, "N"]]:
    """Rewards without NaN, and ids of -1 where there was one."""
    rewards, group_ids = jnp.asarray(rewards).astype(jnp.float32), jnp.asarray(group_ids)
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            "a group is compared by one reward and one id per row, got rewards "
            f"{list(rewards.shape)} and group_ids {list(group_ids.shape)}; `combine` sums channels [N, K] to [N]"
        )
    absent = jnp.isnan(rewards)
    return jnp.where(absent, 0, rewards), jnp.where(absent, -1, group_ids)
