"""The layer of a decoder-only transformer, and how its parameters are made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from grpo_jax.models.attention import rotate
from grpo_jax.models.blocked import KEPT
from grpo_jax.models.config import TransformerConfig
from grpo_jax.models.exact import in_tiles
from grpo_jax.models.kernels import on_tpu
from grpo_jax.models.quantised import Quantised, times
from grpo_jax.models.sharding import divided
from grpo_jax.types import Key, PyTree


class Axis(str):
    """The logical name of a dimension; it knows how long the dimension is."""

    size: int

    def __new__(cls, name: str, size: int) -> Axis:
        axis = super().__new__(cls, name)
        axis.size = size
        return axis

    def __getnewargs__(self) -> tuple[str, int]:
        return str(self), self.size


MATRICES = {  # of a layer; they start normal
    "query": "layers embed heads head_dim",
    "key": "layers embed kv_heads head_dim",
    "value": "layers embed kv_heads head_dim",
    "output": "layers heads head_dim embed",
    "gate": "layers embed mlp",
    "up": "layers embed mlp",
    "down": "layers mlp embed",
}


def gathered(weights: PyTree) -> PyTree:
    """One layer's weights, in jit, each matrix with all its features on every device; divided over `tensor` alone.

    Left to itself the compiler for TPU multiplies with a part of the features at a time, as the parts come in: it then
    writes the whole product, in the dtype of the weights, once for each part, and reads it back to add the next.
    """

    def whole(path: tuple, x: Array) -> Array:
        names = MATRICES.get(getattr(path[-1], "key", ""))
        return x if names is None else divided(x, names.removeprefix("layers ").replace("embed", "whole"))

    return jax.tree_util.tree_map_with_path(whole, weights)


class Weights:
    """Makes the parameters of a config: stacked over layers, normal or constant, their axes kept beside them."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, dtype: Any) -> None:
        self.sizes = {
            "layers": config.num_layers,
            "vocab": config.vocab_size,
            "embed": config.hidden_size,
            "norm": config.hidden_size,
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "mlp": config.intermediate_size,
        }
        self.deviation, self.rngs, self.dtype = config.initializer_range, rngs, dtype
        self.unit = 0.0 if config.norm_offset else 1.0
        self.drawn = self._draw(rngs.params())

    def _axes(self, names: str) -> tuple[Axis, ...]:
        return tuple(Axis(name, self.sizes[name]) for name in names.split())

    def _shape(self, names: str) -> tuple[int, ...]:
        return tuple(axis.size for axis in self._axes(names))

    def _draw(self, key: Key) -> dict[str, Array]:
        """All matrices, a layer at a time from one draw: seven draws would take seven times as long to compile."""
        shapes = [self._shape(names)[1:] for names in MATRICES.values()]
        ends = np.cumsum([np.prod(shape, dtype=np.int64) for shape in shapes])

        def layer(index: Int[Array, ""]) -> list[Array]:
            flat = jax.random.normal(jax.random.fold_in(key, index), (int(ends[-1]),)) * self.deviation
            pieces = jnp.split(flat.astype(self.dtype), ends[:-1])
            return [piece.reshape(shape) for piece, shape in zip(pieces, shapes)]

        return dict(zip(MATRICES, jax.lax.map(layer, jnp.arange(self.sizes["layers"]))))

    def matrix(self, name: str) -> nnx.Param:
        return nnx.Param(self.drawn[name], axes=self._axes(MATRICES[name]))

    def normal(self, names: str) -> nnx.Param:
        value = self.deviation * jax.random.normal(self.rngs.params(), self._shape(names), jnp.float32)
        return nnx.Param(value.astype(self.dtype), axes=self._axes(names))

    def constant(self, names: str, value: float) -> nnx.Param:
        return nnx.Param(jnp.full(self._shape(names), value, self.dtype), axes=self._axes(names))

    def norm(self, names: str) -> nnx.Param:
        return self.constant(names, self.unit)


class Attention(nnx.Module):
    """The four projections, and norms of query and key heads where the family has them."""

    def __init__(self, config: TransformerConfig, weights: Weights) -> None:
        self.config = config
        self.query = weights.matrix("query")
        self.key = weights.matrix("key")
        self.value = weights.matrix("value")
        self.output = weights.matrix("output")
        if config.qkv_bias:
            self.query_bias = weights.constant("layers heads head_dim", 0.0)
            self.key_bias = weights.constant("layers kv_heads head_dim", 0.0)
            self.value_bias = weights.constant("layers kv_heads head_dim", 0.0)
        if config.output_bias:
            self.output_bias = weights.constant("layers norm", 0.0)
        if config.query_key_norm:
            self.query_norm = weights.norm("layers head_dim")
            self.key_norm = weights.norm("layers head_dim")

    def project(self, x: Float[Array, "*N E"], angles: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """Queries [*N, H, D], keys and values [*N, Hkv, D] at their positions."""
        config = self.config
        query, key, value = (_to_heads(x, w[...]) for w in (self.query, self.key, self.value))
        if config.qkv_bias:
            query, key, value = query + self.query_bias, key + self.key_bias, value + self.value_bias
        if config.query_key_norm:
            query, key = norm(query, self.query_norm, config), norm(key, self.key_norm, config)
        return tuple(checkpoint_name(y, KEPT) for y in (rotate(query, *angles), rotate(key, *angles), value))

    def merge(self, heads: Float[Array, "*N H D"]) -> Float[Array, "*N E"]:
        # one contracted dimension: over two, XLA transposes both operands on some backends
        matrix = self.output[...]
        out = product(heads.reshape(*heads.shape[:-2], -1), matrix.reshape(-1, matrix.shape[-1]))
        return out + self.output_bias if self.config.output_bias else out


class FeedForward(nnx.Module):
    """down(act(gate(x)) · up(x))"""

    def __init__(self, config: TransformerConfig, weights: Weights) -> None:
        self.config = config
        self.gate = weights.matrix("gate")
        self.up = weights.matrix("up")
        self.down = weights.matrix("down")
        if config.mlp_bias:
            self.gate_bias = weights.constant("layers mlp", 0.0)
            self.up_bias = weights.constant("layers mlp", 0.0)
            self.down_bias = weights.constant("layers norm", 0.0)

    def __call__(self, x: Float[Array, "*N E"]) -> Float[Array, "*N E"]:
        gate, up = (checkpoint_name(product(x, w[...]), KEPT) for w in (self.gate, self.up))
        if self.config.mlp_bias:
            gate, up = gate + self.gate_bias, up + self.up_bias
        if on_tpu():
            gate, up = _slopes_once(gate, up)
        active = jax.nn.silu(gate) if self.config.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        out = product(active * up, self.down[...])
        return out + self.down_bias if self.config.mlp_bias else out


class Layer(nnx.Module):
    """One layer, or, with a leading axis on every weight, all of them."""

    def __init__(self, config: TransformerConfig, weights: Weights) -> None:
        self.config = config
        self.attention = Attention(config, weights)
        self.mlp = FeedForward(config, weights)
        self.attention_norm = weights.norm("layers norm")
        self.mlp_norm = weights.norm("layers norm")
        if config.post_norms:
            self.attention_post_norm = weights.norm("layers norm")
            self.mlp_post_norm = weights.norm("layers norm")

    def __call__(
        self, x: Float[Array, "*N E"], angles: tuple[Array, Array], mix: Callable, *, axes: str
    ) -> tuple[Array, PyTree]:
        """`mix(queries, keys, values)` → what the heads read, and whatever is to be kept of keys and values.

        axes: the logical axes of x, as far as a mesh may divide them.
        """
        if not self.config.exact:
            heads, kept = mix(*self.project(x, *angles))
            return divided(self.merge(x, heads), axes), kept
        graphdef, weights = nnx.split(self)
        tiled = partial(in_tiles, weights=nnx.to_pure_dict(weights), axis="S" if axes == "cells" else "C")
        named = partial(jax.tree.map, partial(checkpoint_name, name=KEPT))
        heads, kept = mix(*named(tiled(partial(_project, graphdef), x, *angles)))
        return divided(tiled(partial(_merge, graphdef), x, named(heads)), axes), kept

    def project(self, x: Float[Array, "*N E"], cosine: Array, sine: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values."""
        return self.attention.project(norm(x, self.attention_norm, self.config), (cosine, sine))

    def merge(self, x: Float[Array, "*N E"], heads: Float[Array, "*N H D"]) -> Float[Array, "*N E"]:
        """What comes out of the layer, given what the heads read."""
        config, y = self.config, self.attention.merge(heads)
        x = checkpoint_name(x + (norm(y, self.attention_post_norm, config) if config.post_norms else y), KEPT)
        y = self.mlp(norm(x, self.mlp_norm, config))
        return x + (norm(y, self.mlp_post_norm, config) if config.post_norms else y)


def _project(graphdef: nnx.GraphDef, weights: PyTree, *tokens: Array) -> tuple[Array, Array, Array]:
    return nnx.merge(graphdef, weights).project(*tokens)


def _merge(graphdef: nnx.GraphDef, weights: PyTree, *tokens: Array) -> Array:
    return nnx.merge(graphdef, weights).merge(*tokens)


def product(x: Float[Array, "*N I"], matrix: Float[Array, "I O"] | Quantised) -> Float[Array, "*N O"]:
    return times(x, matrix) if isinstance(matrix, Quantised) else _product(x, matrix)


@jax.custom_vjp
def _product(x: Float[Array, "*N I"], matrix: Float[Array, "I O"]) -> Float[Array, "*N O"]:
    """x @ matrix, with the matrix's gradient computed in the order in which the matrix lies.

    JAX's own rule computes the transposed gradient and needs the slope transposed too, an array as large as the
    activations, which can cost as much as the product.
    """
    return x @ matrix


def _product_forward(x: Array, matrix: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ matrix, (x, matrix)


def _product_backward(kept: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    x, matrix = kept
    rows = [a.reshape(-1, a.shape[-1]) for a in (x, slope)]
    return slope @ matrix.T, jax.lax.dot_general(*rows, (((0,), (0,)), ((), ())))


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _slopes_once(*arrays: Array) -> tuple[Array, ...]:
    """The same arrays, whose slopes are in memory before anything reads them.

    On TPU XLA would rather compute them again inside each product that takes them, from all that they are made of.
    """
    return arrays


_slopes_once.defvjp(lambda *arrays: (arrays, None), lambda _, slopes: jax.lax.optimization_barrier(slopes))


def _to_heads(x: Float[Array, "*N E"], matrix: Float[Array, "E H D"] | Quantised) -> Float[Array, "*N H D"]:
    return product(x, matrix.reshape(matrix.shape[0], -1)).reshape(*x.shape[:-1], *matrix.shape[1:])


def norm(x: Float[Array, "*N E"], weight: Float[Array, "E"], config: TransformerConfig) -> Float[Array, "*N E"]:
    """x / sqrt(mean(x²) + ε) · weight (or 1 + weight), in float32."""
    y, weight = x.astype(jnp.float32), weight[...].astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.norm_epsilon)
    return (y * (1.0 + weight if config.norm_offset else weight)).astype(x.dtype)
