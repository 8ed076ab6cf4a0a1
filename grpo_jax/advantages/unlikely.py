"""Rewards that depend on how likely the policy found a completion."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax import segments
from grpo_jax.advantages.group import _compared

FORMS = ("code", "paper")


def discount_likely(
    rewards: Float[Array, "N"],
    likelihoods: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    *,
    penalty: float = 0.25,
    form: str = "code",
) -> Float[Array, "N"]:
    """Unlikeliness reward: of the right completions of a group the likely ones earn less.

    "code": R_i (1 - penalty k_i / G).  "paper": R_i (1 - penalty (k_i + 1) / G).  k_i in 0..G-1 is the place of the
    row's likelihood in ascending order among ALL rows of the group, right and wrong; ties by row number.

    rewards: not negative, 0 for wrong. likelihoods: mean log-prob per decision under the policy that sampled
    (`losses.mean_logp`; the sum would call long completions unlikely); a row with NaN there is not ranked and keeps its
    reward, as does a row with id -1. Drop groups without wrong rows first: in them only likelihood would be compared.
    Raises: ValueError for another form, a penalty outside [0, 1], or shapes that differ.
    Source: He et al. 2025 (arXiv:2506.02355), and its code, which is the default and differs by penalty / G.
    """
    if form not in FORMS:
        raise ValueError(f"discount_likely's form is one of {FORMS}, got {form!r}")
    if isinstance(penalty, (int, float)) and not 0 <= penalty <= 1:
        raise ValueError(f"penalty is the share that the likeliest loses and lies in [0, 1], got {penalty}")
    likelihoods = jax.lax.stop_gradient(jnp.asarray(likelihoods).astype(jnp.float32))
    given = jnp.asarray(rewards).astype(jnp.float32)
    if likelihoods.shape != given.shape:
        raise ValueError(
            f"each reward needs its row's likelihood, got rewards {list(given.shape)} and likelihoods "
            f"{list(likelihoods.shape)}"
        )
    rewards, group_ids = _compared(given, group_ids)
    ranked = (group_ids >= 0) & ~jnp.isnan(likelihoods)
    place = segments.rank(jnp.where(ranked, likelihoods, 0), group_ids, ranked)
    share = (place + (form == "paper")) / jnp.maximum(segments.count(group_ids, ranked), 1)
    return jnp.where(ranked, rewards * (1 - penalty * share), given)
