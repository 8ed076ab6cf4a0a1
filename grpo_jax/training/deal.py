"""Which rows go into which update and which micro-batch. Host only, numpy.

A micro-batch is `[C, G]` cells: G rows side by side under each of C contexts, so that a context is computed once. Rows
without weight are left out; groups are never split between updates.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from grpo_jax.sampling.requests import side_by_side


class Layout(NamedTuple):
    """The static shape of training: contexts and rows per context of one micro-batch, over the whole mesh."""

    contexts: int  # C, a multiple of the number of row shards
    rows: int  # G
    context_width: int  # P
    decisions: int  # T
    sweeps: int = 1  # micro-batches of one update


class Part(NamedTuple):
    """Rows of one forward and backward sweep: `order[m, c, g]` is a row number, -1 = padding.

    Only the first `count` micro-batches hold rows; the others are there to keep the shape.
    """

    order: np.ndarray  # [M, C, G]
    count: int


def choose_layout(
    *, group_size: int, prompts: int, context_width: int, decisions: int, tokens_per_device: int, shards: int = 1
) -> Layout:
    """As many contexts with their groups as `tokens_per_device` holds on each shard; a large group is cut to fit.

    prompts: groups of one update.

    Raises: ValueError if not even one row with its context fits.
    """
    one = context_width + decisions
    if tokens_per_device < one:
        raise ValueError(
            f"tokens_per_device is {tokens_per_device}, but one prompt with one completion takes up to {one} tokens "
            f"({context_width} + {decisions}): raise it to at least {one}, or shorten max_prompt or max_new"
        )
    rows = min(group_size, (tokens_per_device - context_width) // decisions)
    rows = -(-group_size // -(-group_size // rows))  # the fewest cuts, evenly
    per_shard = tokens_per_device // (context_width + rows * decisions)
    needed = -(-prompts * -(-group_size // rows) // shards)
    sweeps = -(-needed // per_shard)
    return Layout(-(-needed // sweeps) * shards, rows, context_width, decisions, sweeps)


def lay_out(under: np.ndarray, rows: np.ndarray, layout: Layout, *, capacity: int = 1) -> Part:
    """Cells for these rows, those of one context side by side. `capacity`: the fewest micro-batches in its shape."""
    contexts, first, owners = np.unique(np.asarray(under)[rows], return_index=True, return_inverse=True)
    rank = np.empty(len(contexts), np.int64)
    rank[np.argsort(first)] = np.arange(len(contexts))
    table = side_by_side(rank[owners], width=layout.rows, of=1)
    count = -(-len(table) // layout.contexts)
    sweeps = max(capacity, 1)
    while sweeps < count:
        sweeps *= 2
    order = np.full((sweeps * layout.contexts, layout.rows), -1, np.int32)
    order[: len(table)] = np.where(table < 0, -1, np.append(rows, -1)[table])
    return Part(order.reshape(sweeps, layout.contexts, layout.rows), count)


def deal(
    *, weights: np.ndarray, group_ids: np.ndarray, update_ids: np.ndarray, updates: int, seed: np.random.SeedSequence
) -> list[np.ndarray]:
    """The rows of each optimiser step, in order; rows of weight 0 are in none.

    Rows with an update id go where it says, ascending. Without any they are dealt by whole groups, in a shuffled order,
    into `updates` parts of about equal numbers of groups. With one update nothing is shuffled.

    Raises: ValueError if some rows have an update id and others have none.
    """
    weights, group_ids, update_ids = map(np.asarray, (weights, group_ids, update_ids))
    rows = np.flatnonzero(weights != 0)
    asked = np.unique(update_ids[rows])
    if (asked >= 0).any():
        if asked[0] < 0:
            lacking = int((update_ids[rows] < 0).sum())
            raise ValueError(
                f"update_ids say which optimiser step a row goes to, for all rows or for none (-1): {lacking} of "
                f"{len(rows)} rows have none"
            )
        return [rows[update_ids[rows] == u] for u in asked]
    if updates == 1:
        return [rows] if len(rows) else []
    ids = group_ids[rows]
    alone = np.where(ids < 0, len(weights) + np.arange(len(rows)), ids)  # a row of no group is dealt by itself
    names, inverse = np.unique(alone, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    share = np.array_split(order, min(updates, len(names)) or 1)
    parts = [rows[np.isin(inverse, s)] for s in share]
    return [p for p in parts if len(p)]
