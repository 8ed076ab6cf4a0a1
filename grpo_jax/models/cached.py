"""Keys and values that are kept, of contexts and of the rows' own tokens, and attention over both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.models.attention import MASKED, product, softcap
from grpo_jax.models.folding import folded
from grpo_jax.models.kernels import attend_newest, on_cpu, on_tpu


class KeysValues(NamedTuple):
    """Keys and values of all layers: of contexts [L, C, ...], or of the rows' own tokens in B blocks [L, B, S, N, ...].

    Heads come before tokens, and keys have their tokens last: both products of attention then read them as they lie.
    Blocks come before rows: one of them is read as it lies, too. Column t is the t % T-th of block t // T. There is
    room for N rows on each of S devices; when fewer are in hand [C, G], they have each device's first places.
    Few rows may have more columns than B blocks hold: `folding` says where those lie.
    """

    keys: Float[Array, "L *cells Hkv D T"]
    values: Float[Array, "L *cells Hkv T D"]


def block_columns(columns: int) -> int:
    """Columns of one block of own tokens, given how many there are in all."""
    if on_tpu():  # its kernel reads what is filled
        return columns
    return min(columns, 32 if on_cpu() else -(-columns // 512) * 128)


def arranged(keys: Float[Array, "*rows T Hkv D"], values: Float[Array, "*rows T Hkv D"]) -> tuple[Array, Array]:
    """Keys and values as they are computed, as one layer of `KeysValues`: [*rows, Hkv, D, T] and [*rows, Hkv, T, D]."""
    return jnp.moveaxis(keys, -3, -1), jnp.swapaxes(values, -3, -2)


def written(
    own: KeysValues,
    keys: Float[Array, "C G M Hkv D"],
    values: Float[Array, "C G M Hkv D"],
    layer: Int[Array, ""] | int,
    column: Int[Array, ""] | int,
) -> KeysValues:
    """The cache with M new tokens of one layer from `column` on: nothing else of it is touched."""
    (_, blocks, shards, *_, T), M = own.keys.shape, keys.shape[2]

    def put(kept: Array, new: Array, axis: int) -> Array:
        new = new.astype(kept.dtype).reshape(shards, -1, *new.shape[2:])
        if M == 1 or blocks == 1:
            block, place = folded(column // T, blocks, kept.shape[3])
            at = [layer, block, 0, place, 0, 0, 0]
            at[axis] = column % T
            return jax.lax.dynamic_update_slice(kept, new[None, None], [jnp.asarray(i, jnp.int32) for i in at])
        some = min(blocks, (M - 2) // T + 2)  # into which M columns fall, wherever they begin
        first = jnp.minimum(column // T, blocks - some)
        old = jnp.moveaxis(cut(kept, layer, first, some, new.shape[1]), 0, axis - 1)
        joined = old.reshape(*new.shape[:axis], some * T, *new.shape[axis:][1:])
        joined = jax.lax.dynamic_update_slice_in_dim(joined, new, column - first * T, axis)
        return _pasted(kept, jnp.moveaxis(joined.reshape(old.shape), axis - 1, 0), layer, first)

    keys, values = arranged(keys, values)
    return KeysValues(put(own.keys, keys, -1), put(own.values, values, -2))


def moved(
    own: KeysValues, rows: Int[Array, "S n"], before: int, filled: Int[Array, ""] | int, *, folds: int = 1
) -> KeysValues:
    """The cache with each device's rows of these numbers, of the `before` in hand, in its first n places.

    They move within the cache, block by block as far as columns are filled: there is no second one. folds: as for
    `attend_cached`.
    """
    layers, blocks, *_, T = own.keys.shape
    turns = 1 if blocks * folds == 1 else -(-filled // T)
    pick = jax.vmap(partial(jnp.take, axis=0, mode="clip"))

    def move(layer: Array, block: Array, own: KeysValues) -> KeysValues:
        picked = (pick(cut(x, layer, block, 1, before)[0], rows) for x in own)
        return KeysValues(*(_pasted(x, new[None], layer, block) for x, new in zip(own, picked)))

    return jax.lax.fori_loop(0, layers, lambda layer, own: jax.lax.fori_loop(0, turns, partial(move, layer), own), own)


def cut(
    kept: Float[Array, "L B S N *rest"], layer: Array | int, block: Array | int, blocks: int, rows: int
) -> Float[Array, "b S n *rest"]:
    """So many blocks of a layer, from `block` on, of each device's first rows."""
    block, place = folded(block, kept.shape[1], kept.shape[3])
    at = (layer, block, 0, place, *[0] * (kept.ndim - 4))
    return jax.lax.dynamic_slice(kept, at, (1, blocks, kept.shape[2], rows, *kept.shape[4:]))[0]


def _pasted(
    kept: Float[Array, "L B S N *rest"], part: Float[Array, "b S n *rest"], layer: Array | int, block: Array | int
) -> Float[Array, "L B S N *rest"]:
    """The inverse of `cut`."""
    block, place = folded(block, kept.shape[1], kept.shape[3])
    return jax.lax.dynamic_update_slice(kept, part[None], (layer, block, 0, place, *[0] * (kept.ndim - 4)))


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
    folds: int = 1,
) -> Float[Array, "C G S H D"]:
    """Causal grouped-query attention of new tokens over their context and over their row's own tokens.

    out = Σ_k w_k v_k / Σ_k w_k,  w_k = exp(cap(scale q·k)) where position_q - window < position_k ≤ position_q, else 0

    prefix, own: all layers, of which `layer` is read; of own those blocks that begin below column `filled`. Own column
    j stands at position prefix_lengths[c] + j, and every query sees at least its own. The context is one matrix product
    over the group; softmax is float32, of all keys together. On TPU a kernel reads what is filled. folds: `filled` may
    come to so many times the columns of the blocks (static).
    """
    C, G, S, H, D = queries.shape
    if S == 1 and on_tpu():
        only = KeysValues(*(x[:, 0] for x in own))
        far, near = ((jnp.swapaxes(kept.keys, -1, -2), kept.values) for kept in (prefix, only))
        options = {"scale": scale, "softcap": cap, "window": window, "folds": folds}
        return attend_newest(queries[:, :, 0], far, prefix_lengths, near, filled, layer, **options)[:, :, None]
    (_, blocks, shards, *_, T), P, kv_heads = own.keys.shape, prefix.keys.shape[-1], prefix.keys.shape[2]
    by_row = jnp.swapaxes(queries.reshape(C, G, S, kv_heads, H // kv_heads, D), 2, 3)  # [C, G, Hkv, S, R, D]
    here, start = positions[:, None, None, :, None, None], prefix_lengths[:, None, None, None, None, None]

    def masked(scores: Float[Array, "C *N K"], place: Int[Array, "#C *1 K"], there: Array | bool) -> Array:
        visible = there & (place <= here)
        if window is not None:
            visible &= place > here - window
        return jnp.where(visible, softcap(scores * scale, cap), MASKED)

    def context() -> Heard:
        keys, values = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in prefix)
        place = jnp.arange(P, dtype=jnp.int32)
        scores = product("ckgsrd,ckdp->ckgsrp", jnp.swapaxes(by_row, 1, 2), keys)
        scores = masked(scores, place, place < start)
        top = jnp.max(scores, axis=-1)
        weights = jnp.exp(scores - top[..., None])  # where nothing is seen, own columns make them 0
        heard = Heard(product("ckgsrp,ckpd->ckgsrd", weights, values), top, weights.sum(axis=-1))
        return Heard(*(jnp.swapaxes(x, 1, 2) for x in heard))

    def add(block: Array | int, heard: Heard) -> Heard:
        keys, values = (cut(x, layer, block, 1, C * G // shards).reshape(C, G, *x.shape[4:]) for x in own)
        place = start + block * T + jnp.arange(T, dtype=jnp.int32)
        scores = masked(product("cgksrd,cgkdt->cgksrt", by_row, keys), place, True)
        return heard.and_of(scores, values, mass=partial(jnp.sum, axis=-1))

    heard = context() if P else Heard.nothing(by_row)
    turns = -(-filled // T)
    if blocks * folds == 1:
        heard = add(0, heard)
    elif on_cpu():
        heard = jax.lax.fori_loop(0, turns, add, heard)
    else:  # a GPU's host would be asked before every turn of a loop whose turns it does not know
        known = [partial(jax.lax.fori_loop, 0, n, add) for n in range(1, blocks * folds + 1)]
        heard = jax.lax.switch(turns - 1, known, heard)
    out = heard.total / heard.mass[..., None]
    return jnp.swapaxes(out.astype(queries.dtype), 2, 3).reshape(queries.shape)


class Heard(NamedTuple):
    """Of every query, after some keys: Σ w v, the highest score, Σ w; with w = exp(score - highest score)."""

    total: Float[Array, "*N S R D"]
    top: Float[Array, "*N S R"]
    mass: Float[Array, "*N S R"]

    @classmethod
    def nothing(cls, queries: Float[Array, "*N S R D"]) -> Heard:
        zeros = jnp.zeros(queries.shape, jnp.float32)
        return cls(zeros, zeros[..., 0] + MASKED, zeros[..., 0])

    def and_of(
        self, scores: Float[Array, "*N S R K"], values: Float[Array, "*N K D"], *, mass: Callable[[Array], Array]
    ) -> Heard:
        """And some keys more, masked or not. mass: adds up weights over the last axis."""
        top = jnp.maximum(self.top, jnp.max(scores, axis=-1))
        shrunk, weights = jnp.exp(self.top - top), jnp.exp(scores - top[..., None])
        total = self.total * shrunk[..., None] + product("...srt,...td->...srd", weights, values)
        return Heard(total, top, self.mass * shrunk + mass(weights))
