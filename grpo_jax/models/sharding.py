"""The one table from logical axes to mesh axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.types import PyTree

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "norm": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
}
# Too few key/value heads for the tensor axis is common and cheap to replicate; an odd vocabulary likewise.
REPLICATED_IF_UNEVEN = frozenset({"kv_heads", "vocab"})


def shardings(axes: PyTree, mesh: Mesh) -> PyTree:
    """A `NamedSharding` for every parameter.

    `axes` is what `logical_axes(config)` returns: nested dicts of tuples of axis names. A rule whose mesh axis the mesh
    does not have means replicated.

    Raises: ValueError naming parameter, axis and size if a dimension does not divide over its mesh axes, or if an axis
    name is not in RULES.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    return tree.unflatten([NamedSharding(mesh, _spec(_dotted(path), names, mesh)) for path, names in leaves])


def _spec(parameter: str, names: tuple[str, ...], mesh: Mesh) -> PartitionSpec:
    entries: list[Any] = []
    for name in names:
        if name not in RULES:
            raise ValueError(f"parameter {parameter}: unknown logical axis {name!r}; known: {', '.join(RULES)}")
        rule = RULES[name]
        over = tuple(a for a in ((rule,) if isinstance(rule, str) else rule or ()) if mesh.shape.get(a, 1) > 1)
        ways = 1
        for axis in over:
            ways *= mesh.shape[axis]
        size = getattr(name, "size", None)
        if over and size is not None and size % ways:
            if name in REPLICATED_IF_UNEVEN:
                over = ()
            else:
                legal = min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - ways))
                raise ValueError(
                    f"parameter {parameter}: axis {str(name)!r} of size {size} does not divide over mesh axis "
                    f"{'*'.join(over)} of size {ways}; the nearest mesh size that works is {legal}"
                )
        entries.append(over[0] if len(over) == 1 else over or None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _dotted(path: tuple) -> str:
    return ".".join(str(getattr(key, "key", key)) for key in path)
