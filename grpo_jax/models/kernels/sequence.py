"""Attention of whole sequences on TPU, a context and its group's rows side by side: JAX's splash attention."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Float, Int

_LANES = 128


@dataclasses.dataclass(frozen=True)
class SharedContext(splash.Mask):
    """Who sees whom in a sequence of P context tokens and then rows of T columns each.

    The context is causal; a row's column j stands at position P + j and sees the context and its own row, up to itself
    and no further back than the window. What is left over at the end forms rows of its own.

    parts: the sequence is cut into so many parts, each a part of the context and then a part of every row.
    """

    P: int
    T: int
    length: int
    window: int | None = None
    parts: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.length, self.length

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        queries, keys = (np.arange(self.length, dtype=np.int32)[part] for part in index)
        (row, here), (other, there) = (self.place(x) for x in (queries, keys))
        shape = len(queries), len(keys)
        if there.min() > here.max() or (other.min() >= 0 and (other.min() > row.max() or other.max() < row.min())):
            return np.broadcast_to(np.False_, shape)  # most blocks, and there are as many as the square of the length
        if other.max() < 0 and there.max() <= here.min() and not self.window:
            return np.broadcast_to(np.True_, shape)
        visible = (there <= here[:, None]) & ((other < 0) | (other == row[:, None]))
        return visible & (there > here[:, None] - self.window) if self.window else visible

    def place(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The row (-1: the context) and the position of the tokens at x."""
        part, x = np.divmod(x, self.length // self.parts)
        P, T = self.P // self.parts, max(self.T // self.parts, 1)
        inside, (row, column) = x < P, np.divmod(x - P, T)
        return np.where(inside, -1, row), np.where(inside, part * P + x, self.P + part * T + column)


def sequence_attention(
    queries: Float[Array, "C N H D"],
    keys: Float[Array, "C N Hkv D"],
    values: Float[Array, "C N Hkv D"],
    lengths: Int[Array, " C"],
    *,
    P: int,
    T: int,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    windowed: Bool[Array, ""] | None = None,
    interpret: bool = False,
) -> Float[Array, "C N H D"]:
    """Causal grouped-query attention over sequences of a context and the rows of its group, N = P + G T.

    out = Σ_k w_k v_k / Σ_k w_k,  w_k = exp(cap(scale q·k)) where k is visible, else 0

    with visible as `SharedContext` says, without the context tokens at or beyond lengths[c], and a row's column j at
    position lengths[c] + j. Softmax is float32; nothing of the size of the scores exists outside the kernel, forward or
    backward, and blocks in which nothing is visible take no part. windowed: whether this layer has the window, where
    only some have; None: it does. What stands at hidden positions of the context is finite and means nothing.
    """
    if window is not None and windowed is not None:
        attend = functools.partial(sequence_attention, P=P, T=T, scale=scale, softcap=softcap, interpret=interpret)
        near = functools.partial(attend, window=window)
        return jax.lax.cond(windowed, near, attend, queries, keys, values, lengths)
    C, N, H, D = queries.shape
    size, block = padded(N, P, T)
    lengths = jnp.minimum(lengths, P).astype(jnp.int32)
    if window is not None:  # a context that ends where the rows begin makes distances the same for every length
        queries, keys, values = (_turned(x, P - lengths, P) for x in (queries, keys, values))
        first, last = P - lengths, jnp.full_like(lengths, P)
    else:
        first, last = jnp.zeros_like(lengths), lengths
    place = jnp.arange(size)
    exists = ((place >= first[:, None]) & (place < last[:, None]) | (place >= P)).astype(jnp.int32)
    attend = _kernel(SharedContext(P, T, size, window), H, block, softcap, interpret)
    queries = (queries.astype(jnp.float32) * scale).astype(queries.dtype)
    laid = (_laid(x, size) for x in (queries, keys, values))
    out = jax.vmap(lambda q, k, v, s: attend(q, k, v, segment_ids=splash.SegmentIds(s, s)))(*laid, exists)
    out = out[:, :, :N, :D].swapaxes(1, 2).astype(queries.dtype)
    return out if window is None else _turned(out, lengths, P)


def spread_attention(
    queries: Float[Array, "C n H D"],
    keys: Float[Array, "C n Hkv D"],
    values: Float[Array, "C n Hkv D"],
    lengths: Int[Array, " C"],
    *,
    P: int,
    T: int,
    parts: int,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "C n H D"]:
    """`sequence_attention` in a `shard_map` whose axis "sequence" divides the tokens as `SharedContext.parts` says.

    Each device attends for its own tokens, over the keys and values of all.
    """
    C, n, H, D = queries.shape
    size, block = padded(n, P // parts, T // parts)
    mask = SharedContext(P, T, size * parts, parts=parts)
    row, position = mask.place(np.arange(mask.length))
    exists = ((row >= 0) | (position < lengths[:, None])).astype(jnp.int32)
    first = jax.lax.axis_index("sequence") * size
    here = jax.lax.dynamic_slice_in_dim(exists, first, size, axis=1)
    attend = _of_part(_kernel(mask, H, block, softcap, interpret, parts), parts)
    laid = [_laid((queries.astype(jnp.float32) * scale).astype(queries.dtype), size)]
    for x in (keys, values):
        everywhere = jax.lax.all_gather(x, "sequence", axis=1, tiled=True)
        wide = _laid(everywhere.reshape(C * parts, n, *x.shape[2:]), size).reshape(C, parts, x.shape[2], size, -1)
        laid.append(wide.swapaxes(1, 2).reshape(C, x.shape[2], parts * size, -1))
    ids = jax.vmap(lambda q, k, v, *s: attend(q, k, v, segment_ids=splash.SegmentIds(*s)))
    return ids(*laid, here, exists)[:, :, :n, :D].swapaxes(1, 2).astype(queries.dtype)


def padded(N: int, P: int, T: int) -> tuple[int, int]:
    """The length in which a sequence is computed, and the side of the blocks: 512 where that fits context and rows,
    256 for others, less for a shorter sequence."""
    fits = P % 512 == 0 and T % 512 == 0
    block = min(512 if fits else 256, -(-N // _LANES) * _LANES)
    return -(-N // block) * block, block


def _laid(x: Float[Array, "C N heads D"], size: int) -> Float[Array, "C heads M width"]:
    """Heads first, tokens padded to whole blocks and heads to whole lanes."""
    D = x.shape[-1]
    x = jnp.pad(x, [(0, 0), (0, size - x.shape[1]), (0, 0), (0, -D % _LANES)])
    return x.swapaxes(1, 2)


def _turned(x: Float[Array, "C N heads D"], by: Int[Array, " C"], P: int) -> Float[Array, "C N heads D"]:
    """The first P tokens moved up by so many places, those that fall off put in front."""
    index = (jnp.arange(P) - by[:, None]) % max(P, 1)
    first = jnp.take_along_axis(x[:, :P], index[:, :, None, None], axis=1)
    return jnp.concatenate([first, x[:, P:]], axis=1)


def _of_part(kernel: Any, parts: int) -> Any:
    """The kernel for the queries of the device at hand: its part of what is listed by blocks of queries."""

    def mine(x: Array | None) -> Array | None:
        if x is None:
            return None
        size = x.shape[1] // parts
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("sequence") * size, size, axis=1)

    def part(info: Any) -> Any:
        return info._replace(**{name: mine(getattr(info, name)) for name in ("data_next", "mask_next", "block_mask")})

    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    return type(kernel)(*(None if info is None else part(info) for info in infos), **kernel.kwargs)


def _kernel(mask: SharedContext, heads: int, block: int, softcap: float | None, interpret: bool, parts: int = 1) -> Any:
    names = [f.name for f in dataclasses.fields(splash.BlockSizes) if f.name.startswith("block_")]
    return splash.make_splash_mha(
        mask=splash.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=parts,
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
