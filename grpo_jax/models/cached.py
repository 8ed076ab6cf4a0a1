"""Keys and values that are kept, of contexts and of the rows' own tokens, and attention over both."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.models.attention import MASKED, softcap
from grpo_jax.models.kernels import attend_newest, on_tpu

STAGES = 4  # widths at which a row's own keys and values are read: an eighth more than is filled, on average


class KeysValues(NamedTuple):
    """Keys and values of all layers: of contexts [L, C, ...], or of the rows' own tokens [L, C, G, ...].

    Heads come before tokens, and keys have their tokens last: both products of attention then read them as they lie.
    """

    keys: Float[Array, "L C *rows Hkv D T"]
    values: Float[Array, "L C *rows Hkv T D"]


def arranged(keys: Float[Array, "*rows T Hkv D"], values: Float[Array, "*rows T Hkv D"]) -> tuple[Array, Array]:
    """Keys and values as they are computed, as one layer of `KeysValues`: [*rows, Hkv, D, T] and [*rows, Hkv, T, D]."""
    return jnp.moveaxis(keys, -3, -1), jnp.swapaxes(values, -3, -2)


def written(
    own: KeysValues,
    keys: Float[Array, "C G S Hkv D"],
    values: Float[Array, "C G S Hkv D"],
    layer: Int[Array, ""] | int,
    column: Int[Array, ""] | int,
) -> KeysValues:
    """The cache with new tokens of one layer in columns column..column+S-1: nothing else of it is touched."""
    zero = jnp.zeros((), jnp.int32)
    keys, values = (x.astype(own.keys.dtype)[None] for x in arranged(keys, values))
    return KeysValues(
        jax.lax.dynamic_update_slice(own.keys, keys, (layer, zero, zero, zero, zero, column)),
        jax.lax.dynamic_update_slice(own.values, values, (layer, zero, zero, zero, column, zero)),
    )


def attend_cached(
    queries: Float[Array, "C G S H D"],
    positions: Int[Array, "C S"],
    prefix: KeysValues,
    prefix_lengths: Int[Array, " C"],
    own: KeysValues,
    layer: Int[Array, ""] | int,
    filled: Int[Array, ""] | int,
    *,
    scale: float,
    cap: float | None = None,
    window: Int[Array, ""] | int | None = None,
) -> Float[Array, "C G S H D"]:
    """Causal grouped-query attention of new tokens over their context and over their row's own tokens.

    out = Σ_k w_k v_k / Σ_k w_k,  w_k = exp(cap(scale q·k)) where position_q - window < position_k ≤ position_q, else 0

    prefix, own: all layers, of which `layer` is read; own up to column `filled` and not much further. Own column j
    stands at position prefix_lengths[c] + j, and every query sees at least its own. The context is one matrix product
    over the group; softmax is float32, joined by the common maximum. On TPU a kernel reads what is filled.
    """
    C, G, S, H, D = queries.shape
    if S == 1 and on_tpu():
        far, near = ((jnp.swapaxes(kept.keys, -1, -2), kept.values) for kept in (prefix, own))
        options = {"scale": scale, "softcap": cap, "window": window}
        return attend_newest(queries[:, :, 0], far, prefix_lengths, near, filled, layer, **options)[:, :, None]
    kv_heads, width, T = prefix.keys.shape[2], prefix.keys.shape[-1], own.keys.shape[-1]
    grouped = queries.reshape(C, G, S, kv_heads, H // kv_heads, D).transpose(0, 3, 1, 2, 4, 5)  # [C, Hkv, G, S, R, D]
    here = positions[:, None, None, :, None, None]

    def weigh(scores: Array, places: Int[Array, "C K"], there: Array) -> tuple[Array, Array, Array]:
        scores = softcap(scores * scale, cap)
        visible = there & (places <= here)
        if window is not None:
            visible &= places > here - window
        scores = jnp.where(visible, scores, MASKED)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)  # of a context that nothing of is seen the common maximum makes 0
        return weights, top[..., 0], weights.sum(axis=-1)

    def shared() -> tuple[Array, Array, Array]:
        keys, values = _layer(prefix, layer, width)
        scores = jnp.einsum("ckgsrd,ckdp->ckgsrp", grouped, keys, preferred_element_type=jnp.float32)
        place = jnp.arange(width, dtype=jnp.int32)
        inside = (place < prefix_lengths[:, None])[:, None, None, None, None, :]
        weights, top, mass = weigh(scores, place, inside)
        return _mixed("ckgsrp,ckpd->ckgsrd", weights, values), top, mass

    def mine(columns: int) -> tuple[Array, Array, Array]:
        keys, values = _layer(own, layer, columns)
        query = jnp.swapaxes(grouped, 1, 2)
        scores = jnp.einsum("cgksrd,cgkdt->cgksrt", query, keys, preferred_element_type=jnp.float32)
        place = prefix_lengths[:, None, None, None, None, None] + jnp.arange(columns, dtype=jnp.int32)
        weights, top, mass = weigh(scores, place, jnp.asarray(True))
        mixed = _mixed("cgksrt,cgktd->cgksrd", weights, values)
        return tuple(jnp.swapaxes(x, 1, 2) for x in (mixed, top, mass))

    widths = _widths(T)
    stage = sum((jnp.asarray(filled) > w).astype(jnp.int32) for w in widths[:-1])
    branches = [lambda w=w: mine(w) for w in widths]
    mixed, top, mass = branches[0]() if len(widths) == 1 else jax.lax.switch(stage, branches)
    if width:
        also, other, more = shared()
        highest = jnp.maximum(top, other)
        one, two = jnp.exp(top - highest), jnp.exp(other - highest)
        mixed, mass = mixed * one[..., None] + also * two[..., None], mass * one + more * two
    out = (mixed / mass[..., None]).astype(queries.dtype)
    return out.transpose(0, 2, 3, 1, 4, 5).reshape(C, G, S, H, D)


def _mixed(product: str, weights: Array, values: Array) -> Array:
    return jnp.einsum(product, weights.astype(values.dtype), values, preferred_element_type=jnp.float32)


def _layer(kept: KeysValues, layer: Array | int, columns: int) -> tuple[Array, Array]:
    """The first tokens of one layer."""
    keys, values = kept
    key_sizes = (1, *keys.shape[1:-1], columns)
    value_sizes = (1, *values.shape[1:-2], columns, values.shape[-1])
    cut = lambda x, sizes: jax.lax.dynamic_slice(x, (layer, *[0] * (x.ndim - 1)), sizes)[0]  # noqa: E731
    return cut(keys, key_sizes), cut(values, value_sizes)


def _widths(T: int) -> list[int]:
    """The widths of the stages, in whole steps of 128 columns; one stage where there are no more."""
    step = -(-T // (STAGES * 128)) * 128
    return [min(w, T) for w in range(step, T + step, step)]
