"""A rollout as a batch on the mesh, in one of few sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from grpo_jax.training.deal import Layout
from grpo_jax.training.mesh import replicate
from grpo_jax.types import Batch, Contexts, Rollout

FILL = dict.fromkeys(("prompt_ids", "group_ids", "update_ids", "unit_ids"), -1)
FILL |= dict.fromkeys(("behavior_logps", "scores"), np.nan)
WIDE = {"completions", "completion_mask", "behavior_logps", "sampler_logps", "unit_ids"}


def put(rows: Rollout, layout: Layout, mesh: Mesh, *, updates: int) -> Batch:
    """Onto the mesh, padded to few sizes. Every array is replicated: statistics over rows are then the same bits
    whatever the mesh."""
    return replicate(padded(rows, layout, updates=updates), mesh)


def put_scores(rows: Rollout, batch: Batch, mesh: Mesh) -> Batch:
    """The batch of these rows with what reward functions have said of them since: scores, channels and columns."""
    sizes = rows.completions.shape, batch.completions.shape
    scores, columns = (replicate(_resized(x, *sizes), mesh) for x in ({"scores": rows.scores}, rows.columns))
    return batch.replace(**scores, columns=columns, channels=rows.channels, channel_weights=rows.channel_weights)


def padded(rows: Rollout, layout: Layout, *, updates: int) -> Batch:
    """Padding rows weigh nothing and stand in no group. Empty completions get weight 0."""
    n, t = rows.completions.shape
    c, p = rows.contexts.tokens.shape
    slots = layout.contexts * layout.sweeps * updates  # what a whole step fills: fewer rows do not change a shape
    size, contexts_size = _fit(n, slots * layout.rows), _fit(c, slots)
    decisions, context_width = _fit(t, layout.decisions), _fit(p, layout.context_width)
    apart = {"contexts", "columns", "role", "channels", "channel_weights"}
    names = [field.name for field in dataclasses.fields(Rollout) if field.name not in apart]
    there = {f: getattr(rows, f) for f in names if getattr(rows, f) is not None}
    fields = _resized(there, (n, t), (size, decisions))
    fields["weights"] = np.where(fields["completion_mask"].any(axis=1), fields["weights"], 0).astype(np.float32)
    contexts = Contexts(
        tokens=_enlarged(rows.contexts.tokens, [contexts_size, context_width]),
        lengths=_enlarged(rows.contexts.lengths, [contexts_size]),
        extras={k: _enlarged(v, [contexts_size, *v.shape[1:]]) for k, v in rows.contexts.extras.items()},
    )
    return Batch(
        contexts=contexts,
        columns=_resized(rows.columns, (n, t), (size, decisions)),
        role=rows.role,
        channels=rows.channels,
        channel_weights=rows.channel_weights,
        **fields,
    )


def _resized(arrays: Mapping[str, Any], before: tuple[int, ...], after: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Arrays of rows [N, ...], some of decisions [N, T, ...], by name, with (N, T) enlarged."""

    def enlarged(name: str, x: np.ndarray) -> np.ndarray:
        shape = [after[0], *x.shape[1:]]
        if name in WIDE or (x.ndim > 1 and x.shape[1] == before[1] and name != "scores"):
            shape[1] = after[1]
        return _enlarged(x, shape, FILL.get(name, 0))

    return {name: enlarged(name, np.asarray(x)) for name, x in arrays.items()}


def _enlarged(x: np.ndarray, shape: list[int], value: Any = 0) -> np.ndarray:
    if list(x.shape) == shape:
        return x
    whole = np.full(shape, value, x.dtype)
    whole[tuple(map(slice, x.shape))] = x
    return whole


def _fit(n: int, size: int) -> int:
    """n rounded up to `size` times a power of two."""
    while size < n:
        size *= 2
    return size
