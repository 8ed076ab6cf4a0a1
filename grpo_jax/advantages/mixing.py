"""An outcome and a rubric in one reward, the rubric measured against the best of the group."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax import segments
from grpo_jax.advantages.group import _compared

RECEIVERS = ("correct", "wrong", "all")


def rubric_mixed(
    outcomes: Float[Array, "N"],
    rubrics: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    *,
    alpha: float = 0.3,
    to: str = "correct",
    relative: bool = True,
) -> Float[Array, "N"]:
    """C-GRPO's reward, which goes on to `group_z_score`. With u_i = rubric_i / max_g rubric (0 if the best is 0):

    to="correct": o_i ((1 - alpha) + alpha u_i), so that a rubric pays only where the answer is right;
    to="all": (1 - alpha) o_i + alpha u_i; to="wrong": o_i where o_i > 0, else alpha u_i (the paper's ablations).

    relative: False takes u_i = rubric_i, as the published code does in its "correct" form; True as in the paper.
    outcomes: 0 or 1; NaN = does not apply, and stays NaN, out of the group's best. rubrics: in [0, 1], >= 0; NaN = not
    judged: counts as 0. Rows with id -1 get 0.
    Raises: ValueError for alpha outside [0, 1], another `to`, or shapes that differ.
    Source: arXiv:2601.06021, and its code.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is the rubric's share, in [0, 1], got {alpha}")
    if to not in RECEIVERS:
        raise ValueError(f"a rubric goes to one of {RECEIVERS}, got {to!r}")
    if jnp.shape(outcomes) != jnp.shape(rubrics):
        raise ValueError(
            f"needs one outcome and one rubric per row, got {list(jnp.shape(outcomes))} and {list(jnp.shape(rubrics))}"
        )
    absent = jnp.isnan(outcomes)
    outcomes, group_ids = _compared(outcomes, group_ids)
    rubrics = jnp.where(jnp.isnan(rubrics) | (group_ids < 0), 0, rubrics).astype(jnp.float32)
    if relative:
        best = segments.maximum(rubrics, group_ids)
        rubrics = jnp.where(best > 0, rubrics / jnp.where(best > 0, best, 1), 0)
    mixed = {
        "correct": lambda: outcomes * ((1 - alpha) + alpha * rubrics),
        "all": lambda: (1 - alpha) * outcomes + alpha * rubrics,
        "wrong": lambda: jnp.where(outcomes > 0, outcomes, alpha * rubrics),
    }[to]()
    return jnp.where(absent, jnp.nan, jnp.where(group_ids < 0, 0, mixed))
