"""What holds of every function of rows: it does not matter how the rows are ordered, padded, numbered or divided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from grpo_jax import segments

GARBAGE = {"f": np.nan, "b": False, "i": 0, "u": 0}


def rows(
    function: Callable,
    arrays: Mapping[str, np.ndarray],
    *,
    ids: tuple[str, ...] = ("group_ids",),
    garbage: Mapping[str, Any] | None = None,
    ordered: bool = False,
    tolerance: float = 2e-5,
    half: float | None = 0.05,
) -> Any:
    """Check `function(**arrays)`, arrays and results [N, ...] or scalars, and return its result.

    Padding rows have -1 in `ids` and NaN (or garbage[name]) elsewhere. `ordered`: the order of rows matters (ties).
    half: tolerance for bfloat16 inputs, relative to the largest result; None where they make no sense.
    """
    arrays = {name: np.asarray(array, _narrow(np.asarray(array))) for name, array in arrays.items()}
    n, draw = len(next(iter(arrays.values()))), np.random.default_rng(0)
    whole = _call(function, arrays)

    def agree(result: Any, expected: Any, what: str, bound: float = tolerance) -> None:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=bound, atol=bound, err_msg=what), result, expected
        )

    def numbered(mapping: np.ndarray) -> dict[str, np.ndarray]:
        return {k: np.where(v < 0, -1, mapping[v]).astype(v.dtype) if k in ids else v for k, v in arrays.items()}

    eager, function = function, jax.jit(function)
    agree(_call(function, arrays), whole, "under jit")
    stacked = {k: np.stack([v, v]) for k, v in arrays.items()}
    twice = jax.tree.map(np.asarray, jax.vmap(lambda named: function(**named))(stacked))
    agree(twice, jax.tree.map(lambda x: np.stack([x, x]), whole), "under vmap")
    agree(_call(function, numbered(draw.permutation(n))), whole, "with other ids")
    if not ordered:
        order = draw.permutation(n)
        shuffled = _call(function, {k: v[order] for k, v in arrays.items()})
        agree(shuffled, jax.tree.map(lambda x: x[order] if x.ndim else x, whole), "in another order")

    extra = 8 - n % 8  # to a multiple of the devices
    padded = {}
    for name, array in arrays.items():
        fill = -1 if name in ids else (garbage or {}).get(name, GARBAGE[array.dtype.kind])
        padded[name] = np.concatenate([array, np.full((extra, *array.shape[1:]), fill, array.dtype)])
    unpadded = jax.tree.map(lambda x: x[:n] if x.ndim else x, _call(function, padded))
    agree(unpadded, whole, "with padding rows")

    spread = jax.jit(lambda named: segments.across("data", function)(**named))
    mesh, over = Mesh(np.array(jax.devices()[:8]), ("data",)), PartitionSpec("data")
    out = jax.tree.map(lambda x: over if x.ndim else PartitionSpec(), whole)
    divided = jax.shard_map(spread, mesh=mesh, in_specs=(over,), out_specs=out)(padded)
    agree(jax.tree.map(lambda x: np.asarray(x)[:n] if x.ndim else np.asarray(x), divided), whole, "under shard_map")

    if half is not None:
        narrow = {k: jnp.asarray(v, jnp.bfloat16) if v.dtype.kind == "f" else v for k, v in arrays.items()}
        exact = _call(
            function, {k: np.asarray(v, np.float32) if v.dtype != arrays[k].dtype else v for k, v in narrow.items()}
        )
        result = eager(**narrow)
        kinds = {x.dtype for x in jax.tree.leaves(result) if jnp.issubdtype(x.dtype, jnp.floating)}
        assert kinds <= {jnp.dtype(jnp.float32)}, f"float32 results expected of bfloat16 inputs, got {kinds}"
        agree(jax.tree.map(np.asarray, result), exact, "with bfloat16 inputs", half)
    return whole


def _call(function: Callable, arrays: Mapping[str, np.ndarray]) -> Any:
    return jax.tree.map(np.asarray, function(**{k: jnp.asarray(v) for k, v in arrays.items()}))


def _narrow(array: np.ndarray) -> np.dtype:
    return np.dtype({"f": np.float32, "i": np.int32}.get(array.dtype.kind, array.dtype))
