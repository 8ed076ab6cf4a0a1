"""Rewards in stages, and a batch in which groups that teach nothing give way to copies of those that do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import segments
from grpo_jax.advantages.group import _compared, group_z_score


def staged_reward(
    parses: Bool[Array, "N"],
    well_formed: Bool[Array, "N"],
    quality: Float[Array, "N"],
    *,
    parsed: float = 0.1,
    formed: float = 0.2,
) -> Float[Array, "N"]:
    """Progressive reward shaping: passing a stage never pays less than failing it.

    r = 0 if the calls do not parse; `parsed` if they do but the whole is not well formed; else
    formed + (1 - formed) q. The levels and this form are reconstructed.

    quality: q in [0, 1], read only where both stages are passed; NaN there gives NaN.
    Raises: ValueError unless 0 <= parsed <= formed <= 1, or if shapes differ.
    Source: arXiv:2512.07478.
    """
    if not 0 <= parsed <= formed <= 1:
        raise ValueError(f"stages pay 0 <= parsed <= formed <= 1, got parsed {parsed}, formed {formed}")
    parses, well_formed, quality = map(jnp.asarray, (parses, well_formed, quality))
    if not parses.shape == well_formed.shape == quality.shape:
        raise ValueError(
            "needs two verdicts and one quality per row, got "
            f"{list(parses.shape)}, {list(well_formed.shape)} and {list(quality.shape)}"
        )
    passed = parses.astype(bool) & well_formed.astype(bool)
    top = formed + (1 - formed) * quality.astype(jnp.float32)
    return jnp.where(passed, top, jnp.where(parses.astype(bool), parsed, 0.0))


def task_values(
    rewards: Float[Array, "N"], group_ids: Int[Array, "N"], *, highest: float | None = 1.0
) -> Float[Array, "N"]:
    """What a group has to teach: V_g = (R_max - mean_g) std_g (ddof 1), for each of its rows.

    0 for a group of one or of equal rewards, for NaN rewards and ids of -1. At equal spread the harder group has more.

    highest: R_max, the best reward there is; None for the group's own best (the summaries of the paper leave it open).
    Source: arXiv:2512.07478.
    """
    rewards, group_ids = _compared(rewards, group_ids)
    best = segments.maximum(rewards, group_ids) if highest is None else highest
    above = jnp.maximum(best - segments.mean(rewards, group_ids), 0)
    return jnp.where(group_ids < 0, 0, above * segments.std(rewards, group_ids, ddof=1))


def value_counts(
    rewards: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    uniforms: Float[Array, "N"],
    *,
    highest: float | None = 1.0,
    threshold: float = 1e-8,
) -> Float[Array, "N"]:
    """How often each row stands in the batch once groups without spread have been replaced by others.

    Every group with std <= threshold gives its place to one drawn from the rest, with replacement, P(g) = V_g / sum V
    (`task_values`): 0 for rows of the replaced, 1 + times drawn for the rest. The counts are the weights of the rows;
    with groups of one size their sum is the number of rows. All are 1 where no group is left to draw from; rows in no
    group stay at 1. How replacements are drawn is reconstructed.

    uniforms: independent, in [0, 1); a group reads that of its first row, by inverse CDF over groups in row order.
    Source: arXiv:2512.07478.
    """
    scored, compared = _compared(rewards, group_ids)
    ids, uniforms = jnp.asarray(group_ids), jnp.asarray(uniforms).astype(jnp.float32)
    if uniforms.shape != scored.shape:
        raise ValueError(f"needs one uniform number per row, got {list(uniforms.shape)} for {list(scored.shape)} rows")
    # A row without a reward shares the fate of its group: both statistics are those of every row.
    values = segments.maximum(task_values(rewards, group_ids, highest=highest), ids)
    spread = segments.maximum(segments.std(scored, compared, ddof=1), ids)
    head = segments.first(ids >= 0, ids)
    replaced, source = head & (spread <= threshold), head & (spread > threshold) & (values > 0)
    cumulative = jnp.cumsum(jnp.where(source, values, 0))
    at = jnp.searchsorted(cumulative, jnp.where(replaced, uniforms, 0) * cumulative[-1], side="right")
    at = jnp.minimum(at, jnp.max(jnp.where(source, jnp.arange(len(ids)), 0)))  # 1 - 1e-9 is 1 in float32
    drawn = jax.ops.segment_sum(replaced.astype(jnp.float32), at, len(ids))
    counts = jnp.where(spread <= threshold, 0, 1 + segments.total(drawn, ids))
    return jnp.where((ids < 0) | ~source.any(), 1, counts)


def value_sampled(
    rewards: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    uniforms: Float[Array, "N"],
    *,
    power: float = 0.5,
    smallest: float = 0.0,
    highest: float | None = 1.0,
    threshold: float = 1e-8,
    epsilon: float = 1e-6,
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """VSPO: (advantages, counts), the advantages damped where their group stands in the batch more than once.

    A_i = z_i max(smallest, c_i^-power), z the group's z-score (`group_z_score`) and c `value_counts`, which multiply
    the rows' weights. power 0: no damping; 1: all copies of a group together weigh as much as it alone. The form of
    the damping is reconstructed; the paper also clips the products (`jnp.clip`).

    Raises: ValueError for power or smallest outside [0, 1].
    Source: arXiv:2512.07478.
    """
    if not (0 <= power <= 1 and 0 <= smallest <= 1):
        raise ValueError(f"power and smallest lie in [0, 1], got power {power}, smallest {smallest}")
    counts = value_counts(rewards, group_ids, uniforms, highest=highest, threshold=threshold)
    damping = jnp.maximum(smallest, jnp.maximum(counts, 1) ** -power)
    return group_z_score(rewards, group_ids, epsilon=epsilon) * damping, counts
