"""The in-graph group sampler: prefill, decode loop, sampling, stops and log-probs in one program.

Cells are laid out [C, G]: the rows of one context lie side by side, so that its keys and values are computed and stored
once and read by one matrix product for all of them. A row's first input is its context's last token; column t of a row
holds the input from which decision t is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models import KeysValues, merge, softcap
from grpo_jax.models.cached import moved
from grpo_jax.models.evaluate import logps_of
from grpo_jax.models.exact import in_tiles
from grpo_jax.models.folding import columns_at_first, folds_of
from grpo_jax.models.kernels import on_cpu
from grpo_jax.sampling.choice import Chosen, choose, restrict
from grpo_jax.sampling.compaction import Grid, Regrouped, ladder, put_back, regroup
from grpo_jax.types import Key, PyTree

Restricts = tuple[str, ...]
READ = 2**17  # scores of a row and head at a time while given decisions are read: so many columns times all there are


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


@partial(jax.jit, static_argnames=("graphdef", "restricts", "has_given", "shards", "folds"))
def draw(
    graphdef,
    params: PyTree,
    cells: Cells,
    key: Key,
    *,
    restricts: Restricts,
    has_given: bool,
    shards: int = 1,
    folds: int = 1,
) -> Drawn:
    """Fill every cell up to a stop or its budget.

    The token at (prompt, index, t) is drawn with the key folded from those three, whatever cell it sits in. As rows
    finish, the others go on in fewer and fewer cells, each device's among themselves.

    restricts: which of "top_k", "top_p", "min_p" and "min_new" any row has (static; what none has costs nothing).
    has_given: whether any row has given decisions (static; they are read, and scored, some columns at a time).
    shards: devices over which the contexts are divided (static).
    folds: 1; or `FOLDS`, for memory of a quarter of all columns, where nothing is given (static). Rows go on beyond
    it, and beyond its double, as far as no more than a half, and a quarter, of them is left; others come back
    unfinished. `compaction.can_fold` says for which cells.
    """
    model = merge(graphdef, params)
    c, g, t_max = cells.given.shape
    prefix = _of_contexts(model, cells, may_be_empty=has_given)
    owners, rows = jnp.arange(c, dtype=jnp.int32), jnp.arange(c * g, dtype=jnp.int32).reshape(c, g)
    table = _Table(cells, prefix, owners, rows, _row_keys(key, cells))
    loop = _begin(model, table, has_given, shards, folds)
    results = jax.tree.map(lambda x: x.reshape(c * g, *x.shape[2:]), loop.drawn)
    grids = grids_of(c, g, t_max, cells.contexts.shape[1], shards)
    for grid, smaller, end in zip(grids, [*grids[1:], None], columns_of(grids, t_max, folds)):
        if grid is not grids[0]:
            results = put_back(results, loop.drawn, table.rows)
            table, loop = _regrouped(table, loop, regroup(loop.active, table.owners, grid), folds)
        step = partial(_step, model, table, restricts, folds)
        loop = jax.lax.while_loop(partial(_goes_on, end, table.owners, smaller), step, loop)
    results = put_back(results, loop.drawn, table.rows)
    return jax.tree.map(lambda x: x.reshape(c, g, *x.shape[1:]), results)


def grids_of(contexts: int, width: int, decisions: int, context: int, shards: int) -> list[Grid]:
    """The grids in which `draw` draws, one after the other."""
    return ladder(contexts, width, decisions, context=context, shards=shards, by_rows=on_cpu())


def columns_of(grids: list[Grid], decisions: int, folds: int) -> list[int]:
    """Up to which column each of them draws."""
    room, places = columns_at_first(decisions, folds), grids[0].rows
    return [min(decisions, room * (folds_of(grid.rows, places) if folds > 1 else 1)) for grid in grids]


def read_at_once(decisions: int, context: int) -> int:
    """How many given decisions of each row."""
    return min(decisions, max(8, READ // max(decisions, context)))


class _Table(NamedTuple):
    """The rows in hand and what stays of them: cells, prefixes, numbers of contexts and rows among all, and keys."""

    cells: Cells
    prefix: KeysValues
    owners: Int[Array, " C"]
    rows: Int[Array, "C G"]
    keys: Key  # [C, G]


class _Loop(NamedTuple):
    """What changes: decisions up to `column` are there, and `inputs` says from which token the next is made."""

    column: Int[Array, ""]
    inputs: Int[Array, "C G"]
    own: KeysValues
    active: Bool[Array, "C G"]
    drawn: Drawn


def _of_contexts(model, cells: Cells, *, may_be_empty: bool) -> KeysValues:
    """Keys and values of the contexts. may_be_empty: nothing is computed where all cells are padding."""
    arguments = cells.contexts, jnp.maximum(cells.context_lengths - 1, 0)
    if not may_be_empty:
        return model.prefill(*arguments)
    nothing = lambda *_: jax.tree.map(jnp.zeros_like, jax.eval_shape(model.prefill, *arguments))  # noqa: E731
    return jax.lax.cond(jnp.any(cells.budget > 0), model.prefill, nothing, *arguments)


def _begin(model, table: _Table, has_given: bool, shards: int, folds: int) -> _Loop:
    """Nothing is drawn; given decisions are in the cache and scored."""
    cells, (c, g, t_max) = table.cells, table.cells.given.shape
    own = model.empty(c, g, columns_at_first(t_max, folds), table.prefix.keys.dtype, shards=shards)
    wants_more, start, first = cells.budget > cells.given_lengths, jnp.zeros((), jnp.int32), _first_inputs(cells)
    nothing = jnp.zeros((c, g, t_max), jnp.float32)
    drawn = Drawn(
        tokens=cells.given,
        lengths=jnp.minimum(cells.given_lengths, cells.budget),
        finished=~wants_more & _ends_in_stop(cells.given, cells.given_lengths - 1, cells),
        behavior_logps=nothing,
        sampler_logps=nothing,
    )
    if has_given:
        inputs = jnp.concatenate([first[..., None], cells.given[..., :-1]], axis=-1)
        own, logps = _read(model, table, inputs, own)
        there = jnp.arange(t_max) < cells.given_lengths[..., None]
        drawn = drawn._replace(sampler_logps=jnp.where(there, logps, 0.0))
        start = jnp.min(jnp.where(wants_more, cells.given_lengths, t_max))
        first = jax.lax.dynamic_index_in_dim(inputs, start, axis=2, keepdims=False)
    return _Loop(start, first, own, wants_more, drawn)


def _read(
    model, table: _Table, inputs: Int[Array, "C G T"], own: KeysValues
) -> tuple[KeysValues, Float[Array, "C G T"]]:
    """The cache with what is given in it, and the log-probs of that: some columns at a time, up to the last given."""
    cells, T = table.cells, inputs.shape[2]
    size = read_at_once(T, cells.contexts.shape[1])

    def some(read: tuple[Array, KeysValues, Array]) -> tuple[Array, KeysValues, Array]:
        column, own, logps = read
        column = jnp.minimum(column, T - size)
        tokens, given = (jax.lax.dynamic_slice_in_dim(x, column, size, axis=2) for x in (inputs, cells.given))
        hidden, own = model.decode(tokens, table.prefix, cells.context_lengths - 1, own, column)
        said, _ = logps_of(model, hidden, given, _scale(cells), axis="S")
        return column + size, own, jax.lax.dynamic_update_slice_in_dim(logps, said, column, axis=2)

    start = jnp.zeros((), jnp.int32), own, jnp.zeros(inputs.shape, jnp.float32)
    return jax.lax.while_loop(lambda read: read[0] < jnp.max(cells.given_lengths), some, start)[1:]


def _goes_on(end: int, owners: Int[Array, " C"], smaller: Grid | None, loop: _Loop) -> Bool[Array, ""]:
    """Until all rows are finished, or the active ones fit into the next smaller grid, or there are no more columns."""
    more = jnp.any(loop.active) & (loop.column < end)
    return more if smaller is None else more & ~smaller.fits(loop.active, owners)


def _step(model, table: _Table, restricts: Restricts, folds: int, loop: _Loop) -> _Loop:
    """One more decision of every active row."""
    cells, t, drawn = table.cells, loop.column, loop.drawn
    lengths = cells.context_lengths - 1
    hidden, own = model.decode(loop.inputs[..., None], table.prefix, lengths, loop.own, t, folds=folds)
    drawn_now = _choose(model, hidden.reshape(-1, hidden.shape[-1]), cells, table.keys, t, restricts)
    token, behavior, policy = (x.reshape(loop.active.shape) for x in drawn_now)
    if model.config.exact:
        logps, _ = logps_of(model, hidden[:, :, 0], token, _scale(cells), axis="S")
        behavior, policy = jnp.where((behavior == policy) & (cells.temperature > 0), logps, behavior), logps
    chosen = loop.active & (t >= cells.given_lengths)
    tokens = _write(drawn.tokens, token, t, chosen)
    stopped = chosen & (t >= cells.minimum) & _ends_in_stop(tokens, jnp.broadcast_to(t, chosen.shape), cells)
    exists, inputs = t + 1, jax.lax.dynamic_index_in_dim(tokens, t, axis=2, keepdims=False)
    drawn = Drawn(
        tokens=tokens,
        lengths=jnp.where(chosen, exists, drawn.lengths),
        finished=drawn.finished | stopped,
        behavior_logps=_write(drawn.behavior_logps, behavior, t, chosen),
        sampler_logps=_write(drawn.sampler_logps, policy, t, chosen),
    )
    return _Loop(exists, inputs, own, loop.active & ~stopped & (exists < cells.budget), drawn)


def _regrouped(table: _Table, loop: _Loop, places: Regrouped, folds: int) -> tuple[_Table, _Loop]:
    """The active rows in the cells of a smaller grid."""
    apart = ("contexts", "context_lengths", "stops")  # the contexts are in the prefix, and no longer needed
    rows = {name: places.rows(x) for name, x in table.cells._asdict().items() if name not in apart}
    cells = table.cells._replace(context_lengths=places.of_contexts(table.cells.context_lengths), **rows)
    prefix = jax.tree.map(lambda x: places.of_contexts(x, axis=1), table.prefix)
    numbers = jnp.where(places.there(), places.rows(table.rows), jnp.iinfo(jnp.int32).max)
    before = loop.active.size // places.grid.shards
    own = moved(loop.own, jnp.maximum(places.cells, 0), before, loop.column, folds=folds)
    drawn = jax.tree.map(places.rows, loop.drawn)
    active = places.rows(loop.active) & places.there()
    table = _Table(cells, prefix, places.of_contexts(table.owners), numbers, places.rows(table.keys))
    return table, _Loop(loop.column, places.rows(loop.inputs), own, active, drawn)


def _first_inputs(cells: Cells) -> Int[Array, "C G"]:
    """A row's first input is its context's last token."""
    last = jnp.take_along_axis(cells.contexts, jnp.maximum(cells.context_lengths - 1, 0)[:, None], axis=1)
    return jnp.broadcast_to(last, cells.budget.shape)


def _scale(cells: Cells) -> Float[Array, "C G"]:
    return jnp.where(cells.temperature > 0, cells.temperature, 1.0)


def _row_keys(key: Key, cells: Cells) -> Key:
    fold = jax.vmap(jax.vmap(lambda p, i: jax.random.fold_in(jax.random.fold_in(key, p), i)))
    return fold(cells.prompt_ids, cells.index)


def _choose(model, hidden: Float[Array, "N E"], cells: Cells, row_keys: Key, t: Array, restricts: Restricts) -> Chosen:
    """One token per row; the two random numbers of row and decision come from a key of their own."""
    uniforms = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t), (2,)))(row_keys.reshape(-1))
    asked = {name: getattr(cells, name).reshape(-1) for name in ("top_k", "top_p", "min_p") if name in restricts}
    if "min_new" in restricts:
        asked["forbidden"] = ((t < cells.minimum).reshape(-1) & _stop_tokens(cells, model.config.vocab_size)).T
    asked |= {"scale": _scale(cells).reshape(-1), "greedy": cells.temperature.reshape(-1) == 0, "uniforms": uniforms}
    if not model.config.exact:
        return _chosen(model.config.final_softcap, model.logits(hidden), **asked)
    tile = partial(_chosen_in_tile, model.config.final_softcap, tuple(asked))
    return in_tiles(tile, hidden, *asked.values(), weights=model.head(), axis="S")


def _chosen(cap: float | None, logits: Float[Array, "V N"], *, scale, greedy, uniforms, **asked: Array) -> Chosen:
    scaled = softcap(logits, cap) / scale
    if "forbidden" in asked:
        asked["forbidden"] = asked["forbidden"].T
    allowed = restrict(scaled, **asked) if asked else None
    return choose(scaled, uniforms, greedy=greedy, allowed=allowed)


def _chosen_in_tile(cap: float | None, names: Sequence[str], head: Array, hidden: Array, *asked: Array) -> Chosen:
    logits = jnp.einsum("ne,ev->vn", hidden, head, preferred_element_type=jnp.float32)
    return _chosen(cap, logits, **dict(zip(names, asked)))


def _stop_tokens(cells: Cells, v: int) -> Bool[Array, "V N"]:
    """The tokens that end a row by themselves."""
    single = (cells.stops >= 0).sum(axis=1) == 1
    at = jnp.where(single, cells.stops[:, -1], v)
    apply = (cells.stops_apply & single).reshape(-1, len(at)).T
    return jnp.zeros((v + 1, apply.shape[1]), bool).at[at].max(apply)[:v]


def _write(values: Array, new: Array, t: Array, where: Bool[Array, "C G"]) -> Array:
    old = jax.lax.dynamic_index_in_dim(values, t, axis=2, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(values, jnp.where(where, new, old), t, axis=2)


def _ends_in_stop(tokens: Int[Array, "C G T"], last: Int[Array, "C G"], cells: Cells) -> Bool[Array, "C G"]:
    """Whether the decisions up to `last` (-1: none) end in a stop sequence that applies to the row."""
    places = last[..., None] - jnp.arange(cells.stops.shape[1] - 1, -1, -1)
    window = jnp.where(places >= 0, jnp.take_along_axis(tokens, jnp.maximum(places, 0), axis=2), -2)
    match = (window[:, :, None, :] == cells.stops) | (cells.stops < 0)
    return jnp.any(jnp.all(match, axis=-1) & cells.stops_apply, axis=-1)
