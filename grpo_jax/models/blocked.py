"""Attention for training: rows behind a shared context, a block of queries at a time, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.attention import MASKED, product

KEPT = "kept"  # the name of what a layer keeps for its backward pass
_BANDS, _NARROWEST = 8, 64  # keys above the diagonal are skipped in so many steps, of so many queries at least
_FEW = 8  # queries; fewer are added up one by one, because XLA:CPU calls a kernel for every matrix however small
_SCORES_TO_QUERIES = 4  # of the memory of a block's scores to that of all queries; the same however rows are divided


def blocked_attention(
    queries: Float[Array, "C G S H D"],
    keys: Float[Array, "C G T Hkv D"],
    values: Float[Array, "C G T Hkv D"],
    context: tuple[Float[Array, "C P Hkv D"], Float[Array, "C P Hkv D"]] | None,
    lengths: Int[Array, "C"],
    *,
    scale: float,
    softcap: float | None = None,
    window: Int[Array, ""] | int | None = None,
    start: Int[Array, ""] | None = None,
) -> Float[Array, "C G S H D"]:
    """Causal grouped-query attention of every row over its context and its own tokens; column j of a row stands at
    lengths[c] + j.

    out = Σ_k w_k v_k / Σ_k w_k,  w_k = exp(cap(scale q·k)) where position_q - window < position_k ≤ position_q, else 0

    The scores of one block of queries exist at a time. The backward pass computes them again, from the inputs, the
    output and log Σ w. Scores above the diagonal are mostly left out; a context's keys are one matrix product over all
    rows. Softmax and sums are float32.

    context: keys and values; those at or beyond lengths[c] are not seen and may be NaN. None for none.
    start: the queries are the columns from there on; None: all columns. Nothing above the diagonal is then left out.
    Source: Dao 2023 (arXiv:2307.08691) for what the backward pass needs.
    """
    C, G, S, H, D = queries.shape
    T, kv_heads, P = keys.shape[2], keys.shape[3], 0 if context is None else context[0].shape[1]
    grouped = queries.reshape(C, G, S, kv_heads, H // kv_heads, D).transpose(0, 3, 1, 2, 4, 5)
    own = tuple(x.transpose(0, 3, 1, 2, 4) for x in (keys, values))
    if P:
        there = (jnp.arange(P) < lengths[:, None])[..., None, None]
        # 0 times NaN would be NaN
        context = tuple(jnp.where(there, x, 0).transpose(0, 2, 1, 3)[:, :, None] for x in context)
    blocks = _blocks(S, int(_SCORES_TO_QUERIES * S * D / (P + T)), _BANDS if start is None else 1)
    options = _Options(scale, softcap, H // kv_heads, blocks)
    grouped = grouped.reshape(C, kv_heads, G, -1, D)
    out = _attention(options, grouped, own, context if P else None, (lengths, window, start))
    return out.reshape(C, kv_heads, G, S, -1, D).transpose(0, 2, 3, 1, 4, 5).reshape(queries.shape)


class _Options(NamedTuple):
    scale: float
    softcap: float | None
    repeats: int  # query heads per key head; they lie beside the queries
    blocks: tuple[tuple[int, int, int], ...]  # bands of queries: first, number, cuts


class _Part(NamedTuple):
    """Keys that a block of queries may see, in g sets for the rows: one per row, or one for all."""

    keys: Float[Array, "C Hkv g K D"]
    values: Float[Array, "C Hkv g K D"]
    seen: Bool[Array, "#C 1 1 #M K"]

    def rows(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.keys.shape[2], -1, x.shape[-1])


def _blocks(T: int, most: int, bands: int) -> tuple[tuple[int, int, int], ...]:
    """Bands of queries, each cut evenly into blocks of at most `most`."""
    width = -(-T // max(1, min(bands, T // _NARROWEST)))
    cut = [(first, min(width, T - first)) for first in range(0, T, width)]
    return tuple(
        (first, size, next(n for n in range(1, size + 1) if size % n == 0 and size // n <= max(most, 1)))
        for first, size in cut
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: _Options, queries: Array, own: tuple, context: tuple | None, place: tuple) -> Array:
    return _forward(options, queries, own, context, place)[0]


def _forward(options: _Options, queries: Array, own: tuple, context: tuple | None, place: tuple):
    def block(_: None, first, size: int, end: int):
        (q,), parts = _at(options, first, size, queries), _parts(options, first, size, end, own, context, place)
        scores = [_scores(options, q, part)[0] for part in parts]
        tops = [s.max(axis=-1).reshape(q.shape[:-1]) for s in scores]
        top = functools.reduce(jnp.maximum, tops)[..., None]
        out, mass = jnp.float32(0), jnp.float32(0)
        for s, part in zip(scores, parts):
            weights = jnp.exp(s - part.rows(top))
            mass += weights.sum(axis=-1).reshape(top.shape)
            out += product("ckgmt,ckgtd->ckgmd", weights, part.values).reshape(q.shape)
        return None, ((out / mass).astype(queries.dtype), top + jnp.log(mass))

    out, normalizer = (checkpoint_name(x, KEPT) for x in _sweep(options, block, None)[1])
    return out, (queries, own, context, place, out, normalizer)


def _backward(options: _Options, kept: tuple, slope: Array):
    queries, own, context, place, out, normalizer = kept
    along = jnp.sum(slope.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)

    def block(sums: list[tuple], first, size: int, end: int):
        q, pull, norm, mean = _at(options, first, size, queries, slope, normalizer, along)
        d_q, added = jnp.float32(0), []
        for part, (d_keys, d_values) in zip(_parts(options, first, size, end, own, context, place), sums):
            scores, bend = _scores(options, q, part)
            weights = jnp.exp(scores - part.rows(norm))
            d_weights = product("ckgmd,ckgtd->ckgmt", part.rows(pull), part.values) - part.rows(mean)
            d_scores = weights * d_weights * (options.scale * bend)
            d_q += product("ckgmt,ckgtd->ckgmd", d_scores, part.keys).reshape(q.shape)
            more = (_over_queries(w, part.rows(x)) for w, x in ((d_scores, q), (weights, pull)))
            near = part.keys.shape[3]
            added.append(tuple(s.at[:, :, :, :near].add(x) for s, x in zip((d_keys, d_values), more)))
        return added, (d_q.astype(queries.dtype),)

    given = (own,) if context is None else (own, context)
    sums = [tuple(jnp.zeros(x.shape, jnp.float32) for x in pair) for pair in given]
    sums, (d_queries,) = _sweep(options, block, sums)
    d_own, *d_context = jax.tree.map(lambda s: s.astype(own[0].dtype), sums)
    return d_queries, d_own, d_context[0] if d_context else None, (None, None, None)


_attention.defvjp(_forward, _backward)


def _sweep(options: _Options, block: Callable, carry: Any) -> tuple[Any, list[Array]]:
    """Run `block(carry, first query, queries, end of keys)` over all blocks; joins what they return over queries."""
    pieces = []
    for first, size, cuts in options.blocks:
        if cuts == 1:
            carry, piece = block(carry, first, size, first + size)
        else:
            step = functools.partial(_step, block, size // cuts, first + size)
            carry, piece = jax.lax.scan(step, carry, first + size // cuts * jnp.arange(cuts))
            piece = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1, x.shape[-1]), piece)
        pieces.append(piece)
    return carry, [jnp.concatenate(x, axis=3) for x in zip(*pieces)]


def _step(block: Callable, size: int, end: int, carry: Any, first: Array) -> tuple[Any, Any]:
    return block(carry, first, size, end)


def _at(options: _Options, first, size: int, *arrays: Array) -> list[Array]:
    start, length = first * options.repeats, size * options.repeats
    return [jax.lax.dynamic_slice_in_dim(x, start, length, axis=3) for x in arrays]


def _parts(options: _Options, first, size: int, end: int, own: tuple, context: tuple | None, place: tuple):
    """What queries first..first+size-1 may see: their own columns up to `end`, and the context."""
    lengths, window, start = place
    keys, values = (x if start is not None else x[:, :, :, :end] for x in own)
    here = (first + jnp.arange(size * options.repeats) // options.repeats)[:, None]
    here = here if start is None else here + start
    column = jnp.arange(keys.shape[3])
    seen = column <= here
    if window is not None:
        seen &= column > here - window
    parts = [_Part(keys, values, seen[None, None, None])]
    if context is not None:
        there = jnp.arange(context[0].shape[3]) - lengths[:, None, None]  # before column 0
        seen = there < 0
        if window is not None:
            seen = jnp.tile(seen & (there > here - window), (1, keys.shape[2], 1))
        parts.append(_Part(*context, seen[:, None, None]))
    return parts


def _scores(options: _Options, q: Array, part: _Part) -> tuple[Float[Array, "C Hkv g M K"], Array | float]:
    """Masked scores, and the slope of the cap."""
    scores = product("ckgmd,ckgtd->ckgmt", part.rows(q), part.keys) * options.scale
    bend: Array | float = 1.0
    if options.softcap is not None:
        bent = jnp.tanh(scores / options.softcap)
        scores, bend = options.softcap * bent, 1 - bent * bent
    return jnp.where(part.seen, scores, MASKED), bend


def _over_queries(weights: Float[Array, "C Hkv g M K"], x: Float[Array, "C Hkv g M D"]) -> Float[Array, "C Hkv g K D"]:
    queries = weights.shape[3]
    if queries > _FEW:
        return product("ckgmt,ckgmd->ckgtd", weights, x)
    one_by_one = (weights[..., m, :, None] * x[..., m, None, :].astype(jnp.float32) for m in range(queries))
    return functools.reduce(jnp.add, one_by_one)
