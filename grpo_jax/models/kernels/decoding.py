"""Attention of one new token per row, as a TPU kernel: a context shared by a group, and each row's own cache."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from grpo_jax.models.folding import FOLDS, folded, folds_of

BLOCK_BYTES = 2**20  # of keys, and again of values, fetched at once; twice that of each is in flight
_LANES, _SUBLANES = 128, 8
_MASKED = -1e30  # finite: a block of which a row sees nothing must not give inf - inf
_EVERYWHERE = 2**30  # a window beyond every position


class Tiles(NamedTuple):
    """What one step of the kernel fetches: of how many key/value heads, context tokens and own columns."""

    heads: int
    tokens: int
    columns: int


def tiles(G: int, kv_heads: int, P: int, T: int, D: int, itemsize: int) -> Tiles:
    """The largest tiles that keep the keys of a step within BLOCK_BYTES.

    Own columns come 128 at a time where all G rows of one head fit, so that at most 127 columns that are not filled are
    read; heads fill up what is left.
    """
    columns, least = min(T, _LANES), _SUBLANES * 4 // itemsize
    while G * columns * D * itemsize > BLOCK_BYTES and columns > least:
        columns = max(least, columns // 2 // least * least)
    most = max(1, BLOCK_BYTES // (G * columns * D * itemsize))
    heads = next(n for n in range(min(kv_heads, most), 0, -1) if kv_heads % n == 0)
    tokens = max(1, min(512, BLOCK_BYTES // (heads * D * itemsize)) // _LANES) * _LANES
    return Tiles(heads, min(P, tokens), columns)


def decode_attention(
    queries: Float[Array, "C G H D"],
    prefix: tuple[Float[Array, "L C Hkv P D"], Float[Array, "L C Hkv P D"]],
    lengths: Int[Array, " C"],
    own: tuple[Float[Array, "L S N Hkv T D"], Float[Array, "L S N Hkv T D"]],
    filled: Int[Array, "C G"] | Int[Array, ""] | int,
    layer: Int[Array, ""] | int,
    *,
    scale: float,
    softcap: float | None = None,
    window: Int[Array, ""] | int | None = None,
    folds: int = 1,
    interpret: bool = False,
) -> Float[Array, "C G H D"]:
    """Causal grouped-query attention of every row's newest token over its context and its own columns.

    out = Σ_k w_k v_k / Σ_k w_k,  w_k = exp(cap(scale q·k)) where here - window < position_k ≤ here, else 0

    with context token p at position p < lengths[c], own column t at lengths[c] + t, and here = lengths[c] + filled - 1.
    Context and own columns are joined in one softmax (float32) as their blocks come by. A context's keys and values are
    read once for all rows of its group, own columns as far as the longest row of the group is filled; blocks beyond,
    or before every row's window, are not read. Keys and values come of all layers, and `layer` says which: a slice of
    one layer would be a copy. own: S runs of N rows, of which the first C G / S are the rows of C / S contexts each.
    filled: own columns that exist, the newest included; a row that sees nothing gives 0. folds: they may come to
    so many times the columns of `own`, which says what this costs.
    """
    C, G, H, D = queries.shape
    kv_heads, P, T, run = prefix[0].shape[2], prefix[0].shape[3], own[0].shape[4], C // own[0].shape[1]
    size = tiles(G, kv_heads, P, T, D, own[0].dtype.itemsize)
    rows = -(-(H // kv_heads) // _SUBLANES) * _SUBLANES
    grouped = queries.reshape(C, G, kv_heads, H // kv_heads, D).astype(jnp.float32)
    grouped = jnp.pad(grouped, [(0, 0)] * 3 + [(0, rows - H // kv_heads), (0, 0)])
    plan, steps = _plan(lengths, jnp.broadcast_to(filled, (C, G)), layer, window, size, P, T)

    def context_block(c, h, j, layer, window, split, lengths, filled, ranges):
        return layer[0], c, h, jnp.clip(ranges[0, c] + j, ranges[0, c], ranges[1, c]), 0

    def own_block(c, h, j, layer, window, split, lengths, filled, ranges):
        block = jnp.clip(ranges[2, c] + j - split[0], ranges[2, c], ranges[3, c])
        block, first = folded(block, pl.cdiv(T, size.columns), own[0].shape[2])
        return layer[0], c // run, first // G + c % run, h, block, 0

    row_block = pl.BlockSpec((1, G, size.heads, rows, D), lambda c, h, j, *_: (c, 0, h, 0, 0))
    context_spec = pl.BlockSpec((1, 1, size.heads, size.tokens, D), context_block)
    own_spec = pl.BlockSpec((1, 1, G, size.heads, size.columns, D), own_block)
    shape = (G, size.heads, rows)
    turns = folds_of(run * G, own[0].shape[2]) if folds > 1 else 1
    begun = T * turns // 2 if turns > 1 else 0  # before that there were more rows
    read = (begun + T * turns + size.columns) // 2  # on average, up to the end of a block
    # otherwise the compiler may spend the fast memory on a copy of them, which it would have to make for every token
    if not interpret:
        prefix, own = (tuple(pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in pair) for pair in (prefix, own))
    out = pl.pallas_call(
        functools.partial(_kernel, size=size, scale=scale, softcap=softcap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=(C, kv_heads // size.heads, steps),
            in_specs=[row_block, context_spec, context_spec, own_spec, own_spec],
            out_specs=row_block,
            scratch_shapes=[pltpu.VMEM((*shape, width), jnp.float32) for width in (1, 1, D)],
        ),
        out_shape=jax.ShapeDtypeStruct(grouped.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(C, G, H, kv_heads, P, read, D, own[0].dtype.itemsize),
        interpret=interpret,
        name="decode_attention",
    )(*plan, grouped, *prefix, *own)
    return out[:, :, :, : H // kv_heads].reshape(C, G, H, D).astype(queries.dtype)


def _plan(lengths, filled, layer, window, size: Tiles, P: int, T: int):
    """Scalars for the kernel, and how many steps a context takes at most.

    The last of them, [4, C]: the first and last block of the context, and of the own columns, that any row sees.
    """
    lengths = jnp.minimum(lengths.astype(jnp.int32), P)
    filled = jnp.minimum(filled.astype(jnp.int32), FOLDS * T)
    window = jnp.asarray(_EVERYWHERE if window is None else jnp.minimum(window, _EVERYWHERE), jnp.int32)
    shortest, longest = filled.min(axis=1), filled.max(axis=1)
    begin = jnp.clip(lengths + shortest - window, 0, lengths)  # the first context token that a row may see
    start = jnp.clip(shortest - window, 0, longest)
    last = lambda end, block: jnp.maximum(-(-end // block) - 1, 0)  # noqa: E731
    ranges = jnp.stack(
        [
            jnp.minimum(begin // size.tokens, last(lengths, size.tokens)),
            last(lengths, size.tokens),
            jnp.minimum(start // size.columns, last(longest, size.columns)),
            last(longest, size.columns),
        ]
    )
    counts = jnp.where((begin < lengths)[None], ranges[1:2] - ranges[0:1] + 1, 0), ranges[3] - ranges[2] + 1
    split, rest = (jnp.max(x, initial=0) for x in counts)
    scalars = jnp.reshape(layer, 1).astype(jnp.int32), window.reshape(1), split.reshape(1)
    return (*scalars, lengths, filled.reshape(-1), ranges), split + rest


class _Running(NamedTuple):
    """Of every row so far: the highest score, the sum of weights, the weighted sum of values. In fast memory."""

    top: Any
    mass: Any
    total: Any

    def clear(self) -> None:
        for kept, value in zip(self, (_MASKED, 0.0, 0.0)):
            kept[...] = jnp.full_like(kept, value)

    def add(self, where, scores, visible, mixed) -> None:
        """A block of keys; `mixed` makes the weighted sum of its values."""
        top, mass, total = self
        higher = jnp.maximum(top[where], jnp.where(visible, scores, _MASKED).max(axis=-1, keepdims=True))
        weights = jnp.where(visible, jnp.exp(scores - higher), 0.0)
        shrunk = jnp.exp(top[where] - higher)
        mass[where] = shrunk * mass[where] + weights.sum(axis=-1, keepdims=True)
        total[where] = shrunk * total[where] + mixed(weights)
        top[where] = higher


def _kernel(
    layer, window, split, lengths, filled, ranges, query, far_keys, far_values, keys, values, out, top, mass, total,
    *, size: Tiles, scale: float, softcap: float | None,
):  # fmt: skip
    c, j = pl.program_id(0), pl.program_id(2)
    running, own_step, length = _Running(top, mass, total), j - split[0], lengths[c]
    ends = [filled[c * query.shape[1] + g] for g in range(query.shape[1])]

    def seen(place, at):
        """[G, ...]: whether each row sees the keys at these places of a part that begins at position `at`."""
        there = place + at
        return jnp.stack([(there < length + n) & (there >= length + n - window[0]) for n in ends])

    def shaped(scores):
        return scores * scale if softcap is None else softcap * jnp.tanh(scores * (scale / softcap))

    pl.when(j == 0)(running.clear)

    @pl.when((j < split[0]) & (ranges[0, c] + j <= ranges[1, c]))
    def _():
        first = (ranges[0, c] + j) * size.tokens
        _add_context(running, query, far_keys[0, 0], far_values[0, 0], first, length, seen, shaped)

    @pl.when((own_step >= 0) & (ranges[2, c] + own_step <= ranges[3, c]))
    def _():
        first = (ranges[2, c] + own_step) * size.columns
        _add_own(running, query, keys[0, 0], values[0, 0], first, length, ends, seen, shaped)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        out[0] = jnp.where(mass[...] > 0, total[...] / jnp.where(mass[...] > 0, mass[...], 1.0), 0.0)


def _add_context(running: _Running, query, keys, values, first, length, seen, shaped) -> None:
    """Context tokens first.. of some heads [heads, tokens, D]: for each head one product over all rows of the group."""
    _, G, heads, rows, D = query.shape
    tokens = keys.shape[1]
    place = first + jax.lax.broadcasted_iota(jnp.int32, (rows, tokens), 1)
    visible = seen(place, 0) & (place < length)
    there = first + jax.lax.broadcasted_iota(jnp.int32, (tokens, D), 0) < length
    for h in range(heads):
        kept = jnp.where(there, values[h], 0)  # beyond the array, a block holds anything
        scores = _product(query[0, :, h].reshape(G * rows, D).astype(keys.dtype), keys[h], 1, 1)

        def mixed(weights, kept=kept):
            flat = weights.reshape(G * rows, tokens).astype(kept.dtype)
            return _product(flat, kept, 1, 0).reshape(G, rows, D)

        running.add((slice(None), h), shaped(scores).reshape(G, rows, tokens), visible, mixed)


def _add_own(running: _Running, query, keys, values, first, length, ends, seen, shaped) -> None:
    """Columns first.. of all rows and some heads [G, heads, columns, D]: a small product each."""
    _, G, heads, rows, D = query.shape
    columns = keys.shape[2]
    visible = seen(first + jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 1), length)[:, None]
    place = first + jax.lax.broadcasted_iota(jnp.int32, (columns, D), 0)
    there = jnp.stack([place < n for n in ends])[:, None]
    kept = jnp.where(there, values, 0).reshape(G * heads, columns, D)
    grouped = query[0].reshape(G * heads, rows, D).astype(keys.dtype)
    scores = _product(grouped, keys.reshape(G * heads, columns, D), 2, 2, batch=True)

    def mixed(weights):
        flat = weights.reshape(G * heads, rows, columns).astype(kept.dtype)
        return _product(flat, kept, 2, 1, batch=True).reshape(G, heads, rows, D)

    running.add(..., shaped(scores).reshape(G, heads, rows, columns), visible, mixed)


def _product(left, right, over_left: int, over_right: int, *, batch: bool = False):
    shared = ((0,), (0,)) if batch else ((), ())
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dimensions = (((over_left,), (over_right,)), shared)
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _cost(C: int, G: int, H: int, kv_heads: int, P: int, read: int, D: int, itemsize: int) -> pl.CostEstimate:
    """For a full context and so many own columns."""
    moved = 2 * C * kv_heads * (P + G * read) * D * itemsize + 2 * 4 * C * G * H * D
    pairs = C * G * H * (P + read)
    return pl.CostEstimate(flops=4 * pairs * D, bytes_accessed=moved, transcendentals=pairs)
