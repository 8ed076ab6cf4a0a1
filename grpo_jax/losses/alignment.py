"""A reference answer in the group: explore, imitate it, and push the two apart (GRAO)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import segments
from grpo_jax.losses.discriminative import _group_mean, _per_row, _rows

MEMBERS = ("joint", "outputs")


def alignment_coefficients(
    rewards: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    references: Bool[Array, "N"],
    *,
    beta: float = 0.5,
    lam: float = 0.6,
    members: str = "joint",
    epsilon: float = 1e-6,
    weights: Float[Array, "N"] | None = None,
) -> Float[Array, "N"]:
    """What GRAO's three terms come to for each row's log-likelihood.

    (1 + lam) A_i / G for an output, beta A_y - lam mean_i A_i for the reference, A = (R - mean) / (std + epsilon) with
    std over n; all 0 for a group whose members are rewarded alike, without a reference or without outputs.

    references: True for the row that is the reference answer (of several, each has its part). members: whom mean and
    std are taken over, "joint" outputs and reference, "outputs" without it. weights: c counts as c copies.
    Raises: ValueError for other members.
    Source: arXiv:2508.07750. Who the members are, epsilon and the zeros are reconstructed.
    """
    if members not in MEMBERS:
        raise ValueError(f"the members of the statistics are one of {MEMBERS}, got {members!r}")
    rewards, group_ids, weights = _rows(group_ids, weights, rewards=rewards)
    references = _per_row("references", references, len(rewards)).astype(bool)
    present = (weights > 0) & ~jnp.isnan(rewards)
    output, reference = present & ~references, present & references
    both = segments.has(output, group_ids) & segments.has(reference, group_ids)
    output, reference = output & both, reference & both
    member = output | reference if members == "joint" else output
    r = jnp.where(output | reference, rewards, 0)
    centred = r - _group_mean(r, group_ids, member, weights)
    deviation = jnp.sqrt(_group_mean(jnp.where(member, centred, 0) ** 2, group_ids, member, weights))
    spread = segments.maximum(r, group_ids, member) > segments.minimum(r, group_ids, member)
    advantage = jnp.where(spread & both, centred / (deviation + epsilon), 0)
    imitate = beta * advantage - lam * _group_mean(advantage, group_ids, output, weights)
    each = jnp.where(output, (1 + lam) * advantage, jnp.where(reference, imitate, 0))
    mass = jnp.where(output, segments.total(weights, group_ids, output), segments.total(weights, group_ids, reference))
    return jax.lax.stop_gradient(weights * each / jnp.where(mass > 0, mass, 1))


def group_alignment(
    scores: Float[Array, "N"],
    rewards: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    references: Bool[Array, "N"],
    *,
    beta: float = 0.5,
    lam: float = 0.6,
    members: str = "joint",
    epsilon: float = 1e-6,
    weights: Float[Array, "N"] | None = None,
) -> Float[Array, ""]:
    """GRAO's loss, a mean over groups of a weighted likelihood without ratio, clip or reference policy.

    -[(1/G) sum_i A_i s_i + beta A_y s_y + lam (1/G) sum_i A_i (s_i - s_y)], with the A of `alignment_coefficients`.

    scores: `mean_logp` of each row, the reference answer's under the policy itself. For one update per batch. A group
    that teaches nothing counts in the mean. Source: arXiv:2508.07750.
    """
    options = {"beta": beta, "lam": lam, "members": members, "epsilon": epsilon}
    coefficients = alignment_coefficients(rewards, group_ids, references, weights=weights, **options)
    scores, group_ids, weights = _rows(group_ids, weights, scores=scores)
    gained = jnp.sum(coefficients * jnp.where(coefficients != 0, scores, 0))
    return -gained / jnp.maximum(segments.number(group_ids, weights > 0), 1)
