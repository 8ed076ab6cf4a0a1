"""A rollout as a batch on the mesh, in one of few sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax.sharding import Mesh

from grpo_jax.training.deal import Layout
from grpo_jax.training.mesh import replicate
from grpo_jax.types import Batch, Contexts, Rollout


def put(rows: Rollout, layout: Layout, mesh: Mesh, *, updates: int) -> Batch:
    """Onto the mesh, padded to few sizes. Every array is replicated: statistics over rows are then the same bits
    whatever the mesh."""
    return replicate(padded(rows, layout, updates=updates), mesh)


def put_scores(rows: Rollout, batch: Batch, layout: Layout, mesh: Mesh, *, updates: int) -> Batch:
    """The batch of these rows with what reward functions have said of them since: scores, channels and columns."""
    whole = padded(rows, layout, updates=updates)
    scores, columns = replicate((whole.scores, whole.columns), mesh)
    return batch.replace(scores=scores, columns=columns, channels=rows.channels, channel_weights=rows.channel_weights)


def padded(rows: Rollout, layout: Layout, *, updates: int) -> Batch:
    """Padding rows weigh nothing and stand in no group. Empty completions get weight 0."""
    n, t = rows.completions.shape
    c, p = rows.contexts.tokens.shape
    slots = layout.contexts * layout.sweeps * updates  # what a whole step fills: fewer rows do not change a shape
    size, contexts_size = _fit(n, slots * layout.rows), _fit(c, slots)
    decisions, context_width = _fit(t, layout.decisions), _fit(p, layout.context_width)
    fill = dict.fromkeys(("prompt_ids", "group_ids", "update_ids", "unit_ids"), -1)
    fill |= dict.fromkeys(("behavior_logps", "scores"), np.nan)
    wide = {"completions", "completion_mask", "behavior_logps", "sampler_logps", "unit_ids"}

    def resized(name: str, x: Any) -> np.ndarray:
        x = np.asarray(x)
        shape = [size, *x.shape[1:]]
        if name in wide or (x.ndim > 1 and x.shape[1] == t and name != "scores"):
            shape[1] = decisions
        return _enlarged(x, shape, fill.get(name, 0))

    apart = {"contexts", "columns", "role", "channels", "channel_weights"}
    names = [field.name for field in dataclasses.fields(Rollout) if field.name not in apart]
    fields = {f: resized(f, getattr(rows, f)) for f in names if getattr(rows, f) is not None}
    fields["weights"] = np.where(fields["completion_mask"].any(axis=1), fields["weights"], 0).astype(np.float32)
    contexts = Contexts(
        tokens=_enlarged(rows.contexts.tokens, [contexts_size, context_width]),
        lengths=_enlarged(rows.contexts.lengths, [contexts_size]),
        extras={k: _enlarged(v, [contexts_size, *v.shape[1:]]) for k, v in rows.contexts.extras.items()},
    )
    return Batch(
        contexts=contexts,
        columns={k: resized(k, v) for k, v in rows.columns.items()},
        role=rows.role,
        channels=rows.channels,
        channel_weights=rows.channel_weights,
        **fields,
    )


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
