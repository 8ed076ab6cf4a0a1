"""Where a kernel runs: on which platform, and on what part of its arrays on a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from grpo_jax.models.config import TransformerConfig
from grpo_jax.models.sharding import free_axes, ways
from grpo_jax.types import PyTree

# The logical axes of a kernel's arrays, a letter each; it leaves every other dimension whole.
LETTERS = {"C": "contexts", "S": "cells", "T": "tokens", "H": "heads"}


def on_tpu() -> bool:
    """Whether what is being traced is for TPU: as the mesh in context says (`jax.set_mesh`), or the default backend."""
    return _platform() == "tpu"


def on_cpu() -> bool:
    """The same of CPUs."""
    return _platform() == "cpu"


def _platform() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    return "tpu" if device.device_kind.startswith("TPU") else device.device_kind


def attention_path(config: TransformerConfig, mesh: Mesh) -> str:
    """How attention is computed on this mesh, and why not by kernels where it is not: a line for the log."""
    plain, platform = "matrix products, a block of queries at a time", mesh.devices.flat[0].platform
    if config.exact:
        return "attention: a few queries and keys at a time, whatever there is of them (model.exact)"
    if platform == "gpu":
        return f"attention: {plain} (cuDNN's cannot go backward through rows that share a context)"
    if platform != "tpu":
        return f"attention: {plain} (kernels are for TPU)"
    if ways("tokens", mesh) > 1 and any(config.windowed):
        return (
            f"attention: {plain}, in training (the splash kernel has no sliding window where mesh.sequence divides "
            "tokens); kernels in sampling"
        )
    return "attention: kernels, splash over sequences and our own over what is kept of them"


def per_device(function: Callable[..., Array], arguments: Sequence[PyTree], axes: Sequence[str], out: str) -> Any:
    """`function(*arguments)` with each device of the mesh in context working on its own contexts and heads.

    The compiler cannot divide a kernel. axes: for each argument its dimensions, a letter each, of which those in
    `LETTERS` are divided as the table says ("H" for query and key/value heads alike); out: those of the result. A kind
    of dimension that does not divide evenly in every argument stays whole on every device. Without a mesh in context,
    or inside somebody's shard_map, the function is simply called.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {letter: free_axes(name, mesh) for letter, name in LETTERS.items()}
    if not any(free.values()):
        return function(*arguments)
    over: dict[str, tuple[str, ...] | None] = {}
    for letter, names in free.items():
        count = math.prod(mesh.shape[name] for name in names)
        leaves = [(x, dims) for argument, dims in zip(arguments, axes) for x in jax.tree.leaves(argument)]
        sizes = [x.shape[dims.index(letter)] for x, dims in leaves if letter in dims]
        over[letter] = names if names and all(size % count == 0 for size in sizes) else None
    specs = [PartitionSpec(*(over.get(letter) for letter in dims)) for dims in (*axes, out)]
    inside = jax.shard_map(function, in_specs=tuple(specs[:-1]), out_specs=specs[-1], check_vma=False)
    return inside(*arguments)
