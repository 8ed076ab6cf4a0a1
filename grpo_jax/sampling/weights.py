"""The weights that completions are drawn with: as in training or gathered once for a whole rollout, and how precise."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax.models import TransformerConfig, abstract, logical_axes
from grpo_jax.models.quantised import places, quantised
from grpo_jax.models.sharding import GATHERED, shardings, ways
from grpo_jax.types import PyTree

Precision = Literal["int8"] | None  # None: the compute dtype

TRAINED = 16  # bytes that training holds of a parameter: float32 weights, two moments, and another role's weights
GIB = 2**30


class Arrangement(NamedTuple):
    """Where weights lie in training and where for sampling; None: there is one place. `said`: for the log, or "".

    precision: of matrices for sampling; scales lie as the channels that they belong to.
    """

    from_: PyTree | None = None
    to: PyTree | None = None
    said: str = ""
    precision: Precision = None


def arrange(
    config: TransformerConfig,
    mesh: Mesh,
    dtype: Any,
    *,
    wanted: Literal["auto", "gathered", "divided"] = "auto",
    precision: Precision = None,
    memory: float | None = None,
) -> Arrangement:
    """Where weights of a dtype lie while completions are drawn.

    Weights divided over fsdp, expert or sequence would cross the network in every decode step. Gathered, they cross it
    once for a rollout, and are divided over tensor alone. "auto" gathers where a copy takes at most half of what
    training leaves of a device's memory: the other half is for keys and values.

    memory: bytes of one device; None: asked of the device.
    """
    if ways("embed", mesh) == 1:
        return Arrangement(precision=precision)
    axes, shapes = logical_axes(config), abstract(config, dtype)[1]
    here, there = (shardings(axes, mesh, **rules) for rules in ({}, {"rules": GATHERED}))
    left = _memory(mesh) if memory is None else memory
    left = left and left - TRAINED / jnp.dtype(dtype).itemsize * _bytes(shapes, here)
    if precision:
        shapes = jax.eval_shape(lambda params: quantised(params, None), shapes)
        here, there = places(here), places(there)
    held, copy = (_bytes(shapes, lying) for lying in (here, there))
    fits = left is not None and 2 * copy <= left
    size, crossing = f"{_size(copy)} of {precision or jnp.dtype(dtype).name} per device", _size(copy - held)
    if wanted == "gathered" or (wanted == "auto" and fits):
        said = f"sampling with gathered weights: {size}, of which {crossing} cross the network once a rollout"
        return Arrangement(here, there, said, precision)
    why = ""
    if wanted == "auto" and left is not None:
        why = f"; a whole copy, {size}, is more than half of the {_size(max(left, 0))} that training leaves; a larger "
        why += "mesh.tensor makes it smaller"
    elif wanted == "auto":
        why = "; how much memory a device has is not known, and sampling.weights=gathered gathers them once a rollout"
    said = f"sampling with weights divided as in training: {crossing} cross the network in every step{why}"
    return Arrangement(here, here, said, precision)


def prepared(arrangement: Arrangement, dtype: Any) -> Callable[[PyTree], PyTree]:
    """The program that makes of parameters what completions are drawn with; one for all that ask for the same."""
    precision = arrangement.precision
    if dtype is None and precision is None and arrangement.from_ == arrangement.to:
        return lambda params: params
    leaves, tree = jax.tree.flatten((arrangement.from_, arrangement.to))
    return _program(precision, None if dtype is None else jnp.dtype(dtype), tree, tuple(leaves))


def cast(params: PyTree, dtype: Any) -> PyTree:
    """Floating-point leaves in the compute dtype; None leaves them as they are."""
    if dtype is None:
        return params
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params)


@functools.lru_cache(maxsize=16)
def _program(precision: Precision, dtype: Any, tree: Any, leaves: tuple) -> Callable[[PyTree], PyTree]:
    from_, to = tree.unflatten(leaves)

    def cast_weights(params: PyTree) -> PyTree:
        return quantised(params, dtype) if precision else cast(params, dtype)

    def gather_weights(params: PyTree) -> PyTree:
        # held where they are until they are cast: what crosses the network is then as small as it can be
        return jax.lax.with_sharding_constraint(cast_weights(params), from_)

    return jax.jit(cast_weights if from_ == to else gather_weights, out_shardings=to)


def _bytes(shapes: PyTree, places: PyTree) -> float:
    """Of all arrays on one device."""
    sizes = jax.tree.map(lambda x, place: math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize, shapes, places)
    return float(sum(jax.tree.leaves(sizes)))


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def _memory(mesh: Mesh) -> float | None:
    """Bytes of one device's memory in whole GiB, so that all hosts read the same; None where it cannot be asked."""
    here = [d for d in np.ravel(mesh.devices) if d.process_index == jax.process_index()]
    if here and here[0].platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(here) // GIB * GIB
    try:
        return here[0].memory_stats()["bytes_limit"] // GIB * GIB
    except (IndexError, AttributeError, KeyError, TypeError, RuntimeError, NotImplementedError):
        return None
