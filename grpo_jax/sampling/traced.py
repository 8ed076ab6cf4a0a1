"""Sampling inside a larger program: what the host prepares of it, and the draw in jit."""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from grpo_jax.models.sharding import sharding
from grpo_jax.sampling.decoding import Cells, Drawn, draw
from grpo_jax.sampling.requests import rollout_of
from grpo_jax.types import Batch, Key, PyTree, Request, Rollout

if TYPE_CHECKING:
    from grpo_jax.sampling.language_model import LanguageModel


@partial(jax.tree_util.register_dataclass, data_fields=["cells", "place"], meta_fields=["restricts"])
@dataclasses.dataclass(frozen=True)
class Launches:
    """How rows are drawn: launches of the sampler one after the other, and the cell of every row."""

    cells: Cells  # each field [L, ...]
    place: Int[Array, " N"]  # in the L * C * G cells
    restricts: tuple[str, ...]


def key_of(role: str, key: Key) -> Key:
    """Each role's draws are its own."""
    return jax.random.fold_in(key, np.uint32(zlib.crc32(role.encode()) & 0x7FFFFFFF))


def prepare(language: LanguageModel, requests: Sequence[Request], numbers: Counter) -> tuple[Rollout, Launches]:
    """The rows of these requests with nothing drawn, and how to draw them. None of them has given decisions."""
    rows = language.rows_of(requests, numbers)
    n, launch = len(rows), language.launch(rows)
    launches = launch.places(rows)
    cells = [launch.cells(rows, places) for places in launches]
    order = np.concatenate([launch.reshape(-1) for launch in launches])
    place = np.zeros(n, np.int32)
    place[order[order >= 0]] = np.flatnonzero(order >= 0)
    nothing = Drawn(
        tokens=rows.given, lengths=np.zeros(n), finished=np.zeros(n), behavior_logps=np.nan, sampler_logps=rows.given
    )
    stacked = Cells(*(np.stack(parts) for parts in zip(*cells)))
    return rollout_of(rows, nothing, role=requests[0].role), Launches(stacked, place, rows.restricts)


def draw_rows(
    language: LanguageModel, params: Mapping[str, PyTree], batch: Batch, launches: Launches, key: Key
) -> Batch:
    """The batch with its decisions drawn, in jit; padding rows stay empty."""
    graphdef, mesh = language.graphdef(batch.role), language.mesh
    weights, role_key = language.weights(params, batch.role), key_of(batch.role, key)
    rows = sharding("cells", mesh)

    def launch(cells: Cells) -> Drawn:
        if mesh.size > 1:
            placed = jax.lax.with_sharding_constraint(cells._replace(stops=None), rows)
            cells = placed._replace(stops=cells.stops)
        options = {"restricts": launches.restricts, "has_given": False, "shards": language.shards}
        with language.on_mesh():
            return draw(graphdef, weights, cells, role_key, **options)

    n, t = batch.completions.shape
    drawn = jax.lax.map(launch, launches.cells)
    place = jnp.pad(launches.place, (0, n - len(launches.place)))
    real = batch.prompt_ids >= 0

    def of_rows(values: Array) -> Array:
        flat = values.reshape(-1, *values.shape[3:])[place]
        return flat if flat.ndim == 1 else jnp.pad(flat[:, :t], ((0, 0), (0, max(t - flat.shape[1], 0))))

    tokens, lengths, finished, behavior, sampler = map(of_rows, drawn)
    lengths = jnp.where(real, lengths, 0)
    exists = jnp.arange(t) < lengths[:, None]
    behavior = jnp.where(exists, behavior, jnp.nan)
    mask = exists & ~jnp.isnan(behavior)
    return batch.replace(
        completions=jnp.where(exists, tokens, 0),
        lengths=lengths,
        completion_mask=mask,
        behavior_logps=behavior,
        sampler_logps=jnp.where(exists, sampler, 0.0),
        finished=finished & real,
        weights=jnp.where(mask.any(axis=1), batch.weights, 0.0),
    )
