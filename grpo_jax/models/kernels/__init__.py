"""Attention as TPU kernels, with the mathematics of the plain paths; each call is divided over the mesh in context.

`on_tpu()` says at trace time whether to call them. Pallas, which takes long to import, is then imported.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.kernels.placement import attention_path, on_cpu, on_tpu, per_device

__all__ = ["attend_newest", "attend_sequence", "attention_path", "on_cpu", "on_tpu", "per_device"]


def attend_newest(
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
    """`decoding.decode_attention`, contexts and heads divided over the mesh."""
    from grpo_jax.models.kernels.decoding import decode_attention

    C, G = queries.shape[:2]
    options = {"scale": scale, "softcap": softcap, "folds": folds, "interpret": interpret}

    def local(queries, prefix, lengths, own, filled, layer, *window):
        near = window[0] if window else None
        return decode_attention(queries, prefix, lengths, own, filled, layer, window=near, **options)

    arguments = [queries, prefix, lengths, own, jnp.broadcast_to(filled, (C, G)), jnp.asarray(layer)]
    axes = ["SGHD", "LSHPD", "S", "LSNHTD", "SG", ""]
    if window is not None:
        arguments, axes = [*arguments, jnp.asarray(window)], [*axes, ""]
    return per_device(local, arguments, axes, "SGHD")


def attend_sequence(
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
    axis: str = "C",
    parts: int = 1,
    interpret: bool = False,
) -> Float[Array, "C N H D"]:
    """`sequence.sequence_attention`, contexts and heads divided over the mesh; differentiable."""
    from grpo_jax.models.kernels.sequence import sequence_attention, spread_attention

    options = {"P": P, "T": T, "scale": scale, "softcap": softcap, "interpret": interpret}
    if parts > 1:
        spread = functools.partial(spread_attention, parts=parts, **options)
        return per_device(spread, [queries, keys, values, lengths], ["CTHD", "CTHD", "CTHD", "C"], "CTHD")
    call = functools.partial(
        sequence_attention, P=P, T=T, scale=scale, softcap=softcap, window=window, interpret=interpret
    )
    arguments, sequence = [queries, keys, values, lengths], f"{axis}NHD"
    axes = [sequence, sequence, sequence, axis]
    if window is None or windowed is None:
        return per_device(call, arguments, axes, sequence)
    local = lambda *x: call(*x[:4], windowed=x[4])  # noqa: E731
    return per_device(local, [*arguments, windowed], [*axes, ""], sequence)
