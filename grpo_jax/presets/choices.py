"""What several presets share: names with a fixed set of meanings, corrections for a sampler, whitening over tokens."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.advantages import per_decision, whiten_tokens
from grpo_jax.losses import mismatch, ratios

Meaning = TypeVar("Meaning")


def chosen(what: str, name: str | None, table: Mapping[str | None, Meaning]) -> Meaning:
    """The meaning of a name. Raises: ValueError naming the nearest one and all others."""
    if name not in table:
        known = [str(other) for other in table]
        near = difflib.get_close_matches(str(name), known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"there is no {what} {name!r}{hint} Known: {', '.join(known)}")
    return table[name]


def spread(advantages: Array, mask: Bool[Array, "N T"]) -> Float[Array, "N T"]:
    """Advantages [N] on every decision of their row; [N, T] as they are."""
    advantages = jnp.asarray(advantages)
    return per_decision(advantages, mask) if advantages.ndim == 1 else advantages


def reference(weight: float, ref_logps: Array | None, name: str) -> Array | None:
    """The reference's log-probs if the KL term has a weight. Raises: ValueError if they are missing then."""
    if isinstance(weight, (int, float)) and weight == 0:
        return None
    if ref_logps is None:
        raise ValueError(
            f"{name} is {weight} and needs ref_logps, the reference policy's log-probs; give 0 for no KL term"
        )
    return jnp.asarray(ref_logps)


def whole_sequence(
    logps: Float[Array, "N T"], old_logps: Float[Array, "N T"], mask: Bool[Array, "N T"]
) -> Float[Array, "N T"]:
    """exp(mean_t (logps_t - old_logps_t)), each entry with the row's whole gradient: GSPO, not straight-through."""
    return ratios.unit_geometric(logps, old_logps, mask, jnp.zeros(mask.shape, jnp.int32))


def corrections(
    kind: str,
    old_logps: Float[Array, "N T"],
    sampler_logps: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    low: float,
    high: float,
) -> Float[Array, "N T"]:
    """w_t = old / sampler: "tis" clipped to [low, high], "icepop" 0 outside, "seq-mask-tis" 0 by the geometric mean."""
    old_logps, sampler_logps = jnp.asarray(old_logps), jnp.asarray(sampler_logps)
    token = mismatch.token_importance(old_logps, sampler_logps)
    mean = jax.lax.stop_gradient(ratios.sequence_ratio(old_logps, sampler_logps, mask))
    return chosen(
        "correction",
        kind,
        {
            "tis": lambda: mismatch.capped(token, cap=high, floor=low),
            "icepop": lambda: mismatch.banded(token, low=low, high=high),
            "seq-mask-tis": lambda: jnp.where(mismatch.banded(mean, low=low, high=high) > 0, token, 0),
        },
    )()


def whitened(values: Float[Array, "N T"], mask: Bool[Array, "N T"], *, scale: bool = True) -> Float[Array, "N T"]:
    """(x - mean) / sqrt(max(variance, 1e-8)) over all decisions, variance over n; without `scale` only x - mean."""
    where = jnp.where(mask, values, 0)
    mean = jnp.sum(where) / jnp.maximum(jnp.sum(mask), 1)
    if not scale:
        return jnp.where(mask, where - mean, 0)
    unit = whiten_tokens(values, mask, ddof=0, epsilon=0.0)
    variance = jnp.sum(jnp.where(mask, where - mean, 0) ** 2) / jnp.maximum(jnp.sum(mask), 1)
    return unit * jnp.minimum(jnp.sqrt(variance / 1e-8), 1)
