"""Arrays that lie on the devices of several processes, and bytes that each process gives to all."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from grpo_jax.types import PyTree

FEWEST_BYTES = 256  # of a message; the sizes of messages are rounded up to few, each of which is compiled once


def place(tree: PyTree, sharding: Sharding) -> PyTree:
    """Arrays, equal on every process, onto the devices. Each process hands over what its own devices hold."""

    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        values = np.asarray(x)  # device_put would first compare them over the network, array by array
        return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)

    return jax.tree.map(put, tree)


def fetch(tree: PyTree) -> PyTree:
    """Arrays as numpy, whole, wherever their parts lie. All processes call it together."""
    leaves, structure = jax.tree.flatten(tree)
    apart = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array) and not _is_here(x)]
    for mesh in dict.fromkeys(leaves[i].sharding.mesh for i in apart):
        those = [i for i in apart if leaves[i].sharding.mesh == mesh]
        for i, whole in zip(those, _whole(mesh)([leaves[i] for i in those])):
            leaves[i] = whole
    return structure.unflatten(jax.device_get(leaves))


def gather(message: bytes) -> list[bytes]:
    """The messages of all processes, in their order, over the devices' own network."""
    if jax.process_count() == 1:
        return [message]
    from jax.experimental.multihost_utils import process_allgather

    sizes = np.asarray(process_allgather(np.uint32(len(message)))).reshape(-1).tolist()
    room = FEWEST_BYTES
    while room < max(sizes):
        room *= 2
    padded = np.zeros(room, np.uint8)
    padded[: len(message)] = np.frombuffer(message, np.uint8)
    messages = np.asarray(process_allgather(padded))
    return [row[:size].tobytes() for row, size in zip(messages, sizes)]


def _is_here(x: jax.Array) -> bool:
    return x.is_fully_addressable or x.is_fully_replicated


@functools.cache
def _whole(mesh: Mesh) -> Any:
    return jax.jit(lambda arrays: arrays, out_shardings=NamedSharding(mesh, PartitionSpec()))
