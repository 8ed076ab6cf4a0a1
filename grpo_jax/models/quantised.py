"""Matrices in eight bits, to draw completions with: integers, and a scale for every output channel.

A decode step reads every weight once and computes little with it; as integers they are half the bytes of bfloat16.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from grpo_jax.types import PyTree

LARGEST = 127  # of the integers, on either side of 0
INPUTS = {  # the dimensions that a product sums over; a lookup in the embedding takes what is a channel of the head
    "query": (1,),
    "key": (1,),
    "value": (1,),
    "output": (1, 2),
    "gate": (1,),
    "up": (1,),
    "down": (1,),
    "embedding": (1,),
    "unembedding": (0,),
}


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Quantised:
    """values · scale stands for the matrix; the scale has length 1 in the dimensions that a product sums over."""

    values: Any  # int8
    scale: Any  # float32

    def __getitem__(self, key: Any) -> Quantised:
        """The whole, as `weight[...]` reads a parameter."""
        if key is not Ellipsis:
            raise TypeError(f"a quantised matrix is read whole, by [...], got [{key}]")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def T(self) -> Quantised:
        return Quantised(self.values.T, self.scale.T)

    def reshape(self, inputs: int, outputs: int) -> Quantised:
        """As a matrix [inputs, outputs], which also gathers several dimensions of either kind into one."""
        return Quantised(self.values.reshape(inputs, outputs), self.scale.reshape(1, -1))

    def rows(self, index: Int[Array, "*N"]) -> Float[Array, "*N E"]:
        """Those rows of an embedding in float32; indices beyond it are clipped."""
        values, scale = (x.at[index].get(mode="clip") for x in (self.values, self.scale))
        return values.astype(jnp.float32) * scale

    def matrix(self, dtype: Any) -> Float[Array, "*shape"]:
        """A copy in floating point."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def times(x: Float[Array, "*N I"], matrix: Quantised) -> Float[Array, "*N O"]:
    """x @ matrix, summed in float32. The scale comes last, so that no floating-point copy of the matrix is made."""
    summed = jnp.matmul(x, matrix.values.astype(x.dtype), preferred_element_type=jnp.float32)
    return (summed * matrix.scale[0]).astype(x.dtype)


def quantised(params: PyTree, dtype: Any) -> PyTree:
    """Parameters with their matrices in eight bits; embeddings too, norms and biases in a dtype (None: their own).

    scale_o = max_i |w_io| / 127 (1 for a channel of zeros),  values = round(w / scale), halves to even.
    """

    def one(path: tuple, w: Float[Array, "*shape"]) -> Any:
        inputs = _inputs(path)
        if inputs is None:
            return w if dtype is None else w.astype(dtype)
        w = w.astype(jnp.float32)
        largest = jnp.abs(w).max(axis=inputs, keepdims=True)
        scale = jnp.where(largest > 0, largest / LARGEST, 1.0)
        return Quantised(jnp.round(w / scale).astype(jnp.int8), scale)

    return jax.tree_util.tree_map_with_path(one, params)


def places(shardings: PyTree) -> PyTree:
    """Where quantised parameters lie, given where the parameters do: scales as the channels are divided."""

    def one(path: tuple, place: NamedSharding) -> Any:
        inputs = _inputs(path)
        if inputs is None:
            return place
        spec = [None if i in inputs else axis for i, axis in enumerate(place.spec)]
        return Quantised(place, NamedSharding(place.mesh, PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(one, shardings)


def _inputs(path: tuple) -> tuple[int, ...] | None:
    return INPUTS.get(path[-1].key)
