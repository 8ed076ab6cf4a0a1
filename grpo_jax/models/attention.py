"""Attention over a context that a group shares and over each row's own tokens, joined in one softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from grpo_jax.models.config import Rope

NOWHERE = np.iinfo(np.int32).max  # the position of a key that no query may see
_MASKED = -1e30  # finite: a part in which everything is masked must not give inf - inf


class Part(NamedTuple):
    """Keys and values at positions. Shared by the G rows of a context ([C, K, Hkv, D]) or each row's own
    ([C, G, K, Hkv, D]); `positions` says where a key stands, NOWHERE hides it."""

    keys: Float[Array, "C K Hkv D"] | Float[Array, "C G K Hkv D"]
    values: Float[Array, "C K Hkv D"] | Float[Array, "C G K Hkv D"]
    positions: Int[Array, "C K"]


def attend(
    queries: Float[Array, "C G S H D"],
    positions: Int[Array, "C S"],
    parts: Sequence[Part],
    *,
    scale: float,
    softcap: float | None = None,
    window: Int[Array, ""] | int | None = None,
) -> Float[Array, "C G S H D"]:
    """Causal grouped-query attention over the union of the parts.

    out = Σ_k w_k v_k / Σ_k w_k,  w_k = exp(cap(scale q·k)) where position_q - window < position_k ≤ position_q, else 0

    The sums run over all parts; each part contributes its own sums, taken against one common maximum. A shared part is
    one matrix product over all G*S queries of a context and is never repeated. Softmax is float32. Every query must
    see at least one key (its own).
    """
    C, G, S, H, D = queries.shape
    kv_heads = parts[0].keys.shape[-2]
    grouped = queries.reshape(C, G, S, kv_heads, H // kv_heads, D)
    parts = [part for part in parts if part.positions.shape[1] > 0]
    scores = [_scores(grouped, positions, part, scale, softcap, window) for part in parts]
    tops = [_rows(jax.lax.stop_gradient(jnp.max(s, axis=-1)), part) for s, part in zip(scores, parts)]
    top = tops[0]
    for other in tops[1:]:
        top = jnp.maximum(top, other)
    total, mass = 0.0, 0.0
    for s, part in zip(scores, parts):
        shared = part.keys.ndim == 4
        weights = jnp.exp(s - (top.transpose(0, 2, 1, 3, 4) if shared else top)[..., None])
        mixed = jnp.einsum(
            "ckgsrp,cpkd->ckgsrd" if shared else "cgksrt,cgtkd->cgksrd",
            weights.astype(part.values.dtype),
            part.values,
            preferred_element_type=jnp.float32,
        )
        total += _rows(mixed, part)
        mass += _rows(jnp.sum(weights, axis=-1), part)
    out = (total / mass[..., None]).astype(queries.dtype)
    return out.transpose(0, 1, 3, 2, 4, 5).reshape(C, G, S, H, D)


def _scores(
    grouped: Float[Array, "C G S Hkv R D"],
    positions: Int[Array, "C S"],
    part: Part,
    scale: float,
    softcap_at: float | None,
    window: Int[Array, ""] | int | None,
) -> Float[Array, ...]:
    """Masked float32 scores in the order the matrix product leaves them: [C, Hkv, G, S, R, K] for a shared part,
    [C, G, Hkv, S, R, K] for an own one. Transposing them would cost more than the product."""
    shared = part.keys.ndim == 4
    scores = jnp.einsum(
        "cgskrd,cpkd->ckgsrp" if shared else "cgskrd,cgtkd->cgksrt",
        grouped,
        part.keys,
        preferred_element_type=jnp.float32,
    )
    scores = softcap(scores * scale, softcap_at)
    there, here = part.positions[:, None, :], positions[:, :, None]
    visible = there <= here
    if window is not None:
        visible &= there > here - window
    return jnp.where(visible[:, None, None, :, None, :], scores, _MASKED)


def _rows(x: Array, part: Part) -> Array:
    """[C, Hkv, G, ...] of a shared part as [C, G, Hkv, ...]."""
    return jnp.swapaxes(x, 1, 2) if part.keys.ndim == 4 else x


def softcap(x: Float[Array, ...], cap: float | None) -> Float[Array, ...]:
    """cap · tanh(x / cap), or x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


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
