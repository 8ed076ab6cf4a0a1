"""A pair of prompts, one hard but solvable and one easy but brittle: which prompts are that, and how outcomes weigh.

Outcomes are 0 or 1 (NaN: does not apply). The source gives bands, the map to +1 / -failure and normalisation by group;
how `failure` is meant to survive that normalisation is not stated there, and the modes of `pair_advantages` and
`pair_z_score` are reconstructed readings of it.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax import segments
from grpo_jax.advantages.group import _compared, group_centered, group_z_score

NORMS = ("prompt_std", "prompt_mean", "post")


def success_bands(
    rates: Float[Array, "P"], *, group_size: int, width: int = 2
) -> tuple[Bool[Array, "P"], Bool[Array, "P"]]:
    """Which prompts are hard but solvable, and which easy but brittle, by their success rates.

    hard: 1/G <= p <= c/G;  easy: 1 - c/G <= p <= 1 - 1/G, G = group_size, c = width. Rates of 0 and 1 are neither.

    Raises: ValueError unless 1 <= width < group_size / 2 (the bands would meet). Source: arXiv:2602.03452.
    """
    if not 1 <= width < group_size / 2:
        raise ValueError(f"width is a number of successes, from 1 to less than half of {group_size}, got {width}")
    successes = jnp.asarray(rates).astype(jnp.float32) * group_size  # whole numbers, but for rounding
    slack = 1e-3
    hard = (successes >= 1 - slack) & (successes <= width + slack)
    easy = (successes >= group_size - width - slack) & (successes <= group_size - 1 + slack)
    return hard, easy


def pair_advantages(
    outcomes: Float[Array, "N"],
    group_ids: Int[Array, "N"],
    *,
    norm: str = "prompt_std",
    failure: float = 1.0,
    epsilon: float = 1e-6,
) -> Float[Array, "N"]:
    """Advantages of outcomes that are worth +1 and -failure, r = y - failure (1 - y), each prompt on its own.

    "prompt_std": (r - mean_g) / (std_g + epsilon), ddof 1. A success at rate p gets sqrt((1-p)/p), a failure
                  -sqrt(p/(1-p)), times sqrt((G-1)/G): the rare outcome is what counts, and `failure` does NOTHING
                  (but for epsilon), since a z-score undoes any change of two values into two others.
    "prompt_mean": r - mean_g = (1 + failure) (y - p): `failure` is a scale.
    "post": the z-score first, then negative advantages times `failure`.

    failure: lambda = w_- / w_+, above 0. Raises: ValueError for another norm or failure <= 0.
    Source: arXiv:2602.03452; "prompt_mean" and "post" are reconstructed.
    """
    if norm not in NORMS:
        raise ValueError(f"pair_advantages' norm is one of {NORMS}, got {norm!r}; `pair_z_score` joins a pair")
    _check_weight("failure", failure)
    outcomes = jnp.asarray(outcomes).astype(jnp.float32)
    rewards = outcomes - failure * (1 - outcomes)
    if norm == "prompt_mean":
        return group_centered(rewards, group_ids)
    scores = group_z_score(rewards, group_ids, epsilon=epsilon)
    return jnp.where(scores < 0, failure * scores, scores) if norm == "post" else scores


def pair_z_score(
    outcomes: Float[Array, "N"],
    pair_ids: Int[Array, "N"],
    hard: Bool[Array, "N"],
    *,
    common: float = 1.0,
    epsilon: float = 1e-6,
) -> Float[Array, "N"]:
    """Advantages by role, over the statistics of both prompts of a pair: the rare outcome of each is worth 1.

    r = y - common (1 - y) on the hard prompt, r = common y - (1 - y) on the easy one; A = (r - mean) / (std + epsilon),
    ddof 1, over all rows of the pair. With common = 1 nothing is left of rarity: r is +-1 for all.

    pair_ids: like group ids, one for both prompts. hard: rows of the hard prompt. common: above 0.
    Raises: ValueError for common <= 0 or shapes that differ. Reconstructed from arXiv:2602.03452.
    """
    _check_weight("common", common)
    outcomes, pair_ids = _compared(outcomes, pair_ids)
    hard = jnp.asarray(hard).astype(bool)
    if hard.shape != outcomes.shape:
        raise ValueError(f"`hard` has one entry per row, got {list(hard.shape)} for {list(outcomes.shape)}")
    rewards = jnp.where(hard, outcomes - common * (1 - outcomes), common * outcomes - (1 - outcomes))
    return segments.z_score(rewards, pair_ids, epsilon=epsilon)


def _check_weight(name: str, weight: float) -> None:
    if isinstance(weight, (int, float)) and not weight > 0:
        raise ValueError(f"{name} is how much an outcome weighs beside 1 and must be above 0, got {weight}")
