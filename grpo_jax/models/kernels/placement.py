"""Where a kernel runs: on which platform, and on what part of its arrays on a mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from grpo_jax.types import PyTree

AXES = {"C": ("data", "fsdp"), "H": ("tensor",)}  # contexts and heads; a kernel leaves every other dimension whole


def on_tpu() -> bool:
    """Whether what is being traced is for TPU: as the mesh in context says (`jax.set_mesh`), or the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind.startswith("TPU") if device else jax.default_backend() == "tpu"


def per_device(function: Callable[..., Array], arguments: Sequence[PyTree], axes: Sequence[str], out: str) -> Any:
    """`function(*arguments)` with each device of the mesh in context working on its own contexts and heads.

    The compiler cannot divide a kernel. axes: for each argument its dimensions, a letter each: "C" is divided over data
    and fsdp, "H" (query or key/value heads) over tensor, others are whole; out: those of the result. A kind of
    dimension that does not divide evenly in every argument stays whole on every device. Without a mesh in context, or
    inside somebody's shard_map, the function is simply called.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {n for n, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual and mesh.shape[n] > 1}
    if not free:
        return function(*arguments)
    over: dict[str, tuple[str, ...] | None] = {}
    for letter, names in AXES.items():
        names = tuple(name for name in names if name in free)
        ways = 1
        for name in names:
            ways *= mesh.shape[name]
        leaves = [(x, dims) for argument, dims in zip(arguments, axes) for x in jax.tree.leaves(argument)]
        sizes = [x.shape[dims.index(letter)] for x, dims in leaves if letter in dims]
        over[letter] = names if names and all(size % ways == 0 for size in sizes) else None
    specs = [PartitionSpec(*(over.get(letter) for letter in dims)) for dims in (*axes, out)]
    inside = jax.shard_map(function, in_specs=tuple(specs[:-1]), out_specs=specs[-1], check_vma=False)
    return inside(*arguments)


def by_context(x: Array) -> Array:
    """Contexts (the leading axis) divided over data and fsdp, all else whole; as it is without a mesh in context.

    Without it the compiler divides activations as the embedding is divided, over features, and then sums them over
    devices in every layer instead of gathering the weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    names = tuple(name for name in AXES["C"] if kinds.get(name) == AxisType.Auto and mesh.shape[name] > 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(names)) if names else x
