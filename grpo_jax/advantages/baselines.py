"""Further baselines for REINFORCE: weighted by length, scaled by how many rewards say something, or a greedy row's.

Ids lie in [0, N); a row with id -1 or a NaN reward is compared with nobody and gets 0, as does a group of one.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from grpo_jax import segments
from grpo_jax.advantages.group import _compared


def length_weighted(
    rewards: Float[Array, "N"], lengths: Num[Array, "N"], group_ids: Int[Array, "N"]
) -> Float[Array, "N"]:
    """OPO: over the baseline that leaves the least variance, if the gradient's squared norm grows with the length.

    A_i = r_i - sum_{j in g} L_j r_j / sum_{j in g} L_j; rows of length 0 do not weigh, nor does a group of them count.

    lengths: trained decisions of each row, not negative.
    Source: Hao et al. 2025 (arXiv:2505.23585).
    """
    rewards, group_ids = _compared(rewards, group_ids)
    lengths = _per_row("lengths", lengths, rewards).astype(jnp.float32)
    differences = segments.centered(rewards, group_ids)
    weight = segments.total(lengths, group_ids)
    drift = segments.total(lengths * differences, group_ids) / jnp.where(weight > 0, weight, 1)
    return jnp.where(weight > 0, differences - drift, 0)


def signal_scaled(rewards: Float[Array, "N"], group_ids: Int[Array, "N"]) -> Float[Array, "N"]:
    """GPG: centred within the group, and larger the fewer rows of the batch have a reward at all.

    A_i = (N / #{j: r_j != 0}) (r_i - mean_g), N the rows with a reward, all ids counted together.

    The factor keeps the gradient's size when few samples of the batch succeed. It reads 0 as failure, so it is not
    invariant to a shift of the rewards. All rewards 0: all advantages 0.
    Source: Chu et al. 2025 (arXiv:2504.02546), as verl computes the factor.
    """
    rewards, group_ids = _compared(rewards, group_ids)
    inside = group_ids >= 0
    scale = jnp.sum(inside) / jnp.maximum(jnp.sum(inside & (rewards != 0)), 1)
    return scale * segments.centered(rewards, group_ids)


def over_greedy(rewards: Float[Array, "N"], group_ids: Int[Array, "N"], greedy: Bool[Array, "N"]) -> Float[Array, "N"]:
    """ReMax: over the reward of the prompt's greedy completion, which depends on the policy but not on the sample.

    A_i = r_i - r_greedy(g); 0 for the greedy rows themselves and in a group that has none.

    greedy: the row of each group that was decoded at temperature 0 (the mean, where it has several).
    Source: Li et al. 2023 (arXiv:2310.10505).
    """
    rewards, group_ids = _compared(rewards, group_ids)
    greedy = _per_row("greedy", greedy, rewards).astype(bool)
    applies = ~greedy & (segments.count(group_ids, greedy) > 0)
    return jnp.where(applies, rewards - segments.mean(rewards, group_ids, greedy), 0)


def _per_row(name: str, values: Array, rewards: Array) -> Array:
    values = jnp.asarray(values)
    if values.shape != rewards.shape:
        raise ValueError(
            f"{name} must have one value per row, got {list(values.shape)} for {list(rewards.shape)} rewards"
        )
    return values
