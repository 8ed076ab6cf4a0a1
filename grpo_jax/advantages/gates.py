"""Rewards that are paid only where something else holds: of the row, of its group, or of the rows before it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import segments
from grpo_jax.advantages.lengths import _check_rows


def posterior_process(process: Float[Array, "N"], gate: Float[Array, "N"]) -> Float[Array, "N"]:
    """What a score of the reasoning is paid: gate_i process_i, and 0 where the gate is 0, whatever `process` is there.

    gate: 1 where the outcome is right, 0 where it is wrong; NaN stays NaN. Where it is open, a NaN of `process` stays.
    Source: P-GRPO (arXiv:2508.05170), its posterior gate.
    """
    process, gate = (jnp.asarray(x).astype(jnp.float32) for x in (process, gate))
    _check_rows("posterior_process", process=process, gate=gate)
    shut = gate == 0
    return jnp.where(shut, 0, gate * jnp.where(shut, 0, process))


def posterior_reward(
    form: Float[Array, "N"],
    outcome: Float[Array, "N"],
    process: Float[Array, "N"],
    gate: Float[Array, "N"] | None = None,
) -> Float[Array, "N"]:
    """P-GRPO: R_i = form_i + outcome_i + gate_i process_i, the gate being the outcome unless one is given.

    form, outcome: 0 or 1. process in [0, 1]. gate in [0, 1]: the share of tests passed is the soft gate that the paper
    finds worse, ones are the ungated reward that can be hacked.
    Source: arXiv:2508.05170, its composite reward.
    """
    form, outcome = (jnp.asarray(x).astype(jnp.float32) for x in (form, outcome))
    _check_rows("posterior_reward", form=form, outcome=outcome, process=process)
    return form + outcome + posterior_process(process, outcome if gate is None else gate)


def top_groups(values: Float[Array, "N"], group_ids: Int[Array, "N"], *, fraction: float = 0.2) -> Bool[Array, "N"]:
    """Rows of the groups with the largest means: ceil(fraction B) of the B groups of the whole batch.

    Of groups with equal means the one that comes first in the batch is taken. A group counts in B if one of its rows
    has a value (not NaN). Under data parallelism gather first (`segments.across`), else each part picks its own.

    fraction: lambda in [0, 1]; 0 selects no group.
    Raises: ValueError for a fraction outside [0, 1].
    Source: GRPO-lambda (arXiv:2505.18086), its selection; rounding and order of ties are reconstructed.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"top_groups takes a fraction of the groups, in [0, 1]; got {fraction}")
    values = jnp.asarray(values).astype(jnp.float32)
    _check_rows("top_groups", values=values, group_ids=group_ids)
    counts = ~jnp.isnan(values)
    first = segments.first(counts, group_ids)  # one row stands for its group
    accuracy = segments.mean(values, group_ids, counts)
    place = segments.rank(-accuracy, jnp.where(first, 0, -1))
    # The product is rounded up in float64: in float32 0.1 times 30 groups may be a little more than 3.
    chosen = jnp.asarray(np.ceil(np.round(fraction * np.arange(len(values) + 1), 9)), jnp.float32)
    within = place < chosen[segments.number(group_ids, counts).astype(jnp.int32)]
    return segments.has(first & within, group_ids)


def serial_decay(
    correct: Float[Array, "N"], order: Float[Array, "N"], group_ids: Int[Array, "N"], *, base: float = 2.0
) -> Float[Array, "N"]:
    """S-GRPO: of answers given at successive exits of one chain of thought, the earlier right ones earn more.

    r_j = base^-(k_j) if right, else 0; k_j = how many right answers of the group come before j. Wrong answers do not
    make later ones cheaper. Goes with `group_centered`, whose mean it leaves undivided.

    correct: 1 or 0; NaN stays NaN and is not counted. order: where the exit lies, earliest first; equal ones in the
    order of the rows. Rows with id -1 get 0. base: 1 pays every right answer alike.
    Raises: ValueError for a base below 1.
    Source: arXiv:2505.07686.
    """
    if not base >= 1:
        raise ValueError(f"serial_decay divides the reward by `base` at each right answer, base >= 1; got {base}")
    correct, order = jnp.asarray(correct).astype(jnp.float32), jnp.asarray(order).astype(jnp.float32)
    _check_rows("serial_decay", correct=correct, order=order, group_ids=group_ids)
    right = (correct > 0.5) & (group_ids >= 0)
    before = segments.rank(order, group_ids, right)
    reward = jnp.where(right, jnp.float32(base) ** -before, 0)
    return jnp.where(jnp.isnan(correct) & (group_ids >= 0), jnp.nan, reward)
