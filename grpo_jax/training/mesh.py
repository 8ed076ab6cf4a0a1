"""The mesh, and what lies on it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grpo_jax.types import PyTree

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """A mesh over all devices with the axes data, fsdp and tensor; -1 takes the devices that the others leave.

    Raises: ValueError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise ValueError(f"mesh sizes are positive, and at most one is -1 (the rest of the devices); got {sizes}")
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    elif free or fixed != len(devices):
        needed = f"a multiple of {fixed}" if free else f"{fixed}"
        raise ValueError(f"the mesh {sizes} needs {needed} devices, there are {len(devices)}")
    # Auto axes: the compiler places intermediate values; with explicit ones segment sums over sharded rows are refused.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a micro-batch are cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Every array whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def by_rows(tree: PyTree, mesh: Mesh) -> PyTree:
    """In jit: leading axes cut over data and fsdp."""
    if mesh.size == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, ROWS))
