"""Log-probs of chosen decisions from hidden states, without the [N, T, V] array of logits."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

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
    reference: tuple[Float[Array, "*rows T F"], Float[Array, "F V"]] | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, "*rows T"], dict[str, Float[Array, "*rows T"]]]:
    """Log-probability of each target under softmax(cap(hidden @ head) / temperature); entropy and KL if asked.

    z = cap(hidden_t @ head) / temperature, cap(x) = softcap tanh(x / softcap);
    logp_t = z[target_t] - log sum_v exp z_v,  H_t = -sum_v p_v log p_v,
    KL_t = sum_v p_v (log p_v - log q_v)   (nats, float32), q the same function of `reference`, (hidden, head).

    The product is in the dtype of the inputs with float32 accumulation, all after it in float32. Logits live for one
    chunk of decisions at a time, forward and backward (recomputed there); decisions whose cotangent is 0 take no part
    in the backward pass, whatever they hold. Temperature and reference get no gradient: that of KL_t is the exact
    gradient of the reverse KL(p || q), the whole vocabulary at once.
    temperature: above 0, one value or one per row. chunk: positions, of all rows at once; default: what keeps a chunk's
    float32 logits near 64 MiB, of fewer rows at once where one position of all is more. Pass it (`chunk_length`) where
    jit divides rows over devices: a chunk is then spread over them, and rows stay where they are.
    Returns: (logps, {"entropy": ..., "kl": ...} as asked).
    Raises: ValueError if shapes do not fit, softcap <= 0 or chunk < 1.
    """
    hidden, head, targets = jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(targets)
    shape, (features, vocabulary) = targets.shape, head.shape if head.ndim == 2 else (0, 0)
    temperature = jnp.asarray(temperature, jnp.float32)
    _check(hidden, head, targets, temperature, softcap, reference, chunk)
    temperature = jax.lax.stop_gradient(jnp.broadcast_to(temperature[..., None], shape))
    decisions = targets, temperature, *([] if reference is None else [jax.lax.stop_gradient(reference[0])])
    if chunk is None:
        rows = _rows_at_once(math.prod(shape[:-1]), features, vocabulary)
        if rows < math.prod(shape[:-1]):  # rows laid end to end, so that a chunk can be less than a position of each
            hidden, decisions = jax.tree.map(lambda x: x.reshape(rows, -1, *x.shape[len(shape) :]), (hidden, decisions))
        chunk = chunk_length(math.prod(hidden.shape[:-2]), features, vocabulary)
    length = hidden.shape[-2]
    count = max(1, -(-length // chunk))
    options = _Options(softcap, entropy, reference is not None, count, -(-length // count), hidden.ndim - 2)
    hidden, decisions = jax.tree.map(functools.partial(_pad, options), (hidden, decisions))
    hidden, head = _varying_alike(hidden, head)
    far = None if reference is None else jax.lax.stop_gradient(jnp.asarray(reference[1]))
    said = _logps(options, hidden, head, far, decisions)
    return said.pop("logps")[..., :length].reshape(shape), {k: x[..., :length].reshape(shape) for k, x in said.items()}


def chunk_length(rows: int, features: int, vocabulary: int) -> int:
    """Positions per chunk for that many rows on a device: what `chunked_logps` takes if it is not told.

    A chunk's float32 logits take 64 MiB, or an eighth of the head's float32 gradient if that is more: every chunk reads
    and writes that gradient once, and fewer decisions would not pay for it.
    """
    return max(1, _chunk_bytes(features, vocabulary) // (4 * max(rows, 1) * max(vocabulary, 1)))


def _rows_at_once(rows: int, features: int, vocabulary: int) -> int:
    """The largest divisor of `rows` for which one position of each is within a chunk's memory."""
    most = max(1, _chunk_bytes(features, vocabulary) // (4 * max(vocabulary, 1)))
    return next(n for n in range(min(rows, most), 0, -1) if rows % n == 0) if rows > most else rows


def _chunk_bytes(features: int, vocabulary: int) -> int:
    return max(CHUNK_BYTES, features * vocabulary * 4 // 8)


class _Options(NamedTuple):
    softcap: float | None
    entropy: bool
    kl: bool
    count: int
    chunk: int
    axis: int  # that of the decisions


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logps(options: _Options, hidden: Array, head: Array, far: Array | None, decisions: tuple) -> dict[str, Array]:
    return _forward(options, hidden, head, far, decisions)[0]


def _forward(options: _Options, hidden: Array, head: Array, far: Array | None, decisions: tuple):
    def read(hidden: Array, decisions: tuple) -> tuple[dict[str, Array], Array, Array]:
        targets, temperature = decisions[:2]
        logits = _logits(options, hidden, head, temperature)
        top = logits.max(axis=-1)
        shifted = logits - top[..., None]
        log_mass = jnp.log(jnp.exp(shifted).sum(axis=-1))
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        # Less the largest first: a log-prob near 0 is then not the difference of two large numbers.
        said, normalizer = {"logps": (chosen - top) - log_mass}, top + log_mass
        everything = shifted - log_mass[..., None]
        if options.entropy:
            said["entropy"] = -jnp.sum(jnp.exp(everything) * everything, axis=-1)
        if options.kl:
            against = jax.nn.log_softmax(_logits(options, decisions[2], far, temperature))
            said["kl"] = jnp.sum(jnp.exp(everything) * (everything - against), axis=-1)
        return said, normalizer, logits

    if options.count == 1:
        said, normalizer, logits = read(hidden, decisions)
    else:
        logits = None  # more than one chunk is never kept

        def step(_: None, index: Array):
            return None, read(*_at(options, (hidden, decisions), index))[:2]

        chunks = jax.lax.scan(step, None, jnp.arange(options.count))[1]
        said, normalizer = _joined(options, chunks)
    return said, (hidden, head, far, decisions, normalizer, said, logits)


def _backward(options: _Options, kept: tuple, cotangents: dict[str, Array]):
    hidden, head, far, decisions, normalizer, said, logits = kept
    local = (hidden, decisions, normalizer, said, cotangents)

    def pull(logits: Array | None, local: tuple) -> tuple[Array, Array]:
        hidden, (targets, temperature, *reference), normalizer, said, cotangents = local
        live = functools.reduce(jnp.logical_or, [c != 0 for c in cotangents.values()])
        hidden = jnp.where(live[..., None], hidden, 0)
        if logits is None:
            logits = _logits(options, hidden, head, temperature)
        logp = logits - normalizer[..., None]
        slope = cotangents["logps"][..., None]
        if options.entropy:
            slope = slope + cotangents["entropy"][..., None] * (logp + said["entropy"][..., None])
        if options.kl:
            there = jnp.where(live[..., None], reference[0], 0)
            gap = logp - jax.nn.log_softmax(_logits(options, there, far, temperature))
            slope = slope - cotangents["kl"][..., None] * (gap - said["kl"][..., None])
        chosen = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
        d_logits = jnp.where(chosen, cotangents["logps"][..., None], 0) - jnp.exp(logp) * slope
        scale = temperature[..., None]
        if options.softcap is not None:
            d_logits *= 1 - (logits * scale / options.softcap) ** 2
        d_logits = jnp.where(live[..., None], d_logits / scale, 0).astype(jnp.result_type(hidden, head))
        d_hidden = jnp.einsum("...tv,ev->...te", d_logits, head, preferred_element_type=jnp.float32)
        axes = tuple(range(hidden.ndim - 1))
        d_head = jnp.tensordot(hidden, d_logits, (axes, axes), preferred_element_type=jnp.float32)
        return d_hidden.astype(hidden.dtype), d_head

    if options.count == 1:
        d_hidden, d_head = pull(logits, local)
    else:

        def step(total: Array, index: Array) -> tuple[Array, Array]:
            d_hidden, d_head = pull(None, _at(options, local, index))
            return total + d_head, d_hidden

        # The sum over no positions: zeros that vary over the mesh as the sum does, which shard_map asks of a carry.
        zero = pull(None, jax.tree.map(lambda x: jax.lax.slice_in_dim(x, 0, 0, axis=options.axis), local))[1]
        d_head, chunks = jax.lax.scan(step, zero, jnp.arange(options.count))
        d_hidden = _joined(options, chunks)
    return d_hidden, d_head.astype(head.dtype), None, None


_logps.defvjp(_forward, _backward)


def _logits(options: _Options, hidden: Array, head: Array, temperature: Array) -> Float[Array, "*rows T V"]:
    logits = jnp.einsum("...te,ev->...tv", hidden, head, preferred_element_type=jnp.float32)
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    return logits / temperature[..., None]


def _at(options: _Options, arrays: Any, index: Array) -> Any:
    """One chunk of each array, along the axis of decisions."""
    start = index * options.chunk
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, options.chunk, options.axis), arrays)


def _joined(options: _Options, chunks: Any) -> Any:
    """Chunks stacked in front, put back on the axis of decisions."""

    def join(x: Array) -> Array:
        moved, at = jnp.moveaxis(x, 0, options.axis), options.axis
        return moved.reshape(*moved.shape[:at], -1, *moved.shape[at + 2 :])

    return jax.tree.map(join, chunks)


def _pad(options: _Options, array: Array) -> Array:
    """Ones after the last decision, to whole chunks: a temperature of 1, and nothing counts without a cotangent."""
    missing = options.count * options.chunk - array.shape[options.axis]
    widths = [(0, missing if axis == options.axis else 0) for axis in range(array.ndim)]
    return jnp.pad(array, widths, constant_values=1) if missing else array


def _varying_alike(*arrays: Array) -> list[Array]:
    """The same arrays, each varying over the mesh as all of them together do.

    Under shard_map a custom gradient must vary as its argument does, and the gradient of a head that all devices share
    varies with the rows. Adding an empty sum of the others leaves the conversion, and the sum over devices that is its
    transpose, to JAX; compiled, it is nothing.
    """
    return [sum((jnp.sum(y[..., :0]).astype(x.dtype) for y in arrays if y is not x), start=x) for x in arrays]


def _check(
    hidden: Array,
    head: Array,
    targets: Array,
    temperature: Array,
    softcap: float | None,
    reference: tuple[Array, Array] | None,
    chunk: int | None,
) -> None:
    if hidden.shape[:-1] != targets.shape or head.ndim != 2 or hidden.shape[-1] != head.shape[0]:
        raise ValueError(
            "chunked_logps needs hidden [..., T, E], head [E, V] and targets [..., T], got "
            f"{list(hidden.shape)}, {list(head.shape)} and {list(targets.shape)}"
        )
    if reference is not None:
        there, far = map(jnp.shape, reference)
        if there[:-1] != targets.shape or len(far) != 2 or (there[-1], head.shape[1]) != far:
            raise ValueError(
                f"reference is (hidden [..., T, F], head [F, V]) with the T and V of the policy, here "
                f"{[*targets.shape, 'F']} and {['F', head.shape[1]]}; got {list(there)} and {list(far)}"
            )
    if temperature.shape not in ((), targets.shape[:-1]):
        raise ValueError(
            f"temperature is one value or one per row {list(targets.shape[:-1])}, got shape {list(temperature.shape)}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap bounds the logits and must be above 0 (None for no cap), got {softcap}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is a number of positions, at least 1 (None to choose it), got {chunk}")
