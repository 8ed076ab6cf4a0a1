"""Log-probs of chosen decisions from hidden states, without the [N, T, V] array of logits."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK_BYTES = 64 * 2**20


def chunked_logps(
    hidden: Float[Array, "*rows T E"],
    head: Float[Array, "E V"],
    targets: Int[Array, "*rows T"],
    *,
    temperature: Float[Array, "*rows"] | float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    chunk: int | None = None,
) -> tuple[Float[Array, "*rows T"], dict[str, Float[Array, "*rows T"]]]:
    """Log-probability of each target under softmax(cap(hidden @ head) / temperature), and the entropy if asked.

    z = cap(hidden_t @ head) / temperature, cap(x) = softcap tanh(x / softcap);
    logp_t = z[target_t] - log sum_v exp z_v,  H_t = -sum_v p_v log p_v   (nats, float32).

    The product is in the dtype of the inputs with float32 accumulation, all after it in float32. Logits live for
    `chunk` positions of every row at a time, forward and backward (recomputed there); positions whose cotangent is 0
    take no part in the backward pass, whatever they hold. The temperature gets no gradient.
    temperature: above 0, one value or one per row. chunk: positions; default: as many as keep a chunk's float32 logits
    near 64 MiB. Pass it if rows are sharded, since a chunk is then spread over the devices.
    Returns: (logps, {"entropy": ...} if asked else {}).
    Raises: ValueError if shapes do not fit, softcap <= 0 or chunk < 1.
    """
    hidden, head, targets = jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(targets)
    rows, length = targets.shape[:-1], targets.shape[-1]
    temperature = jnp.asarray(temperature, jnp.float32)
    _check(hidden, head, targets, temperature, softcap, chunk)
    if chunk is None:
        chunk = chunk_length(math.prod(rows), head.shape[0], head.shape[1])
    count = max(1, -(-length // chunk))
    chunk = -(-length // count)  # chunks of one size, so that little is padded
    hidden, targets = _pad(hidden, -2, count * chunk), _pad(targets, -1, count * chunk)
    temperature = jax.lax.stop_gradient(jnp.broadcast_to(temperature, rows))
    options = _Options(softcap, entropy, count, chunk)
    hidden, head = _varying_alike(hidden, head)
    logps, entropies = _logps(options, hidden, head, targets, temperature)
    return logps[..., :length], {"entropy": entropies[..., :length]} if entropy else {}


def chunk_length(rows: int, features: int, vocabulary: int) -> int:
    """Positions per chunk for that many rows on a device: what `chunked_logps` takes if it is not told.

    A chunk's float32 logits take 64 MiB, or an eighth of the head's float32 gradient if that is more: every chunk reads
    and writes that gradient once, and fewer decisions would not pay for it.
    """
    budget = max(CHUNK_BYTES, features * vocabulary * 4 // 8)
    return max(1, budget // (4 * max(rows, 1) * vocabulary))


class _Options(NamedTuple):
    softcap: float | None
    entropy: bool
    count: int
    chunk: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logps(options: _Options, hidden: Array, head: Array, targets: Array, temperature: Array) -> tuple[Array, Array]:
    return _forward(options, hidden, head, targets, temperature)[0]


def _forward(options: _Options, hidden: Array, head: Array, targets: Array, temperature: Array):
    def read(hidden: Array, targets: Array) -> tuple[Array, ...]:
        logits = _logits(options, hidden, head, temperature)
        top = logits.max(axis=-1)
        shifted = logits - top[..., None]
        log_mass = jnp.log(jnp.exp(shifted).sum(axis=-1))
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        # Less the largest first: a log-prob near 0 is then not the difference of two large numbers.
        logps, normalizer = (chosen - top) - log_mass, top + log_mass
        entropies = None
        if options.entropy:
            everything = shifted - log_mass[..., None]
            entropies = -jnp.sum(jnp.exp(everything) * everything, axis=-1)
        return logps, entropies, normalizer, logits

    if options.count == 1:
        logps, entropies, normalizer, logits = read(hidden, targets)
    else:
        logits = None  # more than one chunk is never kept

        def step(_: None, index: Array):
            return None, read(_at(options, hidden, index, -2), _at(options, targets, index, -1))[:3]

        chunks = jax.lax.scan(step, None, jnp.arange(options.count))[1]
        logps, entropies, normalizer = jax.tree.map(lambda x: _joined(x, -1), chunks)
    return (logps, entropies), (hidden, head, targets, temperature, normalizer, entropies, logits)


def _backward(options: _Options, kept: tuple, cotangents: tuple[Array, Array]):
    hidden, head, targets, temperature, normalizer, entropies, logits = kept
    decisions = (targets, normalizer, entropies, *cotangents)  # [*rows, T] each

    def pull(hidden: Array, logits: Array | None, local: tuple) -> tuple[Array, Array]:
        targets, normalizer, entropies, d_logps, d_entropies = local
        live = d_logps != 0
        if options.entropy:
            live |= d_entropies != 0
        hidden = jnp.where(live[..., None], hidden, 0)
        if logits is None:
            logits = _logits(options, hidden, head, temperature)
        shifted = logits - normalizer[..., None]
        slope = d_logps[..., None]
        if options.entropy:
            slope = slope + d_entropies[..., None] * (shifted + entropies[..., None])
        chosen = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
        d_logits = jnp.where(chosen, d_logps[..., None], 0) - jnp.exp(shifted) * slope
        scale = temperature[..., None, None]
        if options.softcap is not None:
            d_logits *= 1 - (logits * scale / options.softcap) ** 2
        d_logits = jnp.where(live[..., None], d_logits / scale, 0).astype(jnp.result_type(hidden, head))
        d_hidden = jnp.einsum("...tv,ev->...te", d_logits, head, preferred_element_type=jnp.float32)
        decisions = tuple(range(hidden.ndim - 1))
        d_head = jnp.tensordot(hidden, d_logits, (decisions, decisions), preferred_element_type=jnp.float32)
        return d_hidden.astype(hidden.dtype), d_head

    if options.count == 1:
        d_hidden, d_head = pull(hidden, logits, decisions)
    else:

        def step(total: Array, index: Array) -> tuple[Array, Array]:
            here = jax.tree.map(lambda x: _at(options, x, index, -1), decisions)
            d_hidden, d_head = pull(_at(options, hidden, index, -2), None, here)
            return total + d_head, d_hidden

        # The sum over no positions: zeros that vary over the mesh as the sum does, which shard_map asks of a carry.
        zero = pull(hidden[..., :0, :], None, jax.tree.map(lambda x: x[..., :0], decisions))[1]
        d_head, chunks = jax.lax.scan(step, zero, jnp.arange(options.count))
        d_hidden = _joined(chunks, -2)
    return d_hidden, d_head.astype(head.dtype), None, None


_logps.defvjp(_forward, _backward)


def _logits(options: _Options, hidden: Array, head: Array, temperature: Array) -> Float[Array, "*rows T V"]:
    logits = jnp.einsum("...te,ev->...tv", hidden, head, preferred_element_type=jnp.float32)
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    return logits / temperature[..., None, None]


def _at(options: _Options, array: Array, index: Array, axis: int) -> Array:
    """One chunk of the time axis."""
    return jax.lax.dynamic_slice_in_dim(array, index * options.chunk, options.chunk, axis % array.ndim)


def _joined(chunks: Array, axis: int) -> Array:
    """Chunks stacked in front, put back on the time axis, which is `axis` of the whole."""
    moved = jnp.moveaxis(chunks, 0, axis - 1)
    at = axis % (chunks.ndim - 1)
    return moved.reshape(*moved.shape[:at], -1, *moved.shape[at + 2 :])


def _varying_alike(*arrays: Array) -> list[Array]:
    """The same arrays, each varying over the mesh as all of them together do.

    Under shard_map a custom gradient must vary as its argument does, and the gradient of a head that all devices share
    varies with the rows. Adding an empty sum of the others leaves the conversion, and the sum over devices that is its
    transpose, to JAX; compiled, it is nothing.
    """
    return [sum((jnp.sum(y[..., :0]).astype(x.dtype) for y in arrays if y is not x), start=x) for x in arrays]


def _pad(array: Array, axis: int, length: int) -> Array:
    """Zeros after the end of the axis; a position without cotangent does nothing."""
    missing = length - array.shape[axis]
    return (
        jnp.pad(array, [(0, missing if i == axis % array.ndim else 0) for i in range(array.ndim)]) if missing else array
    )


def _check(
    hidden: Array, head: Array, targets: Array, temperature: Array, softcap: float | None, chunk: int | None
) -> None:
    if hidden.shape[:-1] != targets.shape or head.ndim != 2 or hidden.shape[-1] != head.shape[0]:
        raise ValueError(
            "chunked_logps needs hidden [..., T, E], head [E, V] and targets [..., T], got "
            f"{list(hidden.shape)}, {list(head.shape)} and {list(targets.shape)}"
        )
    if temperature.shape not in ((), targets.shape[:-1]):
        raise ValueError(
            f"temperature is one value or one per row {list(targets.shape[:-1])}, got shape {list(temperature.shape)}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap bounds the logits and must be above 0 (None for no cap), got {softcap}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is a number of positions, at least 1 (None to choose it), got {chunk}")
