"""One token per row: which tokens may be drawn, and the draw. No sort, and one random number pair per row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Chosen(NamedTuple):
    """A token per row, and its log-probs under what it was drawn from and under the policy at the temperature."""

    token: Int[Array, "*rows"]
    behavior_logp: Float[Array, "*rows"]
    policy_logp: Float[Array, "*rows"]


def choose(
    scaled: Float[Array, "*rows V"],
    uniforms: Float[Array, "*rows 2"],
    *,
    greedy: Bool[Array, "*rows"],
    allowed: Float[Array, "*rows V"] | None = None,
) -> Chosen:
    """Draw by inverting the distribution function in two steps: a block of tokens by its mass, then a token within it.

    token ~ softmax(allowed), or the first of the likeliest tokens where `greedy` (its behaviour log-prob is 0).

    scaled: logits over temperature. uniforms: in [0, 1). allowed: `scaled` with -inf where no draw may fall; None: all.
    Two uniforms keep tokens as rare as 1e-14 apart, where one float32 number, or float32 Gumbel noise, ends at 1e-7.
    """
    drawn_from = scaled if allowed is None else allowed
    blocks = _blocks(drawn_from)
    tops, top, masses = _masses(blocks)
    block = _invert(masses, uniforms[..., 0])
    block = jnp.where(greedy, _first(tops == top), block)
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    place = jnp.where(greedy, _first(inside == top), _invert(jnp.exp(inside - top), uniforms[..., 1]))
    token = block * blocks.shape[-1] + place
    value = _pick(inside, place)
    behavior = (value - top[..., 0]) - jnp.log(masses.sum(axis=-1))
    policy = behavior
    if allowed is not None:
        _, top, masses = _masses(_blocks(scaled))
        policy = (_pick(scaled, token) - top[..., 0]) - jnp.log(masses.sum(axis=-1))
    return Chosen(token, jnp.where(greedy, 0.0, behavior), policy)


def restrict(
    scaled: Float[Array, "*rows V"],
    *,
    forbidden: Bool[Array, "*rows V"] | None = None,
    top_k: Int[Array, "*rows"] | None = None,
    top_p: Float[Array, "*rows"] | None = None,
    min_p: Float[Array, "*rows"] | None = None,
) -> Float[Array, "*rows V"]:
    """-inf at forbidden tokens; then outside the k likeliest; then outside the likeliest that hold p of what is left;
    then below min_p times the likeliest one's probability. Tokens as likely as the last one kept are kept too.

    top_k of 0, top_p of 1 and min_p of 0 keep all of a row; None of every row.
    """
    v = scaled.shape[-1]
    if forbidden is not None:
        scaled = jnp.where(forbidden, -jnp.inf, scaled)
    if top_k is not None:
        k = jnp.where(top_k > 0, jnp.minimum(top_k, v), v)
        scaled = _above(scaled, lambda more: more.sum(axis=-1) < k)
    top = scaled.max(axis=-1, keepdims=True)
    if top_p is not None:
        mass = jnp.exp(scaled - top)
        enough = jnp.where(top_p < 1, top_p, jnp.inf) * mass.sum(axis=-1)  # at 1, rounding must not cut the tail
        scaled = _above(scaled, lambda more: jnp.where(more, mass, 0.0).sum(axis=-1) < enough)
    if min_p is not None:
        scaled = jnp.where(scaled >= top + jnp.log(min_p)[..., None], scaled, -jnp.inf)
    return scaled


def _above(scaled: Float[Array, "*rows V"], goes_on: Callable[[Bool[Array, "*rows V"]], Bool[Array, "*rows"]]) -> Array:
    """-inf below the lowest value x for which `goes_on` still holds of the tokens likelier than x; the likeliest stay.

    The threshold is found bit by bit in the order of float32, so 32 passes find it exactly.
    """
    order = _ordered(scaled)

    def narrow(_: Int[Array, ""], bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # goes_on fails of tokens above `low`, and holds of those above `high`
        middle = low + (high - low) // 2
        holds = goes_on(order > middle[..., None])
        return jnp.where(holds, low, middle), jnp.where(holds, middle, high)

    highest = order.max(axis=-1)
    _, found = jax.lax.fori_loop(0, 32, narrow, (jnp.zeros_like(highest), highest))
    return jnp.where(order >= found[..., None], scaled, -jnp.inf)


def _ordered(values: Float[Array, "*rows V"]) -> Array:
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _blocks(values: Float[Array, "*rows V"]) -> Float[Array, "*rows B K"]:
    """V cut into B blocks of about the root of V; -inf after the last token. Blocks of whole vector registers, 128
    tokens, where V allows: others would be laid out anew on a TPU."""
    v = values.shape[-1]
    root = max(1, int(v**0.5))
    if v % 128 == 0:
        size = 128 * max(m for m in range(1, max(1, root // 128) + 1) if v // 128 % m == 0)
    else:
        size = root
    count = -(-v // size)
    missing = count * size - v
    if missing:
        values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)], constant_values=-jnp.inf)
    return values.reshape(*values.shape[:-1], count, size)


def _masses(blocks: Float[Array, "*rows B K"]) -> tuple[Array, Array, Array]:
    """The largest value of each block [*rows, B] and of all [*rows, 1], and each block's sum of exponentials."""
    tops = blocks.max(axis=-1)
    top = tops.max(axis=-1, keepdims=True)
    return tops, top, jnp.exp(blocks - top[..., None]).sum(axis=-1)


def _invert(masses: Float[Array, "*rows K"], uniform: Float[Array, "*rows"]) -> Int[Array, "*rows"]:
    """The place whose share of the summed masses holds `uniform`; never one without mass."""
    ends = jnp.where(masses > 0, jnp.cumsum(masses, axis=-1), -jnp.inf)
    return _first(ends > uniform[..., None] * ends.max(axis=-1, keepdims=True))


def _first(true: Bool[Array, "*rows K"]) -> Int[Array, "*rows"]:
    k = true.shape[-1]
    place = jnp.arange(k, dtype=jnp.int32)
    return jnp.minimum(jnp.where(true, place, k).min(axis=-1), k - 1)


def _pick(values: Float[Array, "*rows V"], token: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    return jnp.take_along_axis(values, token[..., None], axis=-1)[..., 0]
