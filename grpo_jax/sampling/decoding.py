"""The in-graph group sampler: prefill, decode loop, sampling, stops and log-probs in one program.

Cells are laid out [C, G]: the rows of one context lie side by side, so that its keys and values are computed and stored
once and read by one matrix product for all of them. A row's first input is its context's last token; column t of a row
holds the input from which decision t is made.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.losses import chunk_length, chunked_logps
from grpo_jax.models import KeysValues, merge, softcap
from grpo_jax.types import Key, PyTree


class Cells(NamedTuple):
    """What is asked of the sampler. A cell with budget 0 is padding."""

    contexts: Int[Array, "C P"]
    context_lengths: Int[Array, " C"]
    given: Int[Array, "C G T"]  # decisions that are there already
    given_lengths: Int[Array, "C G"]
    budget: Int[Array, "C G"]  # decisions at most, given ones included
    minimum: Int[Array, "C G"]  # no stop before that many decisions, given ones included
    temperature: Float[Array, "C G"]  # 0 = greedy
    top_k: Int[Array, "C G"]  # 0 = all
    top_p: Float[Array, "C G"]
    min_p: Float[Array, "C G"]
    prompt_ids: Int[Array, "C G"]
    index: Int[Array, "C G"]
    stops: Int[Array, "S W"]  # stop sequences, aligned to the right, -1 before them
    stops_apply: Bool[Array, "C G S"]


class Drawn(NamedTuple):
    """What comes back. Log-probs of decisions that do not exist are 0; `behavior_logps` of given ones are 0 too."""

    tokens: Int[Array, "C G T"]
    lengths: Int[Array, "C G"]
    finished: Bool[Array, "C G"]
    behavior_logps: Float[Array, "C G T"]
    sampler_logps: Float[Array, "C G T"]


@partial(jax.jit, static_argnames=("graphdef", "restricts", "has_given"))
def draw(graphdef, params: PyTree, cells: Cells, key: Key, *, restricts: bool, has_given: bool) -> Drawn:
    """Fill every cell up to a stop or its budget.

    The token at (prompt, index, t) is drawn with the key folded from those three, whatever cell it sits in.

    restricts: whether any row has top-k, top-p, min-p or a minimum length (static; without it nothing is sorted).
    has_given: whether any row has given decisions (static; they are scored in one parallel pass).
    """
    model = merge(graphdef, params)
    c, g, t_max = cells.given.shape
    head, cap = model.head(), model.config.final_softcap
    prefix_lengths = cells.context_lengths - 1
    last = jnp.take_along_axis(cells.contexts, jnp.maximum(prefix_lengths, 0)[:, None], axis=1)
    first = jnp.broadcast_to(last[:, :, None], (c, g, 1))
    prefix = model.prefill(cells.contexts, jnp.maximum(prefix_lengths, 0))
    own = model.empty(c, g, t_max, prefix.keys.dtype)
    row_keys = _row_keys(key, cells.prompt_ids, cells.index)
    scale = jnp.where(cells.temperature > 0, cells.temperature, 1.0)

    sampler_logps = jnp.zeros((c, g, t_max), jnp.float32)
    wants_more = cells.budget > cells.given_lengths
    start = jnp.zeros((), jnp.int32)
    if has_given:
        inputs = jnp.concatenate([first, cells.given[..., :-1]], axis=-1)
        hidden, own = model.decode(inputs, prefix, prefix_lengths, own, start)
        there = jnp.arange(t_max) < cells.given_lengths[..., None]
        chunk = chunk_length(c * g, *head.shape)  # cells may be divided over devices
        logps, _ = chunked_logps(hidden, head, cells.given, temperature=scale, softcap=cap, chunk=chunk)
        sampler_logps = jnp.where(there, logps, 0.0)
        start = jnp.min(jnp.where(wants_more, cells.given_lengths, t_max))

    class Loop(NamedTuple):
        column: Int[Array, ""]
        own: KeysValues
        active: Bool[Array, "C G"]
        drawn: Drawn

    def step(loop: Loop) -> Loop:
        t, drawn = loop.column, loop.drawn
        before = jax.lax.dynamic_index_in_dim(drawn.tokens, jnp.maximum(t - 1, 0), axis=2)
        hidden, own = model.decode(jnp.where(t == 0, first, before), prefix, prefix_lengths, loop.own, t)
        logits = jnp.einsum("cge,ev->cgv", hidden[:, :, 0], head, preferred_element_type=jnp.float32)
        scaled = softcap(logits, cap) / scale[..., None]
        token, behavior, sampler = _choose(scaled, cells, row_keys, t, restricts)
        chosen = loop.active & (t >= cells.given_lengths)
        tokens = _write(drawn.tokens, token, t, chosen)
        stopped = chosen & (t >= cells.minimum) & _ends_in_stop(tokens, jnp.broadcast_to(t, (c, g)), cells)
        exists = t + 1
        lengths = jnp.where(chosen, exists, drawn.lengths)
        drawn = Drawn(
            tokens=tokens,
            lengths=lengths,
            finished=drawn.finished | stopped,
            behavior_logps=_write(drawn.behavior_logps, behavior, t, chosen),
            sampler_logps=_write(drawn.sampler_logps, sampler, t, chosen),
        )
        return Loop(exists, own, loop.active & ~stopped & (exists < cells.budget), drawn)

    begun = Drawn(
        tokens=cells.given,
        lengths=jnp.minimum(cells.given_lengths, cells.budget),
        finished=~wants_more & _ends_in_stop(cells.given, cells.given_lengths - 1, cells),
        behavior_logps=jnp.zeros((c, g, t_max), jnp.float32),
        sampler_logps=sampler_logps,
    )
    loop = Loop(start, own, wants_more, begun)
    return jax.lax.while_loop(lambda s: jnp.any(s.active) & (s.column < t_max), step, loop).drawn


def _row_keys(key: Key, prompt_ids: Int[Array, "C G"], index: Int[Array, "C G"]) -> Key:
    fold = jax.vmap(lambda p, i: jax.random.fold_in(jax.random.fold_in(key, p), i))
    return fold(prompt_ids.reshape(-1), index.reshape(-1))


def _choose(scaled: Float[Array, "C G V"], cells: Cells, row_keys: Key, t: Array, restricts: bool):
    """One token per row by the Gumbel maximum, its log-prob under what it was drawn from, and under the policy."""
    c, g, v = scaled.shape
    noise = jax.vmap(lambda k: jax.random.gumbel(jax.random.fold_in(k, t), (v,)))(row_keys).reshape(c, g, v)
    greedy = (cells.temperature == 0)[..., None]
    allowed = _restricted(scaled, cells, t) if restricts else scaled
    token = jnp.argmax(jnp.where(greedy, allowed, allowed + noise), axis=-1).astype(jnp.int32)
    policy = _pick(scaled, token) - jax.nn.logsumexp(scaled, axis=-1)
    behavior = _pick(allowed, token) - jax.nn.logsumexp(allowed, axis=-1) if restricts else policy
    return token, jnp.where(greedy[..., 0], 0.0, behavior), policy


def _pick(values: Float[Array, "C G V"], token: Int[Array, "C G"]) -> Float[Array, "C G"]:
    return jnp.take_along_axis(values, token[..., None], axis=-1)[..., 0]


def _restricted(scaled: Float[Array, "C G V"], cells: Cells, t: Array) -> Float[Array, "C G V"]:
    """-inf for stop tokens before the minimum length; then outside top-k, then top-p of what is left, then min-p."""
    v = scaled.shape[-1]
    single = (cells.stops >= 0).sum(axis=1) == 1
    at = jnp.where(single, cells.stops[:, -1], v)
    stop_tokens = jnp.zeros((*cells.budget.shape, v + 1), bool).at[..., at].max(cells.stops_apply & single)[..., :v]
    early = (t < cells.minimum)[..., None]
    scaled = jnp.where(early & stop_tokens, -jnp.inf, scaled)
    ordered = jnp.sort(scaled, axis=-1, descending=True)
    k = jnp.where(cells.top_k > 0, jnp.minimum(cells.top_k, v), v)[..., None]
    kept = jnp.where(jnp.arange(v) < k, ordered, -jnp.inf)
    mass = jax.nn.softmax(kept, axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass  # mass of the likelier tokens: the most likely one is always kept
    top_p = jnp.where(cells.top_p < 1, cells.top_p, jnp.inf)[..., None]  # at 1, rounding must not cut the tail
    kept = jnp.where((before < top_p) | (jnp.arange(v) == 0), kept, -jnp.inf)
    kept = jnp.where(kept >= kept[..., :1] + jnp.log(cells.min_p)[..., None], kept, -jnp.inf)
    lowest = jnp.min(jnp.where(kept > -jnp.inf, kept, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled >= lowest, scaled, -jnp.inf)


def _write(values: Array, new: Array, t: Array, where: Bool[Array, "C G"]) -> Array:
    old = jax.lax.dynamic_index_in_dim(values, t, axis=2, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(values, jnp.where(where, new, old), t, axis=2)


def _ends_in_stop(tokens: Int[Array, "C G T"], last: Int[Array, "C G"], cells: Cells) -> Bool[Array, "C G"]:
    """Whether the decisions up to `last` (-1: none) end in a stop sequence that applies to the row."""
    places = last[..., None] - jnp.arange(cells.stops.shape[1] - 1, -1, -1)
    window = jnp.where(places >= 0, jnp.take_along_axis(tokens, jnp.maximum(places, 0), axis=2), -2)
    match = (window[:, :, None, :] == cells.stops) | (cells.stops < 0)
    return jnp.any(jnp.all(match, axis=-1) & cells.stops_apply, axis=-1)
