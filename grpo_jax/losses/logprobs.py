"""Log-probs of chosen decisions from hidden states, without the [N, T, V] array of logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK_BYTES = 64 * 2**20

PyTree = Any


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
    chunk of the vocabulary at a time, forward and backward (recomputed there), so that each part of the head is read
    once, and its gradient written once, for all decisions. Decisions whose cotangent is 0 take no part in the backward
    pass, whatever they hold. Temperature and reference get no gradient: that of KL_t is the exact gradient of the
    reverse KL(p || q), the whole vocabulary at once.
    temperature: above 0, one value or one per row. chunk: tokens of the vocabulary at once; default: twice the features
    (then hidden states, read once per chunk, weigh no more than its logits), or what keeps the float32 logits within
    64 MiB or an eighth of the head's gradient, and 512 at least.
    Returns: (logps, {"entropy": ..., "kl": ...} as asked).
    Raises: ValueError if shapes do not fit, softcap <= 0 or chunk < 1.
    """
    hidden, head, targets = jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(targets)
    temperature = jnp.asarray(temperature, jnp.float32)
    _check(hidden, head, targets, temperature, softcap, reference, chunk)
    temperature = jax.lax.stop_gradient(jnp.broadcast_to(temperature[..., None], targets.shape))
    options = _Options(softcap, entropy, reference is not None, _cut(*head.shape, targets.size, chunk))
    hidden, head = _varying_alike(hidden, head)
    other = None if reference is None else jax.lax.stop_gradient(tuple(map(jnp.asarray, reference)))
    said = _logps(options, hidden, head, targets, temperature, other)
    return said.pop("logps"), said


class _Cut(NamedTuple):
    """How V tokens are cut: `ways` equal runs, of which a chunk takes `size` tokens each, `count` times, and the rest.

    A chunk of pieces from several runs divides over devices that divide the vocabulary.
    """

    ways: int
    size: int
    count: int
    rest: int

    def table(self, head: Float[Array, "E V"]) -> Float[Array, "W K E"]:
        return head.T.reshape(self.ways, -1, head.shape[0])

    def at(self, table: Array, start: Array | int, size: int) -> Float[Array, "W b E"]:
        return jax.lax.dynamic_slice_in_dim(table, start, size, axis=1)

    def tokens(self, start: Array | int, size: int) -> Int[Array, "W b"]:
        run = self.size * self.count + self.rest
        return jnp.arange(self.ways, dtype=jnp.int32)[:, None] * run + start + jnp.arange(size, dtype=jnp.int32)

    def fold(self, step: Callable[[PyTree, Array | int, int], PyTree], carry: PyTree) -> PyTree:
        """`step(carry, start, size)` for every chunk."""
        if self.count == 1:
            carry = step(carry, 0, self.size)
        elif self.count:
            carry = jax.lax.fori_loop(0, self.count, lambda i, x: step(x, i * self.size, self.size), carry)
        return step(carry, self.count * self.size, self.rest) if self.rest else carry

    @property
    def whole(self) -> bool:
        return self.count == 1 and not self.rest


def _cut(features: int, vocabulary: int, decisions: int, chunk: int | None) -> _Cut:
    if chunk is None:
        memory = max(CHUNK_BYTES, 4 * features * vocabulary // 8)
        chunk = max(512, min(2 * features, memory // (4 * max(decisions, 1))))
    if chunk >= vocabulary:
        return _Cut(1, vocabulary, 1, 0)
    ways = next(n for n in (16, 8, 4, 2, 1) if vocabulary % n == 0 and n <= chunk)
    size = chunk // ways
    return _Cut(ways, size, *divmod(vocabulary // ways, size))


class _Options(NamedTuple):
    softcap: float | None
    entropy: bool
    kl: bool
    cut: _Cut


class _Sums(NamedTuple):
    """What chunks add up to, against the largest logit so far: the mass sum exp(z - top), the target's logit, and for
    entropy and KL the sums of exp(z - top) (z - top) and of exp(z - top) (z - z of the reference)."""

    top: Array
    mass: Array
    chosen: Array
    spread: Array | None
    gap: Array | None
    far_top: Array | None
    far_mass: Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logps(options: _Options, hidden, head, targets, temperature, other) -> dict[str, Array]:
    return _forward(options, hidden, head, targets, temperature, other)[0]


def _forward(options: _Options, hidden: Array, head: Array, targets: Array, temperature: Array, other):
    cut = options.cut
    table, far = cut.table(head), None if other is None else cut.table(other[1])
    kept = []

    def step(sums: _Sums, start: Array | int, size: int) -> _Sums:
        z = _logits(options, hidden, cut.at(table, start, size), temperature)
        if cut.whole:
            kept.append(z)
        top = jnp.maximum(sums.top, z.max(axis=(-2, -1)))
        shrink = jnp.exp(sums.top - top)
        shifted = z - top[..., None, None]
        weights = jnp.exp(shifted)
        total = lambda x: x.sum(axis=(-2, -1))  # noqa: E731
        hit = targets[..., None, None] == cut.tokens(start, size)
        more = {}
        if options.entropy:
            moved = jnp.where(sums.mass > 0, sums.top - top, 0) * sums.mass
            more["spread"] = shrink * (sums.spread + moved) + total(weights * shifted)
        if options.kl:
            against = _logits(options, other[0], cut.at(far, start, size), temperature)
            far_top = jnp.maximum(sums.far_top, against.max(axis=(-2, -1)))
            more["gap"] = shrink * sums.gap + total(weights * (z - against))
            more["far_mass"] = sums.far_mass * jnp.exp(sums.far_top - far_top) + total(
                jnp.exp(against - far_top[..., None, None])
            )
            more["far_top"] = far_top
        chosen = sums.chosen + total(jnp.where(hit, z, 0))
        return sums._replace(top=top, mass=shrink * sums.mass + total(weights), chosen=chosen, **more)

    zero = jnp.zeros(targets.shape, jnp.float32) + _nothing(hidden, head, targets, temperature, other)
    lowest = zero - jnp.inf
    start = _Sums(
        lowest,
        zero,
        zero,
        zero if options.entropy else None,
        *((zero, lowest, zero) if options.kl else (None, None, None)),
    )
    sums = cut.fold(step, start)
    log_mass = jnp.log(sums.mass)
    # Less the largest first: a log-prob near 0 is then not the difference of two large numbers.
    said = {"logps": (sums.chosen - sums.top) - log_mass}
    if options.entropy:
        said["entropy"] = log_mass - sums.spread / sums.mass
    far_normalizer = None
    if options.kl:
        far_log_mass = jnp.log(sums.far_mass)
        far_normalizer = sums.far_top + far_log_mass
        said["kl"] = sums.gap / sums.mass - ((sums.top - sums.far_top) + (log_mass - far_log_mass))
    normalizers = sums.top + log_mass, far_normalizer
    logits = kept[0] if kept else None  # more than one chunk is never kept
    return said, (hidden, head, targets, temperature, other, normalizers, said, logits)


def _backward(options: _Options, kept: tuple, cotangents: dict[str, Array]):
    hidden, head, targets, temperature, other, (normalizer, far_normalizer), said, logits = kept
    cut, wide = options.cut, lambda x: x[..., None, None]
    live = functools.reduce(jnp.logical_or, [c != 0 for c in cotangents.values()])
    hidden = jnp.where(live[..., None], hidden, 0)
    table, far = cut.table(head), None if other is None else cut.table(other[1])
    there = None if other is None else jnp.where(live[..., None], other[0], 0)

    def step(carry: tuple[Array, Array], start: Array | int, size: int) -> tuple[Array, Array]:
        d_hidden, d_table = carry
        piece = cut.at(table, start, size)
        z = logits if cut.whole else _logits(options, hidden, piece, temperature)
        logp = z - wide(normalizer)
        slope = wide(cotangents["logps"])
        if options.entropy:
            slope = slope + wide(cotangents["entropy"]) * (logp + wide(said["entropy"]))
        if options.kl:
            gap = logp - (_logits(options, there, cut.at(far, start, size), temperature) - wide(far_normalizer))
            slope = slope - wide(cotangents["kl"]) * (gap - wide(said["kl"]))
        hit = wide(targets) == cut.tokens(start, size)
        d_z = jnp.where(hit, wide(cotangents["logps"]), 0) - jnp.exp(logp) * slope
        if options.softcap is not None:
            d_z *= 1 - (z * wide(temperature) / options.softcap) ** 2
        d_z = jnp.where(wide(live), d_z / wide(temperature), 0).astype(jnp.result_type(hidden, head))
        d_hidden += jnp.einsum("...twb,wbe->...te", d_z, piece, preferred_element_type=jnp.float32)
        axes = tuple(range(hidden.ndim - 1))
        # in this order it is the hidden states that a backend may have to transpose, not the larger d_z
        d_piece = jnp.tensordot(hidden, d_z, (axes, axes), preferred_element_type=jnp.float32).astype(head.dtype)
        return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_table, jnp.moveaxis(d_piece, 0, -1), start, axis=1)

    zero = _nothing(hidden, head, targets, temperature, other, *cotangents.values())
    start = jnp.zeros(hidden.shape, jnp.float32) + zero, jnp.zeros(table.shape, head.dtype) + zero.astype(head.dtype)
    d_hidden, d_table = cut.fold(step, start)
    return d_hidden.astype(hidden.dtype), d_table.reshape(-1, head.shape[0]).T, None, None, None


_logps.defvjp(_forward, _backward)


def _logits(options: _Options, hidden: Array, piece: Float[Array, "W b E"], temperature: Array) -> Array:
    logits = jnp.einsum("...te,wbe->...twb", hidden, piece, preferred_element_type=jnp.float32)
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    return logits / temperature[..., None, None]


def _nothing(*arrays: PyTree) -> Float[Array, ""]:
    """0, varying over the mesh as all of these together do, which shard_map asks of what a loop carries."""
    return sum(jnp.sum(x[..., :0]).astype(jnp.float32) for x in jax.tree.leaves(arrays))


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
        raise ValueError(f"chunk is a number of tokens of the vocabulary, at least 1 (None to choose it), got {chunk}")
