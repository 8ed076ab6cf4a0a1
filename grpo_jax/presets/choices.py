"""What all presets share: names with a fixed set of meanings, and one advantage per row or per decision."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.advantages import per_decision

Meaning = TypeVar("Meaning")


def chosen(what: str, name: str, table: Mapping[str, Meaning]) -> Meaning:
    """The meaning of a name. Raises: ValueError naming the nearest one and all others."""
    if name not in table:
        near = difflib.get_close_matches(str(name), table, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"there is no {what} {name!r}{hint} Known: {', '.join(table)}")
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
