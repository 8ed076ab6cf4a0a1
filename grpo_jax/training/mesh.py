"""The mesh, and what lies on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grpo_jax.models.sharding import AXES, sharding, ways
from grpo_jax.processes import place
from grpo_jax.types import PyTree


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    expert: int = 1,
    dcn_data: int | None = None,
    devices: Any = None,
) -> Mesh:
    """A mesh over all devices with the axes of `models.sharding.AXES`; -1 takes the devices that the others leave.

    dcn_data: parts joined by the slow network, each of whole slices; None: as many as there are slices of TPUs.
    On TPU, neighbours along an axis are neighbours in the machine where that can be.
    Raises: ValueError if the sizes do not multiply to the number of devices, or a part is not made of whole slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = len({_slice(d) for d in devices})
    given = {
        "dcn_data": slices if dcn_data is None else dcn_data,
        "data": data,
        "fsdp": fsdp,
        "expert": expert,
        "sequence": sequence,
        "tensor": tensor,
    }
    sizes = _filled(given, len(devices))
    parts = sizes["dcn_data"]
    if parts > 1 and slices % parts and parts % slices:
        raise ValueError(f"mesh.dcn_data is {parts}, but the devices form {slices} slices: give {slices}, or leave it")
    # Auto axes: the compiler places intermediate values; with explicit ones segment sums over sharded rows are refused.
    return Mesh(_ordered(devices, tuple(sizes[a] for a in AXES)), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a micro-batch are cut."""
    return ways("contexts", mesh)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Every array whole on every device."""
    return place(tree, NamedSharding(mesh, PartitionSpec()))


def by_rows(tree: PyTree, mesh: Mesh) -> PyTree:
    """In jit: leading axes, contexts or rows, cut as the table says."""
    return tree if mesh.size == 1 else jax.lax.with_sharding_constraint(tree, sharding("contexts", mesh))


def _filled(sizes: dict[str, int], count: int) -> dict[str, int]:
    """The sizes with the one of -1 worked out."""
    shown = {name: size for name, size in sizes.items() if size != 1 or name == "data"}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise ValueError(f"mesh sizes are positive, and at most one is -1 (the rest of the devices); got {shown}")
    if (free and count % fixed) or (not free and fixed != count):
        needed = f"a multiple of {fixed}" if free else f"{fixed}"
        alone = [name for name, size in sizes.items() if size > 1]
        near = min((d for d in range(1, count + 1) if count % d == 0), key=lambda d: abs(d - fixed))
        advice = f"; the nearest {alone[0]} that fits is {near}" if free and len(alone) == 1 else ""
        raise ValueError(f"the mesh {shown} needs {needed} devices, there are {count}{advice}")
    return sizes | {name: count // fixed for name in free}


def _slice(device: Any) -> int:
    """The slice of a TPU; elsewhere all devices are one."""
    return getattr(device, "slice_index", 0) or 0 if device.platform == "tpu" else 0


def _ordered(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Devices [dcn_data, ...]: slices outermost, and within one as its network lies."""
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(_slice(device), []).append(device)
    if len(slices) not in (1, shape[0]):  # an axis besides dcn_data crosses slices
        return np.asarray(sum(slices.values(), [])).reshape(shape)
    inner = (shape[0] // len(slices), *shape[1:])
    laid = [mesh_utils.create_device_mesh(inner, one, allow_split_physical_axes=True) for one in slices.values()]
    return np.concatenate(laid)
