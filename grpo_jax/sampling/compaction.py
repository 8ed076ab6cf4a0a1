"""Rows that finish make room: the cells of the rows still being drawn, drawn together into fewer cells, in jit.

Cells lie [C, G], the rows of one context side by side, and so they stay: a context with more active rows than the
smaller grid is wide takes several slots of it, one with none takes none. `owners` [C] says whose each slot is.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from grpo_jax.models.folding import FOLDS, folds_of
from grpo_jax.types import PyTree

GRIDS = 18  # at most: each is the decode step compiled once more
FEWEST_DECISIONS = 256  # the tail of shorter rows does not pay for compiling the step again for every grid


class Grid(NamedTuple):
    """Cells: C contexts, a multiple of the devices that divide them, of G rows each."""

    contexts: int
    width: int
    shards: int = 1

    @property
    def rows(self) -> int:
        """On each device."""
        return self.contexts // self.shards * self.width

    def fits(self, active: Bool[Array, "C G"], owners: Int[Array, " C"]) -> Bool[Array, ""]:
        """Whether the active rows of a larger grid fit into this one."""
        return jnp.all(_asked(active, owners, self).slots.sum(axis=1) <= self.contexts // self.shards)


def ladder(
    contexts: int, width: int, decisions: int, *, context: int = 0, shards: int = 1, by_rows: bool = False
) -> list[Grid]:
    """Grids from the whole one down to a few rows, each with a step that takes a part of the time of the one before.

    by_rows: a step takes as long as its rows do and 8 more, for which the weights are read; five sixths of that time
    are then worth a grid, down to four rows on a device. Else it takes as long as reading the weights does, whatever
    the rows; halves are then enough, down to eight.
    context: tokens of a context. Narrow slots are filled best, as contexts lose their rows unevenly; but each holds its
    context's keys and values. There are about four slots for every context, or fewer, down to one, where the copies
    would take more than a quarter of the memory of the first smaller grid's own tokens.
    """
    grids, rows = [Grid(contexts, width, shards)], contexts * width / shards
    ratio, more, fewest = (1.2, 8, 4) if by_rows else (2.0, 0, 8)
    ratio = max(ratio, ((rows + more) / (fewest + more)) ** (1 / (GRIDS - 1)))
    smaller = lambda rows: (rows + more) / ratio - more  # noqa: E731
    room = smaller(rows) * shards * decisions / (4 * max(context, 1))
    slots = min(4 * contexts, max(contexts, room)) / shards
    while decisions >= FEWEST_DECISIONS and round(rows := smaller(rows)) >= fewest:
        while width > 1 and math.ceil(rows / -(-width // 2)) < 2 * slots:
            width = -(-width // 2)
        grid, last = Grid(math.ceil(rows / width) * shards, width, shards), grids[-1]
        if grid.contexts * grid.width < 0.9 * last.contexts * last.width:  # not so where few wide slots round up
            grids.append(grid)
    return grids


def can_fold(grids: list[Grid]) -> bool:
    """Whether the last of these grids has few enough rows for `FOLDS` times the columns, and the wider slots of those
    between begin with one."""
    places = grids[0].rows
    few = [grid for grid in grids if folds_of(grid.rows, places) > 1]
    return folds_of(grids[-1].rows, places) == FOLDS and all(places // FOLDS % grid.width == 0 for grid in few)


class Regrouped(NamedTuple):
    """Where the cells of a smaller grid come from, each device's own; -1 = empty."""

    grid: Grid
    cells: Int[Array, "S n"]
    contexts: Int[Array, "S c"]

    def rows(self, x: Array, axis: int = 0) -> Array:
        """[..., C, G, ...] at `axis` as [..., c, g, ...]; what empty cells hold means nothing."""
        return _take(x, jnp.maximum(self.cells, 0), axis, 2, (self.grid.contexts, self.grid.width))

    def of_contexts(self, x: Array, axis: int = 0) -> Array:
        """[..., C, ...] at `axis` as [..., c, ...]."""
        return _take(x, self.contexts, axis, 1, (self.grid.contexts,))

    def there(self) -> Bool[Array, "c g"]:
        return self.cells.reshape(self.grid.contexts, self.grid.width) >= 0


def regroup(active: Bool[Array, "C G"], owners: Int[Array, " C"], grid: Grid) -> Regrouped:
    """Places for the active rows in a smaller grid; for those of the first contexts, as far as they fit."""
    shards, (c, g) = grid.shards, active.shape
    asked = _asked(active, owners, grid)
    first = jnp.cumsum(asked.slots, axis=1) - asked.slots
    first = jnp.sum(asked.same * first[:, None], axis=2, where=asked.slots[:, None] > 0)
    by_shard = active.reshape(shards, c // shards, g)
    rank = asked.earlier[..., None] + jnp.cumsum(by_shard, axis=2) - 1
    slot = first[..., None] + rank // grid.width
    size = grid.contexts // grid.shards
    at = jnp.where(by_shard, slot * grid.width + rank % grid.width, size * grid.width).reshape(shards, -1)
    local = jnp.arange(at.shape[1], dtype=jnp.int32)

    def place(at: Int[Array, " n"], slot: Int[Array, " n"]) -> tuple[Array, Array]:
        cells = jnp.full(size * grid.width, -1, jnp.int32).at[at].set(local, mode="drop")
        contexts = jnp.zeros(size, jnp.int32).at[slot].set(local // g, mode="drop")
        return cells, contexts

    cells, contexts = jax.vmap(place)(at, jnp.where(by_shard, slot, size).reshape(shards, -1))
    return Regrouped(grid, cells, contexts)


def put_back(whole: PyTree, parts: PyTree, rows: Int[Array, "C G"]) -> PyTree:
    """`whole` [N, ...] with the values of the cells at their rows; cells with a row of N hold none."""
    return jax.tree.map(lambda w, p: w.at[rows.reshape(-1)].set(p.reshape(-1, *w.shape[1:]), mode="drop"), whole, parts)


class _Asked(NamedTuple):
    """What a smaller grid is asked for, by each slot of the larger one."""

    same: Bool[Array, "S c c"]  # both are one context's
    earlier: Int[Array, "S c"]  # active rows in the slots of the same context that come before
    slots: Int[Array, "S c"]  # of the smaller grid: the context's first asks for all of them, the others for none


def _asked(active: Bool[Array, "C G"], owners: Int[Array, " C"], grid: Grid) -> _Asked:
    owners, rows = (x.reshape(grid.shards, -1) for x in (owners, active.sum(axis=1)))
    same = owners[:, :, None] == owners[:, None, :]
    before = jnp.tril(same, -1)
    slots = -(-jnp.sum(same * rows[:, None], axis=2) // grid.width)
    return _Asked(same, jnp.sum(before * rows[:, None], axis=2), jnp.where(before.any(axis=2), 0, slots))


def _take(x: Array, index: Int[Array, "S n"], axis: int, ndim: int, shape: tuple[int, ...]) -> Array:
    """Entries of each shard's own run; `ndim` axes from `axis` on are one run cut over the shards."""
    shards, before, after = index.shape[0], x.shape[:axis], x.shape[axis + ndim :]
    parts = x.reshape(*before, shards, -1, *after)
    pick: Any = jax.vmap(lambda part, at: jnp.take(part, at, axis=axis, mode="clip"), in_axes=(axis, 0), out_axes=axis)
    return pick(parts, index).reshape(*before, *shape, *after)
