"""How decisions weigh in the loss: weights [N, T] from data alone, so that the loss is sum_it w_it l_it.

They are made once for the whole mini-batch and carry its denominator; any cut of them into micro-batches or over a mesh
then adds up to the same loss and gradient. Inside `shard_map`, where only a device's own rows are at hand, `axis_name`
names the mesh axes that divide the rows: the denominator is summed over them, and so is the loss, by the caller.

`weights` [N] says how much a row counts: 0 not at all, c as often as c copies of it, in the denominator too. Rows
without a masked-in decision are left out of the number of sequences. If nothing counts, all weights are 0.

In each docstring c_i is the weight of row i, m_it the mask, L_i = sum_t m_it. Further forms are compositions:
    LUSPO, a sequence's loss times its length    sequence_sum with `sequence_ratio`
    Dr. GRPO as verl sums it, over rows too      weights[:, None] * mask / length
    the sum over a mini-batch's rows             n * sequence_sum, n the number of rows
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import segments
from grpo_jax.losses.elementwise import aligned

Axis = str | tuple[str, ...] | None


def token_mean(weights: Float[Array, "N"], mask: Bool[Array, "N T"], *, axis_name: Axis = None) -> Float[Array, "N T"]:
    """Every decision counts the same: w_it = c_i m_it / sum_j c_j L_j.

    Source: DAPO, Yu et al. 2025 (arXiv:2503.14476), eq. 8.
    """
    share, mask = _counting(weights, mask)
    return _spread(share[:, None], jnp.sum(share * mask.sum(-1)), mask, axis_name)


def sequence_mean(
    weights: Float[Array, "N"], mask: Bool[Array, "N T"], *, axis_name: Axis = None
) -> Float[Array, "N T"]:
    """Every sequence counts the same, the mean over sequences of token means: w_it = c_i m_it / (L_i sum_j c_j).

    Source: GRPO, Shao et al. 2024 (arXiv:2402.03300), eq. 3; GSPO, Zheng et al. 2025 (arXiv:2507.18071), eq. 5.
    """
    share, mask = _counting(weights, mask)
    return _spread((share / jnp.maximum(mask.sum(-1), 1))[:, None], share.sum(), mask, axis_name)


def sequence_sum(
    weights: Float[Array, "N"], mask: Bool[Array, "N T"], *, axis_name: Axis = None
) -> Float[Array, "N T"]:
    """Mean over sequences of the sum over decisions: w_it = c_i m_it / sum_j c_j. The REINFORCE and RLOO form."""
    share, mask = _counting(weights, mask)
    return _spread(share[:, None], share.sum(), mask, axis_name)


def fixed_length(
    weights: Float[Array, "N"], mask: Bool[Array, "N T"], *, length: float, axis_name: Axis = None
) -> Float[Array, "N T"]:
    """`sequence_sum` over a constant length in place of each sequence's own: w_it = c_i m_it / (length sum_j c_j).

    length: decisions, the same at every step, usually the completion budget (not this batch's longest).
    Raises: ValueError for length <= 0.
    Source: Dr. GRPO, Liu et al. 2025 (arXiv:2503.20783), section 3.2.
    """
    if isinstance(length, (int, float)) and not length > 0:
        raise ValueError(f"length is a number of decisions above 0, got {length}")
    return sequence_sum(weights, mask, axis_name=axis_name) / length


def unit_mean(
    weights: Float[Array, "N"], mask: Bool[Array, "N T"], unit_ids: Int[Array, "N T"], *, axis_name: Axis = None
) -> Float[Array, "N T"]:
    """Every unit (a rank, a turn, a step) counts the same, and within it every decision.

    w_it = c_i m_it / (n_u sum_j c_j U_j), n_u the masked-in decisions of t's unit u, U_j the units of row j that have
    any. One unit per row is `sequence_mean`, a unit per decision `token_mean`.

    unit_ids: in [0, T) within a row, -1 for no unit, which gets no weight.
    Raises: ValueError unless there is one id per decision.
    """
    mask, unit_ids = jnp.asarray(mask).astype(bool), jnp.asarray(unit_ids)
    if unit_ids.shape != mask.shape:
        raise ValueError(f"unit_ids must have one id per decision, got {list(unit_ids.shape)} for {list(mask.shape)}")
    share, mask = _counting(weights, mask & (unit_ids >= 0))
    size = jax.vmap(segments.count)(unit_ids, mask)
    units = jax.vmap(segments.number)(unit_ids, mask)
    return _spread(share[:, None] / jnp.maximum(size, 1), jnp.sum(share * units), mask, axis_name)


def weighted_sum(losses: Float[Array, "N T"], weights: Float[Array, "N T"]) -> Float[Array, ""]:
    """sum_it w_it l_it over w_it > 0. What has no weight, NaN included, reaches neither value nor gradient."""
    losses, weights = aligned(losses=losses, weights=weights)
    return jnp.sum(jnp.where(weights > 0, weights * losses, 0))


def without_truncated(mask: Bool[Array, "N T"], finished: Bool[Array, "N"]) -> Bool[Array, "N T"]:
    """The mask without the rows that ran out of budget (DAPO's overlong filtering).

    Their rewards still enter the group's statistics; only the loss leaves them out.
    Source: Yu et al. 2025 (arXiv:2503.14476), section 3.4.
    """
    mask, finished = jnp.asarray(mask).astype(bool), jnp.asarray(finished).astype(bool)
    _check_rows("finished", finished, mask)
    return mask & finished[:, None]


def _counting(weights: Array, mask: Array) -> tuple[Float[Array, "N"], Bool[Array, "N T"]]:
    """Row weights, 0 for empty rows, and the mask."""
    weights, mask = jnp.asarray(weights).astype(jnp.float32), jnp.asarray(mask).astype(bool)
    _check_rows("weights", weights, mask)
    return jnp.where(mask.any(-1), weights, 0), mask


def _spread(share: Array, whole: Float[Array, ""], mask: Bool[Array, "N T"], axis_name: Axis) -> Float[Array, "N T"]:
    whole = whole if axis_name is None else jax.lax.psum(whole, axis_name)
    return jnp.where(mask, share / jnp.where(whole > 0, whole, 1), 0)


def _check_rows(name: str, rows: Array, mask: Array) -> None:
    if mask.ndim != 2 or rows.shape != mask.shape[:1]:
        raise ValueError(
            f"{name} must have one entry per row of the mask [N, T], got {list(rows.shape)} for {list(mask.shape)}"
        )
