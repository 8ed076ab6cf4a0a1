"""What the formulas of this room that act decision by decision share: one shape, float32, quiet gradients."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def aligned(**arrays: Array) -> list[Float[Array, "..."]]:
    """The arrays in float32, in the order given. Raises: ValueError if their shapes differ."""
    shapes = {name: jnp.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(
            f"these arrays must have one shape, got {given}; spread a value per row with advantages.per_decision"
        )
    return [jnp.asarray(array).astype(jnp.float32) for array in arrays.values()]


def constant(advantages: Array) -> Array:
    """Advantages as constants of the objective; what is not finite becomes NaN."""
    return jax.lax.stop_gradient(jnp.where(jnp.isfinite(advantages), advantages, jnp.nan))


def where_finite(formula: Callable[..., Array], *arrays: Array) -> Array:
    """The formula where all its arguments are finite, NaN elsewhere.

    A NaN that counts must be seen in the loss; one that aggregation leaves out must not reach the gradient. Zero times
    the NaN derivative of the formula would, so the formula never sees it.
    """
    finite = jnp.stack([jnp.isfinite(array) for array in arrays]).all(0)
    return jnp.where(finite, formula(*(jnp.where(finite, array, 0) for array in arrays)), jnp.nan)
