"""Advantages from comparison within a group: [N] rewards and [N] group ids in, [N] out.

Ids lie in [0, N); a row with id -1 is compared with nobody. A NaN reward (nothing applied to the row) is outside every
statistic. Both get advantage 0, as does a group of one or of equal rewards (`keep_singletons` for another reading).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
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
    return segments.centered(rewards, group_ids)


def batch_scaled(
    rewards: Float[Array, "N"], group_ids: Int[Array, "N"], *, ddof: int = 1, epsilon: float = 1e-4
) -> Float[Array, "N"]:
    """Group mean, but the spread of the whole batch: every prompt's differences keep their size.

    A_i = (r_i - mean_g) / (std over all rows + epsilon); the rewards' std, not that of the differences.

    ddof, epsilon: TRL's, `scale_rewards="batch"`. (`whiten_rows` of `group_centered` divides by the std of the
    differences, as ms-swift does for REINFORCE++.)
    """
    rewards, group_ids = _compared(rewards, group_ids)
    spread = segments.std(rewards, jnp.where(group_ids < 0, -1, 0), ddof=ddof)
    return segments.centered(rewards, group_ids) / jnp.where(spread > 0, spread + epsilon, 1)


def leave_one_out(rewards: Float[Array, "N"], group_ids: Int[Array, "N"]) -> Float[Array, "N"]:
    """RLOO: advantage over the mean of the others, which is independent of the row and so leaves no bias.

    A_i = r_i - mean_{j != i, g_j = g_i} r_j; 0 for a group of one.

    Source: Ahmadian et al. 2024 (arXiv:2402.14740), section 3.
    """
    rewards, group_ids = _compared(rewards, group_ids)
    size = segments.count(group_ids)
    return segments.centered(rewards, group_ids) * size / jnp.maximum(size - 1, 1)


def keep_singletons(
    advantages: Float[Array, "N"], rewards: Float[Array, "N"], group_ids: Int[Array, "N"]
) -> Float[Array, "N"]:
    """Advantages in which a row that is alone in its group has its reward, as if it were compared with 0.

    verl's reading of a group of one, in all its estimators but the vectorised; the others here say 0: a reward that is
    compared with nothing pushes up whatever was sampled. Rows without a reward or with id -1 stay as they are.
    """
    rewards, group_ids = _compared(rewards, group_ids)
    advantages = jnp.asarray(advantages).astype(jnp.float32)
    if advantages.shape != rewards.shape:
        given = f"got {list(advantages.shape)} and rewards {list(rewards.shape)}"
        raise ValueError(f"keep_singletons needs an advantage per row, {given}")
    return jnp.where(segments.count(group_ids) == 1, rewards, advantages)


def _compared(rewards: Array, group_ids: Array) -> tuple[Float[Array, "N"], Int[Array, "N"]]:
    """Rewards without NaN, and ids of -1 where there was one."""
    rewards, group_ids = jnp.asarray(rewards).astype(jnp.float32), jnp.asarray(group_ids)
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            "a group is compared by one reward and one id per row, got rewards "
            f"{list(rewards.shape)} and group_ids {list(group_ids.shape)}; `combine` sums channels [N, K] to [N]"
        )
    at_hand = not isinstance(group_ids, jax.core.Tracer) and getattr(group_ids, "is_fully_addressable", True)
    highest = np.asarray(group_ids).max(initial=-1) if at_hand else -1
    if highest >= group_ids.size:
        raise ValueError(
            f"group ids lie in [0, N), here N = {group_ids.size} (-1: compared with nobody), got {highest}; "
            "segments.join makes such ids of any numbers"
        )
    absent = jnp.isnan(rewards)
    return jnp.where(absent, 0, rewards), jnp.where(absent, -1, group_ids)
