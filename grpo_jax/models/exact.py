"""Arithmetic that does not depend on what is computed beside it: a token has the same bits in the sampler's steps and
in training, whatever the number of rows, their lengths and the padding.

How a backend adds up a product or a sum follows from its shape and from what is compiled around it. So shapes are fixed
here, inside of loops that the compiler cannot open: what is done token by token is done in tiles of so many tokens, and
attention has so many queries and keys at a time. That is the forward pass; gradients are those of the plain functions.
`python -m benchmarks.exact` counts what differs on a backend all the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from grpo_jax.models.attention import MASKED, product, softcap
from grpo_jax.models.cached import Heard, KeysValues, arranged, cut
from grpo_jax.models.config import TransformerConfig
from grpo_jax.models.kernels import on_cpu, per_device
from grpo_jax.models.spread import attend_together as attend_plainly
from grpo_jax.models.spread import parted
from grpo_jax.types import PyTree

QUERIES = 4  # of one matrix: of tokens of a row, or of rows of a context

Window = Int[Array, ""] | int | None


def tile() -> int:
    """Tokens that go through a matrix at a time, fewer of which are padded."""
    return 64 if on_cpu() else 256


def keys_at_once() -> int:
    """Keys of one block, in which contexts and own caches are whole."""
    return 32 if on_cpu() else 128


def in_tiles(function: Callable[..., PyTree], *tokens: Shaped[Array, "*N ..."], weights: PyTree, axis: str) -> PyTree:
    """`function(weights, *tokens)`, which makes of arrays [*N, ...] others, each token of itself alone.

    tokens: the first is [*N, E] and floating-point, the others broadcast to its [*N]. function: of these arrays alone.
    axis: what the first dimension is, a letter of `kernels.placement.LETTERS`. On a mesh each device has whole weights.
    """
    lead = tokens[0].shape[:-1]
    return _in_tiles(function, axis, weights, [jnp.broadcast_to(x, (*lead, *x.shape[len(lead) :])) for x in tokens])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_tiles(function: Callable, axis: str, weights: PyTree, tokens: list[Array]) -> PyTree:
    def local(weights: PyTree, tokens: list[Array]) -> PyTree:
        lead, size = tokens[0].shape[:-1], tile()
        count = math.prod(lead)
        flat = [_padded(x.reshape(count, *x.shape[len(lead) :]), size) for x in tokens]
        out = _turned(lambda x: function(weights, *x), [x.reshape(-1, size, *x.shape[1:]) for x in flat])
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count].reshape(*lead, *x.shape[2:]), out)

    return per_device(local, [weights, tokens], ["", axis], axis)


def _in_tiles_forward(function: Callable, axis: str, weights: PyTree, tokens: list[Array]) -> tuple[PyTree, tuple]:
    return _in_tiles(function, axis, weights, tokens), (weights, tokens)


def _in_tiles_backward(function: Callable, axis: str, kept: tuple, slopes: PyTree) -> tuple:
    return jax.vjp(lambda weights, tokens: function(weights, *tokens), *kept)[1](slopes)


_in_tiles.defvjp(_in_tiles_forward, _in_tiles_backward)


def attend_cached(
    config: TransformerConfig,
    queries: Float[Array, "C G S H D"],
    prefix: KeysValues,
    lengths: Int[Array, " C"],
    own: KeysValues,
    layer: Int[Array, ""] | int,
    column: Int[Array, ""] | int,
    window: Window,
) -> Float[Array, "C G S H D"]:
    """`cached.attend_cached`, of the rows' own tokens from `column` on."""
    arguments = [queries, prefix, lengths, own, *(jnp.asarray(x, jnp.int32) for x in (layer, column))]
    axes = ["SGMH", "LSH", "S", "LBSNH", "", ""]
    return _over_devices(functools.partial(_attend, config), arguments, axes, window, "SGMH")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def attend_together(
    config: TransformerConfig,
    P: int,
    G: int,
    axis: str,
    arrays: tuple[Float[Array, "C N H D"], Float[Array, "C N Hkv D"], Float[Array, "C N Hkv D"]],
    lengths: Int[Array, " C"],
    window: Window,
) -> Float[Array, "C N H D"]:
    """`spread.attend_together` of queries, keys and values: through a cache that is written already.

    P: a multiple of `keys_at_once()`. axis: as for `in_tiles`.
    """

    def local(arrays: tuple[Array, ...], lengths: Array, *near: Array) -> Array:
        (alone, behind), (keys, own_keys), (values, own_values) = (parted(x, P, G, 1) for x in arrays)
        window = near[0] if near else None
        context, out = KeysValues(*(x[None] for x in arranged(keys, values))), []
        if P:
            own, nothing = _filled(keys[:, None], values[:, None]), KeysValues(context.keys[..., :0], context.values)
            out.append(_attend(config, alone[:, None], nothing, 0 * lengths, own, 0, 0, window)[:, 0])
        if G:
            of_rows = _attend(config, behind, context, lengths, _filled(own_keys, own_values), 0, 0, window)
            out.append(of_rows.reshape(len(lengths), -1, *of_rows.shape[3:]))
        return jnp.concatenate(out, axis=1)

    letters = f"{axis}NH"
    return _over_devices(local, [arrays, lengths], [letters, axis], window, letters)


def _together_forward(config, P: int, G: int, axis: str, arrays: tuple, lengths: Array, window: Window) -> tuple:
    return attend_together(config, P, G, axis, arrays, lengths, window), (arrays, lengths, window)


def _together_backward(config: TransformerConfig, P: int, G: int, axis: str, kept: tuple, slope: Array) -> tuple:
    arrays, lengths, window = kept
    options = {"scale": config.score_scale, "softcap": config.attention_softcap, "window": window}
    slopes = jax.vjp(lambda arrays: attend_plainly(*arrays, lengths, P=P, G=G, **options), arrays)[1](slope)
    return *slopes, None, None


attend_together.defvjp(_together_forward, _together_backward)


def _over_devices(function: Callable, arguments: list, axes: list, window: Window, out: str) -> Array:
    given = [] if window is None else [jnp.asarray(window)]
    return per_device(function, [*arguments, *given], [*axes, *[""] * len(given)], out)


def _attend(
    config: TransformerConfig,
    queries: Float[Array, "C G S H D"],
    prefix: KeysValues,
    lengths: Int[Array, " C"],
    own: KeysValues,
    layer: Array | int,
    column: Array | int,
    window: Window = None,
) -> Float[Array, "C G S H D"]:
    """On one device. A prefix of no keys is none at all; what it holds beyond its lengths is finite."""
    (C, G, S, H, D), kv_heads = queries.shape, prefix.keys.shape[2]
    copies = 2 if C * kv_heads == 1 else 1  # the compiler has other products for a batch of one
    far = [jnp.repeat(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), copies, axis=0) for x in prefix]
    queries, lengths = jnp.repeat(queries, copies, axis=0), jnp.repeat(lengths, copies)

    def near(block: Array) -> list[Array]:
        """A block of the rows in hand: more of the cache is not touched."""
        kept = (cut(x, layer, block, 1, C * G // x.shape[2]).reshape(C, G, *x.shape[4:]) for x in own)
        return [jnp.repeat(x, copies, axis=0) for x in kept]

    if S > 1:
        queries = _padded(queries, QUERIES, 2)
    columns, see = column + jnp.arange(queries.shape[2], dtype=jnp.int32), _Sight(config, lengths, window)
    queries = queries.reshape(*queries.shape[:3], kv_heads, -1, D)
    heard = _of_own(see, queries, columns, near, _of_contexts(see, queries, columns, *far))
    out = (heard.total / heard.mass[..., None]).astype(queries.dtype)
    return out[:C, :, :S].reshape(C, G, S, H, D)


class _Sight(NamedTuple):
    """What of contexts of these lengths, and of the rows behind them, a query sees."""

    config: TransformerConfig
    lengths: Int[Array, " C"]
    window: Window

    def masked(self, scores: Array, here: Array, there: Array, seen: Array | bool) -> Array:
        """here, there: positions of queries and keys."""
        seen = seen & (there <= here)
        if self.window is not None:
            seen &= there > here - self.window
        return jnp.where(seen, softcap(scores * self.config.score_scale, self.config.attention_softcap), MASKED)


def _of_contexts(
    see: _Sight,
    queries: Float[Array, "C G S Hkv R D"],
    columns: Int[Array, " S"],
    keys: Float[Array, "C Hkv D P"],
    values: Float[Array, "C Hkv P D"],
) -> Heard:
    """[C, G, S, Hkv, R]. Queries of one matrix are tokens of a row, or, of one token each, rows of a context."""
    (C, G, S), size = queries.shape[:3], keys_at_once()

    def some(queries: Float[Array, "C Q Hkv R D"], columns: Int[Array, " Q"]) -> Heard:
        rows, here = jnp.moveaxis(queries, 1, 2), (see.lengths[:, None] + columns)[:, None, :, None, None]

        def add(block: Array, heard: Heard) -> Heard:
            k, v = (jax.lax.dynamic_slice_in_dim(x, block * size, size, at) for x, at in ((keys, -1), (values, -2)))
            there = block * size + jnp.arange(size, dtype=jnp.int32)
            seen = there < see.lengths[:, None, None, None, None]
            return heard.and_of(see.masked(product("ckqrd,ckdt->ckqrt", rows, k), here, there, seen), v, mass=_sum)

        heard = jax.lax.fori_loop(0, longest // size, add, Heard.nothing(rows))
        return _moved(heard, 2, 1)

    if not keys.shape[-1]:
        return Heard.nothing(queries)
    longest = jnp.minimum(jnp.max(see.lengths) + size - 1, keys.shape[-1])  # which the compiler does not know
    flat = _padded(queries.reshape(C, G * S, *queries.shape[3:]), QUERIES, 1)
    columns = _padded(jnp.tile(columns, G), QUERIES)
    heard = _turned(lambda x: some(*x), (_cut(flat, 1), _cut(columns, 0)))
    return jax.tree.map(lambda x: _joined(x, 1)[:, : G * S].reshape(C, G, S, *x.shape[3:]), heard)


def _of_own(
    see: _Sight,
    queries: Float[Array, "C G S Hkv R D"],
    columns: Int[Array, " S"],
    kept: Callable[[Array], list[Array]],
    heard: Heard,
) -> Heard:
    """What is `heard` of contexts, and the rows' own tokens. kept: keys and values of a block, [C, G, Hkv, ...]."""
    S, size = queries.shape[2], keys_at_once()

    def some(queries: Float[Array, "C G Q Hkv R D"], columns: Int[Array, " Q"], heard: Heard) -> Heard:
        rows, here = jnp.moveaxis(queries, 2, 3), (see.lengths[:, None] + columns)[:, None, None, :, None, None]

        def add(block: Array, heard: Heard) -> Heard:
            k, v = kept(block)
            there = see.lengths[:, None, None, None, None, None] + block * size + jnp.arange(size, dtype=jnp.int32)
            return heard.and_of(see.masked(product("cgkqrd,cgkdt->cgkqrt", rows, k), here, there, True), v, mass=_sum)

        heard = jax.lax.fori_loop(0, columns[min(S, QUERIES) - 1] // size + 1, add, _moved(heard, 2, 3))
        return _moved(heard, 3, 2)

    whole = jax.tree.map(lambda x: _padded(x, QUERIES, 2), (queries, heard))
    tiles = jax.tree.map(lambda x: _cut(x, 2), whole)
    heard = _turned(lambda x: some(*x), (tiles[0], _cut(_padded(columns, QUERIES), 0), tiles[1]))
    return jax.tree.map(lambda x: _joined(x, 2)[:, :, :S], heard)


def _sum(x: Float[Array, "*N K"]) -> Float[Array, "*N"]:
    """Over a power of two, by halves: a reduction is in an order of the compiler's choice."""
    while (half := x.shape[-1] // 2) > 0:
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def _filled(keys: Float[Array, "C G T Hkv D"], values: Float[Array, "C G T Hkv D"]) -> KeysValues:
    """An own cache of one layer, full."""
    size = keys_at_once()

    def blocks(x: Array) -> Float[Array, "B N K Hkv D"]:
        x = _padded(x, size, 2)
        return jnp.moveaxis(x.reshape(x.shape[0] * x.shape[1], -1, size, *x.shape[3:]), 1, 0)

    return KeysValues(*(x[None, :, None] for x in arranged(blocks(keys), blocks(values))))


def _turned(function: Callable[[PyTree], PyTree], tiles: PyTree) -> PyTree:
    """`jax.lax.map` by a loop that the compiler cannot open where there is but one tile: there is room for a second,
    whose turn comes if the first value is NaN."""
    first = jax.tree.leaves(tiles)[0]
    turns = len(first) + jnp.isnan(first.reshape(-1)[0]).astype(jnp.int32)
    tiles = jax.tree.map(lambda x: x if len(x) > 1 else _padded(x, 2), tiles)
    room = max(len(first), 2)

    def turn(i: Array) -> PyTree:
        return function(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tiles))

    def put(i: Array, out: PyTree) -> PyTree:
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), out, turn(i))

    out = jax.tree.map(lambda x: jnp.zeros((room, *x.shape), x.dtype), jax.eval_shape(turn, 0))
    return jax.tree.map(lambda x: x[: len(first)], jax.lax.fori_loop(0, turns, put, out))


def _moved(heard: Heard, source: int, destination: int) -> Heard:
    return Heard(*(jnp.moveaxis(x, source, destination) for x in heard))


def _cut(x: Array, axis: int) -> Array:
    """In tiles of `QUERIES` along an axis; they come first."""
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, QUERIES, *x.shape[axis + 1 :]), axis, 0)


def _joined(tiles: Array, axis: int) -> Array:
    """The inverse of `_cut`."""
    x = jnp.moveaxis(tiles, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _padded(x: Array, multiple: int, axis: int = 0) -> Array:
    return jnp.pad(x, [(0, -size % multiple if at == axis else 0) for at, size in enumerate(x.shape)])
