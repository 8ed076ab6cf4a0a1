"""From rewards per decision to what is still to come: discounted returns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def discounted_returns(
    rewards: Float[Array, "N T"], mask: Bool[Array, "N T"], *, gamma: float = 1.0, across_gaps: bool = False
) -> Float[Array, "N T"]:
    """Reward from each decision onwards.

    R_t = r_t + gamma R_{t+1} over the masked-in decisions, 0 elsewhere. A masked-out stretch between two masked-in ones
    (what a tool said) ends the sum: nothing that comes after it counts for what came before (verl's code). With
    `across_gaps` it is passed over, as if it were not there: neither a reward nor a step of discount.

    gamma: in [0, 1]. Whatever lies under the mask does no harm.
    Raises: ValueError for rewards and mask of different shapes, or gamma outside [0, 1].
    Source: REINFORCE++, Hu et al. 2025 (arXiv:2501.03262), as in verl.
    """
    rewards, mask = jnp.asarray(rewards), jnp.asarray(mask).astype(bool)
    if mask.ndim != 2 or rewards.shape != mask.shape:
        raise ValueError(
            f"discounted_returns needs a reward for each decision, rewards and mask [N, T], got {list(rewards.shape)} "
            f"and {list(mask.shape)}; `at_last` puts one reward per row on its last decision"
        )
    if isinstance(gamma, (int, float)) and not 0 <= gamma <= 1:
        raise ValueError(f"gamma is a discount in [0, 1], got {gamma}")
    rewards = jnp.where(mask, rewards, 0).astype(jnp.float32)
    carried = jnp.where(mask, gamma, 1.0 if across_gaps else 0.0).astype(jnp.float32)

    def onwards(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        return earlier[0] * later[0], earlier[1] + earlier[0] * later[1]

    _, returns = jax.lax.associative_scan(onwards, (carried, rewards), reverse=True, axis=1)
    return jnp.where(mask, returns, 0)


def at_last(values: Float[Array, "N"], mask: Bool[Array, "N T"]) -> Float[Array, "N T"]:
    """One value per row as a reward for its last masked-in decision, 0 for the others; nothing for a row without any.

    Raises: ValueError unless there is one value per row of the mask [N, T].
    """
    values, mask = jnp.asarray(values).astype(jnp.float32), jnp.asarray(mask).astype(bool)
    if mask.ndim != 2 or values.shape != mask.shape[:1]:
        raise ValueError(f"at_last needs values [N] and a mask [N, T], got {list(values.shape)} and {list(mask.shape)}")
    later = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]  # masked-in decisions from here on
    return jnp.where(mask & (later == 1), values[:, None], 0)
