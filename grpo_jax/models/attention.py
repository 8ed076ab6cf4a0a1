"""What every form of attention shares: positions, rotary embedding, soft-capping."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from grpo_jax.models.config import Rope

MASKED = -1e30  # finite: a part in which everything is masked must not give inf - inf
NOWHERE = np.iinfo(np.int32).max  # the position of a key that no query may see


def softcap(x: Float[Array, ...], cap: float | None) -> Float[Array, ...]:
    """cap · tanh(x / cap), or x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def product(letters: str, one: Float[Array, "..."], other: Float[Array, "..."]) -> Float[Array, "..."]:
    """An einsum in the dtype of the second, with sums and result in float32."""
    return jnp.einsum(letters, one.astype(other.dtype), other, preferred_element_type=jnp.float32)


def rotary_frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, "half"]:
    """Angular frequencies of the rotary embedding, θ^(-2i/D), stretched as `rope` says. Host only.

    Source: Su et al. 2021 (arXiv:2104.09864); the "llama3" stretching is that of the Llama 3.1 reference code.
    """
    frequencies = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_length * frequencies / (2 * math.pi)  # within the length it was first trained on
        keep = (turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency)
        keep = np.clip(keep, 0.0, 1.0)
        frequencies = keep * frequencies + (1 - keep) * frequencies / rope.factor
    return frequencies.astype(np.float32)


def rotate(
    x: Float[Array, "*N H D"], cosine: Float[Array, "*N #H half"], sine: Float[Array, "*N #H half"]
) -> Float[Array, "*N H D"]:
    """Rotate the pairs (x_i, x_{i+D/2}) by their angles, in float32."""
    one, two = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([one * cosine - two * sine, two * cosine + one * sine], axis=-1).astype(x.dtype)
