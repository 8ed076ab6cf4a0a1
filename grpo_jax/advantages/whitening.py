"""Whitening over the whole batch: mean 0 and variance 1 over rows or over decisions, and REINFORCE++ on top of it.

The statistics are those of all rows at hand. Inside `shard_map` they must be those of all devices: `segments.across`.
What is all equal, or a single value, becomes exactly 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.advantages.group import _compared, group_centered
from grpo_jax.advantages.returns import discounted_returns
from grpo_jax.advantages.shaping import per_decision


def whiten_rows(
    values: Float[Array, "N"], where: Bool[Array, "N"] | None = None, *, ddof: int = 1, epsilon: float = 1e-4
) -> Float[Array, "N"]:
    """(x - mean) / (std + epsilon) over all rows; 0 for rows left out by `where` and for NaN, outside every statistic.

    epsilon: 1e-4 in TRL's RLOO (`normalize_advantages`) and ms-swift's REINFORCE++ (which does not subtract the mean
    again: that of `group_centered` is 0 already).
    Raises: ValueError unless there is one value per row.
    """
    values = jnp.asarray(values)
    where = jnp.ones(values.shape, bool) if where is None else jnp.asarray(where).astype(bool)
    if values.ndim != 1 or values.shape != where.shape:
        raise ValueError(f"whiten_rows needs one value per row, got {list(values.shape)} and where {list(where.shape)}")
    deviation, variance, spread = _moments(values, where & ~jnp.isnan(values), ddof)
    return jnp.where(spread, deviation / (jnp.sqrt(variance) + epsilon), 0)


def whiten_tokens(
    values: Float[Array, "N T"], mask: Bool[Array, "N T"], *, ddof: int = 1, epsilon: float = 1e-8
) -> Float[Array, "N T"]:
    """(x - mean) / sqrt(variance + epsilon) over all masked-in decisions of the batch, so that long rows weigh more.

    0 where masked out. Rows to be left out of the statistics are left out by their mask.
    Raises: ValueError for values and mask that are not both [N, T].
    Source: verl, with ddof 1.
    """
    values, mask = jnp.asarray(values), jnp.asarray(mask).astype(bool)
    if mask.ndim != 2 or values.shape != mask.shape:
        raise ValueError(
            f"whiten_tokens needs values and mask [N, T], got {list(values.shape)} and {list(mask.shape)}; "
            "`per_decision` spreads a value per row over its decisions"
        )
    deviation, variance, spread = _moments(values, mask, ddof)
    return jnp.where(spread, deviation / jnp.sqrt(variance + epsilon), 0)


def reinforce_plus_plus(
    rewards: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    gamma: float = 1.0,
    across_gaps: bool = False,
    epsilon: float = 1e-8,
) -> Float[Array, "N T"]:
    """REINFORCE++: returns over rewards per decision, whitened over all decisions of the batch. Prompts do not matter.

    A_t = (R_t - mean) / sqrt(variance + epsilon),  R_t = sum_{u >= t} gamma^(u - t) r_u.

    rewards: usually the row's reward on its last decision (`at_last`), less beta (old - ref) on each. A row with a NaN
    under its mask is in no statistic and gets 0. mask, gamma, across_gaps: as in `discounted_returns`.
    Source: Hu et al. 2025 (arXiv:2501.03262), as in verl.
    """
    rewards, mask = jnp.asarray(rewards), jnp.asarray(mask).astype(bool)
    if rewards.shape == mask.shape and mask.ndim == 2:
        mask = mask & ~jnp.any(mask & jnp.isnan(rewards), axis=1, keepdims=True)
    returns = discounted_returns(rewards, mask, gamma=gamma, across_gaps=across_gaps)
    return whiten_tokens(returns, mask, epsilon=epsilon)


def reinforce_plus_plus_baseline(
    rewards: Float[Array, "N"], group_ids: Int[Array, "N"], mask: Bool[Array, "N T"], *, epsilon: float = 1e-8
) -> Float[Array, "N T"]:
    """REINFORCE++-baseline: the distance from the group's mean on each decision, whitened over those of the batch.

    A_it = (d_i - mean) / sqrt(variance + epsilon),  d_i = r_i - mean_g.

    A row with id -1 or a NaN reward is in no statistic and gets 0. A group of one has d = 0 and does count (verl:
    d = r, which is `keep_singletons` before `whiten_tokens`).
    Source: Hu et al. 2025 (arXiv:2501.03262), as in verl.
    """
    compared = _compared(rewards, group_ids)[1] >= 0
    mask = jnp.asarray(mask).astype(bool)
    differences = per_decision(group_centered(rewards, group_ids), mask)
    return whiten_tokens(differences, mask & compared[:, None], epsilon=epsilon)


def _moments(values: Array, where: Array, ddof: int) -> tuple[Array, Float[Array, ""], Array]:
    """Deviations from the mean of all values, their variance (1 if that is 0), and where there is something to scale.

    Sums are taken axis by axis, from the last, and of distances from the minimum: a million values of the same size
    would otherwise lose their last digits one after the other.
    """
    values = values.astype(jnp.float32)
    low = jax.lax.stop_gradient(jnp.min(values, initial=jnp.inf, where=where))
    size = jnp.sum(where).astype(jnp.float32)
    shifted = jnp.where(where, values - jnp.where(size > 0, low, 0), 0)
    deviation = jnp.where(where, shifted - _total(shifted) / jnp.maximum(size, 1), 0)
    variance = _total(deviation**2) / jnp.maximum(size - ddof, 1)
    return deviation, jnp.where(variance > 0, variance, 1), where & (variance > 0)


def _total(values: Array) -> Float[Array, ""]:
    for _ in range(values.ndim):
        values = values.sum(-1)
    return values
