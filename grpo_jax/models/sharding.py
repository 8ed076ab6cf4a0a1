"""The one table from logical axes to mesh axes: parameters, and what flows through training and through sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from grpo_jax.types import PyTree

# Of a mesh, the slowest network first: `dcn_data` joins slices, `tensor` neighbours.
AXES = ("dcn_data", "data", "fsdp", "expert", "sequence", "tensor")
ROWS = ("dcn_data", "data", "fsdp", "expert")  # a model without experts has more rows in their place

# The optimizer keeps of a parameter what lies as the parameter does.
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp", "expert", "sequence"),
    "norm": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "experts": ("expert",),
}
ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "contexts": ROWS,  # of training and scoring, and the rows that lie under them
    "tokens": ("sequence",),  # of a context, and of each of its rows
    "cells": (*ROWS, "sequence"),  # contexts and rows of the sampler, whose tokens come one at a time
    "lookups": ("dcn_data", "data"),  # contexts that look up in one copy of the embedding
    "features": ("sequence",),  # of what they found, on its way to `tokens`
    "whole": (),
}
RULES = PARAMETERS | ACTIVATIONS
# Whole weights but for `tensor`: a decode step then waits for no weights.
GATHERED = RULES | {"embed": ()}
# Too few key/value heads for the tensor axis is common and cheap to replicate; an odd vocabulary likewise.
REPLICATED_IF_UNEVEN = frozenset({"kv_heads", "vocab"})


def shardings(axes: PyTree, mesh: Mesh, *, rules: Mapping[str, tuple[str, ...]] = RULES) -> PyTree:
    """A `NamedSharding` for every parameter.

    `axes` is what `logical_axes(config)` returns: nested dicts of tuples of axis names. A rule whose mesh axis the mesh
    does not have means replicated; a mesh axis serves the first dimension of an array that asks for it.

    Raises: ValueError naming parameter, axis and size if a dimension does not divide over its mesh axes, or if an axis
    name is not in the table.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    return tree.unflatten(
        [NamedSharding(mesh, _spec(f"parameter {_dotted(path)}", names, mesh, rules)) for path, names in leaves]
    )


def sharding(names: str, mesh: Mesh) -> NamedSharding:
    """Where an array lies whose dimensions, the first ones at least, have these names: "contexts tokens"."""
    return NamedSharding(mesh, _spec(f"an array [{names}]", names.split(), mesh, RULES))


def ways(name: str, mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the mesh cuts a logical axis."""
    return math.prod(mesh.shape.get(axis, 1) for axis in RULES[name])


def free_axes(name: str, mesh: AbstractMesh) -> tuple[str, ...]:
    """The mesh axes that divide a logical axis and that no `shard_map` around has taken."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    return tuple(a for a in RULES[name] if mesh.shape.get(a, 1) > 1 and kinds[a] != AxisType.Manual)


def parts(name: str) -> int:
    """Into how many parts the mesh in context cuts a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[a] for a in free_axes(name, mesh))


def divided(x: Array, names: str) -> Array:
    """In jit: `x`, divided over the mesh in context as the table says; what does not divide evenly stays whole.

    Without it the compiler divides activations as the embedding is divided, over features, and then sums them over
    devices in every layer instead of gathering the weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    entries: list[tuple[str, ...] | None] = []
    for size, name in zip(x.shape, names.split()):
        over = free_axes(name, mesh)
        even = over and size % math.prod(mesh.shape[a] for a in over) == 0
        entries.append(over if even else None)
    if not any(kind != AxisType.Manual and mesh.shape[a] > 1 for a, kind in zip(mesh.axis_names, mesh.axis_types)):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def _spec(what: str, names: Sequence[str], mesh: Mesh, rules: Mapping[str, tuple[str, ...]]) -> PartitionSpec:
    entries: list[Any] = []
    taken: set[str] = set()
    for name in names:
        if name not in rules:
            raise ValueError(f"{what}: unknown logical axis {name!r}; known: {', '.join(rules)}")
        over = tuple(a for a in rules[name] if mesh.shape.get(a, 1) > 1 and a not in taken)
        count, size = math.prod(mesh.shape[axis] for axis in over), getattr(name, "size", None)
        if size is not None and size % count:
            if name not in REPLICATED_IF_UNEVEN:
                raise ValueError(_uneven(what, name, size, over, count))
            over = ()
        taken |= set(over)
        entries.append(over[0] if len(over) == 1 else over or None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _uneven(what: str, name: str, size: int, over: tuple[str, ...], count: int) -> str:
    legal = min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - count))
    return (
        f"{what}: axis {str(name)!r} of size {size} does not divide over mesh axis {'*'.join(over)} of size {count}; "
        f"the nearest mesh size that works is {legal}"
    )


def _dotted(path: tuple) -> str:
    return ".".join(str(getattr(key, "key", key)) for key in path)
