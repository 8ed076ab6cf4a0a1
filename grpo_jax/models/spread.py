"""A context and its rows with the tokens of each divided over devices: context parallelism.

Tokens [C, P] of contexts and [C, G, T] of their rows lie in one axis of `parts` equal parts, each a part of the context
and then a part of every row: what is done token by token stays on a device, and attention gathers keys and values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.models.blocked import blocked_attention
from grpo_jax.models.kernels.placement import per_device


def laid(contexts: Array, rows: Array, parts: int) -> Array:
    """[C, P] and [C, G, T] as [C, P + G T], in parts; one part is the context and then the rows."""
    C, G = rows.shape[:2]
    of_rows = rows.reshape(C, G, parts, -1).swapaxes(1, 2).reshape(C, parts, -1)
    return jnp.concatenate([contexts.reshape(C, parts, -1), of_rows], axis=2).reshape(C, -1)


def parted(x: Float[Array, "C N *D"], P: int, G: int, parts: int) -> tuple[Array, Array]:
    """The inverse of `laid`: the context's [C, P, ...] and the rows' [C, G, T, ...]."""
    C, rest = x.shape[0], x.shape[2:]
    x = x.reshape(C, parts, -1, *rest)
    context, rows = x[:, :, : P // parts], x[:, :, P // parts :]
    rows = rows.reshape(C, parts, G, -1, *rest).swapaxes(1, 2) if G else rows
    return context.reshape(C, P, *rest), rows.reshape(C, G, -1, *rest) if G else rows.reshape(C, 0, 1, *rest)


def attend_together(
    queries: Float[Array, "C N H D"],
    keys: Float[Array, "C N Hkv D"],
    values: Float[Array, "C N Hkv D"],
    lengths: Int[Array, " C"],
    *,
    P: int,
    G: int,
    scale: float,
    softcap: float | None = None,
    window: Int[Array, ""] | None = None,
    parts: int = 1,
    part: Int[Array, ""] | None = None,
) -> Float[Array, "C n H D"]:
    """`blocked_attention` of contexts over themselves and of rows behind them.

    part: keys and values are there in all parts, queries in that one alone.
    """
    options = {"scale": scale, "softcap": softcap, "window": window}
    context, rows = zip(parted(keys, P, G, parts), parted(values, P, G, parts))
    alone, behind = parted(queries, P // parts, G, 1)
    starts = [None if part is None else part * width for width in (alone.shape[1], behind.shape[2])]
    out = []
    if P:
        of_context = blocked_attention(
            alone[:, None], *(x[:, None] for x in context), None, jnp.zeros_like(lengths), **options, start=starts[0]
        )
        out.append(of_context[:, 0])
    if G:
        of_rows = blocked_attention(behind, *rows, context, lengths, **options, start=starts[1])
        out.append(of_rows.reshape(behind.shape[0], -1, *queries.shape[2:]))
    return jnp.concatenate(out, axis=1) if len(out) > 1 else out[0]


def attend_spread(
    queries: Float[Array, "C N H D"],
    keys: Float[Array, "C N Hkv D"],
    values: Float[Array, "C N Hkv D"],
    lengths: Int[Array, " C"],
    *,
    window: Int[Array, ""] | None,
    P: int,
    G: int,
    parts: int,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "C N H D"]:
    """`attend_together` with each device attending for its own part, over the keys and values of all parts."""

    def local(queries: Array, keys: Array, values: Array, lengths: Array, *window: Array) -> Array:
        keys, values = (jax.lax.all_gather(x, "sequence", axis=1, tiled=True) for x in (keys, values))
        return attend_together(
            queries,
            keys,
            values,
            lengths,
            P=P,
            G=G,
            scale=scale,
            softcap=softcap,
            window=window[0] if window else None,
            parts=parts,
            part=jax.lax.axis_index("sequence"),
        )

    arguments, axes = [queries, keys, values, lengths], ["CTHD", "CTHD", "CTHD", "C"]
    if window is not None:
        arguments, axes = [*arguments, jnp.asarray(window)], [*axes, ""]
    return per_device(local, arguments, axes, "CTHD")
