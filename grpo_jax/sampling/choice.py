"""One token per row: which tokens may be drawn, and the draw. No sort, and one random number pair per row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LONG = 512  # tokens of a run, above which it is drawn from in two steps
TINY = float(jnp.finfo(jnp.float32).tiny)


class Chosen(NamedTuple):
    """A token per row, and its log-probs under what it was drawn from and under the policy at the temperature."""

    token: Int[Array, " N"]
    behavior_logp: Float[Array, " N"]
    policy_logp: Float[Array, " N"]


def choose(
    scaled: Float[Array, "V N"],
    uniforms: Float[Array, "N 2"],
    *,
    greedy: Bool[Array, " N"],
    allowed: Float[Array, "V N"] | None = None,
) -> Chosen:
    """Draw by inverting the distribution function in steps: a run of tokens by its mass, then what is in it likewise.

    token ~ softmax(allowed), or the first of the likeliest tokens where `greedy` (its behaviour log-prob is 0).

    scaled: logits over temperature, rows last, as a matrix product leaves them on a TPU: blocks are then there as
    they are needed. uniforms: in [0, 1). allowed: `scaled` with -inf where no draw may fall; None: all.
    Two uniforms keep tokens as rare as 1e-14 apart, where one float32 number, or float32 Gumbel noise, ends at 1e-7.
    """
    values = scaled if allowed is None else allowed
    runs = _runs(values)
    tops, top, masses = _masses(runs)
    run = jnp.where(greedy, _first(tops == top), _invert(masses, uniforms[:, 0]))
    left = jnp.stack([_left(masses, uniforms[:, 0], run), uniforms[:, 1]], axis=1)
    inside = _of(runs, run)
    place = _within(inside, top, left, greedy)
    token = run * runs.shape[1] + place
    behavior = _log_share(_pick(inside, place), top, masses)
    policy = behavior
    if allowed is not None:
        _, top, masses = _masses(_runs(scaled))
        policy = _log_share(_pick(scaled, token), top, masses)
    return Chosen(token, jnp.where(greedy, 0.0, behavior), policy)


def restrict(
    scaled: Float[Array, "V N"],
    *,
    forbidden: Bool[Array, "V N"] | None = None,
    top_k: Int[Array, " N"] | None = None,
    top_p: Float[Array, " N"] | None = None,
    min_p: Float[Array, " N"] | None = None,
) -> Float[Array, "V N"]:
    """-inf at forbidden tokens; then outside the k likeliest; then outside the likeliest that hold p of what is left;
    then below min_p times the likeliest one's probability. Tokens as likely as the last one kept are kept too.

    top_k of 0, top_p of 1 and min_p of 0 keep all of a row; None of every row.
    """
    v = scaled.shape[0]
    if forbidden is not None:
        scaled = jnp.where(forbidden, -jnp.inf, scaled)
    if top_k is not None:
        k = jnp.where(top_k > 0, jnp.minimum(top_k, v), v)
        scaled = _above(scaled, lambda more: more.sum(axis=0) < k)
    top = scaled.max(axis=0)
    if top_p is not None:
        mass = jnp.exp(scaled - top)
        enough = jnp.where(top_p < 1, top_p, jnp.inf) * mass.sum(axis=0)  # at 1, rounding must not cut the tail
        scaled = _above(scaled, lambda more: jnp.where(more, mass, 0.0).sum(axis=0) < enough)
    if min_p is not None:
        scaled = jnp.where(scaled >= top + jnp.log(min_p), scaled, -jnp.inf)
    return scaled


def _above(scaled: Float[Array, "V N"], goes_on: Callable[[Bool[Array, "V N"]], Bool[Array, " N"]]) -> Array:
    """-inf below the lowest value x for which `goes_on` still holds of the tokens likelier than x; the likeliest stay.

    The threshold is found bit by bit in the order of float32, so 32 passes find it exactly.
    """
    order = _ordered(scaled)

    def narrow(_: Int[Array, ""], bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # goes_on fails of tokens above `low`, and holds of those above `high`
        middle = low + (high - low) // 2
        holds = goes_on(order > middle)
        return jnp.where(holds, low, middle), jnp.where(holds, middle, high)

    highest = order.max(axis=0)
    _, found = jax.lax.fori_loop(0, 32, narrow, (jnp.zeros_like(highest), highest))
    return jnp.where(order >= found, scaled, -jnp.inf)


def _ordered(values: Float[Array, "V N"]) -> Array:
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _runs(values: Float[Array, "V N"]) -> Float[Array, "R K N"]:
    """V cut evenly into eight or sixteen runs, which devices that divide the vocabulary then have of their own; what is
    drawn does not depend on how many devices there are. Blocks of about V's root where that cannot be."""
    v = values.shape[0]
    runs = next((n for n in (16, 8) if v % n == 0 and n * n <= v), None)
    return _blocks(values) if runs is None else values.reshape(runs, v // runs, -1)


def _blocks(values: Float[Array, "K N"]) -> Float[Array, "B k N"]:
    """K cut into blocks of about its root, of whole vector registers where it is large; -inf after the last token."""
    root = max(1, int(len(values) ** 0.5))
    size = root if root < 64 else 128 * -(-root // 128)
    if missing := -len(values) % size:
        values = jnp.pad(values, ((0, missing), (0, 0)), constant_values=-jnp.inf)
    return values.reshape(-1, size, values.shape[-1])


def _masses(blocks: Float[Array, "B K N"]) -> tuple[Float[Array, "B N"], Float[Array, " N"], Float[Array, "B N"]]:
    """The largest value of each block and of all, and each block's sum of exponentials over the latter."""
    tops = blocks.max(axis=1)
    top = tops.max(axis=0)
    # otherwise XLA reads all values once more for what the masses sum to
    return tops, top, jax.lax.optimization_barrier(jnp.exp(blocks - top).sum(axis=1))


def _within(
    inside: Float[Array, "K N"], top: Float[Array, " N"], uniforms: Float[Array, "N 2"], greedy: Bool[Array, " N"]
) -> Int[Array, " N"]:
    """The place in a run; a long run is drawn from in two steps too."""
    first: Array | int = 0
    if len(inside) > LONG:
        blocks = _blocks(inside)
        tops, masses = blocks.max(axis=1), jnp.exp(blocks - top).sum(axis=1)
        block = jnp.where(greedy, _first(tops == top), _invert(masses, uniforms[:, 0]))
        inside, first = _of(blocks, block), block * blocks.shape[1]
    return first + jnp.where(greedy, _first(inside == top), _invert(jnp.exp(inside - top), uniforms[:, 1]))


def _of(blocks: Float[Array, "B K N"], block: Int[Array, " N"]) -> Float[Array, "K N"]:
    """Each row's block."""
    return jnp.where(jnp.arange(blocks.shape[0])[:, None, None] == block, blocks, 0).sum(axis=0)


def _left(masses: Float[Array, "K N"], uniform: Float[Array, " N"], place: Int[Array, " N"]) -> Float[Array, " N"]:
    """What a uniform that fell on a place still says: how far within it, which is uniform again."""
    ends = jnp.cumsum(masses, axis=0)
    share = (uniform * ends[-1] - _pick(ends - masses, place)) / jnp.maximum(_pick(masses, place), TINY)
    return jnp.clip(share, 0.0, 1 - 2.0**-24)


def _log_share(value: Float[Array, " N"], top: Float[Array, " N"], masses: Float[Array, "B N"]) -> Float[Array, " N"]:
    return (value - top) - jnp.log(masses.sum(axis=0))


def _invert(masses: Float[Array, "K N"], uniform: Float[Array, " N"]) -> Int[Array, " N"]:
    """The place whose share of the summed masses holds `uniform`; never one without mass."""
    ends = jnp.where(masses > 0, jnp.cumsum(masses, axis=0), -jnp.inf)
    return _first(ends > uniform * ends.max(axis=0))


def _first(true: Bool[Array, "K N"]) -> Int[Array, " N"]:
    k = true.shape[0]
    place = jnp.arange(k, dtype=jnp.int32)[:, None]
    return jnp.minimum(jnp.where(true, place, k).min(axis=0), k - 1)


def _pick(values: Float[Array, "K N"], place: Int[Array, " N"]) -> Float[Array, " N"]:
    return jnp.take_along_axis(values, place[None], axis=0)[0]
