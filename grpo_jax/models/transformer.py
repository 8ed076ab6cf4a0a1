"""A decoder-only transformer in Flax NNX, scanned over its layers, in which a group of rows shares its context.

Three ways through the same layer: `prefill` (contexts → their keys and values), `decode` (some tokens per row, against
a shared prefix and the row's own cache) and `__call__` (training: context and rows together, nothing stored).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from grpo_jax.models import exact
from grpo_jax.models.attention import NOWHERE, rotary_frequencies
from grpo_jax.models.blocked import KEPT
from grpo_jax.models.cached import KeysValues, arranged, attend_cached, block_columns, written
from grpo_jax.models.config import TransformerConfig
from grpo_jax.models.kernels import attend_sequence, on_tpu
from grpo_jax.models.layers import Layer, Weights, gathered, norm
from grpo_jax.models.quantised import Quantised
from grpo_jax.models.sharding import divided, parts
from grpo_jax.models.spread import attend_spread, attend_together, laid, parted
from grpo_jax.types import Key, PyTree

UNROLLED = 2  # so few layers compile faster without a loop, and run faster: nothing is stacked for the backward pass


class _Setting(NamedTuple):
    """What differs between layers besides their weights; scanned over with them."""

    index: Int[Array, "L"]
    window: Int[Array, "L"] | None
    rope: Int[Array, "L"] | None  # which of the two rotary tables


class Transformer(nnx.Module):
    """A decoder-only language model up to its final norm.

    It computes in the dtype of its parameters; norms, softmax and rotary embedding are float32.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32) -> None:
        weights = Weights(config, rngs, param_dtype)
        self.config = config
        self.embedding = weights.normal("vocab embed")
        self.layers = Layer(config, weights)
        self.norm = weights.norm("norm")
        if not config.tie_embeddings:
            self.unembedding = weights.normal("embed vocab")

    def prefill(self, tokens: Int[Array, "C P"], lengths: Int[Array, "C"]) -> KeysValues:
        """Keys and values of contexts. Those at or beyond a context's length are finite and mean nothing."""
        tokens = self._whole(tokens)
        P = tokens.shape[1]

        def layer(block: Layer, setting: _Setting, x: Array) -> tuple[Array, KeysValues]:
            def mix(query: Array, key: Array, value: Array) -> tuple[Array, KeysValues]:
                heard = self._attend(query, key, value, lengths, setting, P=P, axis="S")
                return heard, KeysValues(*(divided(kept, "cells kv_heads") for kept in arranged(key, value)))

            return block(x, self._pick(angles, setting), mix, axes="cells")

        angles = self._angles(jnp.arange(P, dtype=jnp.int32)[None], P)
        return self._scan(layer, self._embed(tokens, "cells"))[1]

    def decode(
        self,
        tokens: Int[Array, "C G S"],
        prefix: KeysValues,
        prefix_lengths: Int[Array, "C"],
        own: KeysValues,
        column: Int[Array, ""] | int,
        *,
        folds: int = 1,
    ) -> tuple[Float[Array, "C G S E"], KeysValues]:
        """Hidden states of S tokens per row, which become columns column..column+S-1 of the rows' own cache.

        Column j stands at position prefix_lengths[c] + j and sees the prefix and the row's own columns up to j.
        folds: how many times the columns of the cache j may come to, one token at a time (see `KeysValues`).
        Returns the hidden states after the final norm, and the cache with the new columns written.
        """
        S, T = tokens.shape[2], own.keys.shape[1] * own.keys.shape[-1]
        if S > T:
            raise ValueError(f"decode got {S} tokens per row for an own cache of {T} columns")
        column = jnp.asarray(column, jnp.int32)
        lengths = prefix_lengths.astype(jnp.int32)
        positions = lengths[:, None] + column + jnp.arange(S, dtype=jnp.int32)

        def layer(block: Layer, setting: _Setting, carry: tuple) -> tuple[tuple, None]:
            x, own = carry

            def mix(query: Array, key: Array, value: Array) -> tuple[Array, KeysValues]:
                # the whole cache is carried, so that XLA writes the new columns in place
                cache = written(own, key, value, setting.index, column)
                if self.config.exact:
                    place = setting.index, column, setting.window
                    return exact.attend_cached(self.config, query, prefix, lengths, cache, *place), cache
                heard = attend_cached(
                    query,
                    positions,
                    prefix,
                    lengths,
                    cache,
                    setting.index,
                    column + S,
                    scale=self.config.score_scale,
                    cap=self.config.attention_softcap,
                    window=setting.window,
                    folds=folds,
                )
                return heard, cache

            return block(x, self._pick(angles, setting), mix, axes="cells"), None

        angles = self._angles(positions[:, None], prefix.values.shape[-2] + folds * T)
        (x, own), _ = self._scan(layer, (self._embed(tokens, "cells"), own))
        return self._last(x, "S"), own

    def __call__(
        self,
        contexts: Int[Array, "C P"],
        prefix_lengths: Int[Array, "C"],
        tokens: Int[Array, "C G T"],
        *,
        remat: bool = False,
    ) -> Float[Array, "C G T E"]:
        """Hidden states (after the final norm) of G rows per context; each context goes through the network once.

        A mesh with an axis "sequence" that divides T divides the tokens of contexts and rows.

        Row column j stands at position prefix_lengths[c] + j; in every layer the rows see their context's keys and
        values of that layer and their own up to j. For the backward pass a layer keeps what its matrix products made
        (where arithmetic is exact, those before attention and what attention read), and with `remat` only its input.
        """
        _, G, T = tokens.shape
        cut = parts("tokens") if T % parts("tokens") == 0 and not self.config.exact else 1
        contexts = self._whole(contexts, cut)
        C, P = contexts.shape
        axes = "contexts tokens" if cut > 1 else "contexts"
        within = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (C, P))
        columns = prefix_lengths.astype(jnp.int32)[:, None] + jnp.arange(T, dtype=jnp.int32)

        def layer(block: Layer, setting: _Setting, x: Array) -> tuple[Array, None]:
            def mix(query: Array, key: Array, value: Array) -> tuple[Array, None]:
                return self._attend(query, key, value, prefix_lengths, setting, P=P, G=G, cut=cut), None

            return block(x, self._pick(angles, setting), mix, axes=axes)

        # context and rows lie side by side, so each projection is one matrix product and each weight's gradient too
        angles = self._angles(laid(within, jnp.broadcast_to(columns[:, None], (C, G, T)), cut), P + T)
        x = self._embed(laid(contexts, tokens, cut), axes)
        x = self._scan(layer, x, remat=remat, gather=True)[0]
        return self._last(parted(x, P, G, cut)[1], "C")

    def empty(self, C: int, G: int, T: int, dtype: Any, *, shards: int = 1) -> KeysValues:
        """An own cache of zeros for C contexts of G rows of at least T columns, divided over so many devices."""
        width, size = exact.keys_at_once() if self.config.exact else block_columns(T), self.config.head_dim
        blocks = (self.config.num_layers, -(-T // width), shards, C * G // shards, self.config.num_kv_heads)
        nothing = (jnp.zeros((*blocks, *last), dtype) for last in ((size, width), (width, size)))
        return KeysValues(*(divided(x, "layers whole cells whole kv_heads") for x in nothing))

    def head(self) -> Float[Array, "E V"]:
        """The matrix from hidden states to logits; `softcap(logits, config.final_softcap)` is left to the caller."""
        matrix = self._head()
        return matrix.matrix(self.norm[...].dtype) if isinstance(matrix, Quantised) else matrix

    def logits(self, hidden: Float[Array, "N E"]) -> Float[Array, "V N"]:
        """In float32, before `softcap`."""
        matrix, scale = self._head(), None
        if isinstance(matrix, Quantised):
            matrix, scale = matrix.values.astype(hidden.dtype), matrix.scale.T
        logits = jnp.einsum("ne,ev->vn", hidden, matrix, preferred_element_type=jnp.float32)
        logits = logits if scale is None else logits * scale
        if on_tpu():  # where the compiler may else compute them rows first, for the product's sake, and copy them
            logits = with_layout_constraint(logits, Layout((0, 1)))
        return logits

    def _head(self) -> Float[Array, "E V"] | Quantised:
        return self.embedding[...].T if self.config.tie_embeddings else self.unembedding[...]

    def _whole(self, contexts: Int[Array, "C P"], parts: int = 1) -> Int[Array, "C P"]:
        """Padded: there is nothing that anybody sees."""
        multiple = exact.keys_at_once() if self.config.exact else parts
        return jnp.pad(contexts, ((0, 0), (0, -contexts.shape[1] % multiple)))

    def _last(self, x: Float[Array, "*N E"], axis: str) -> Float[Array, "*N E"]:
        if self.config.exact:
            return exact.in_tiles(partial(_norm, self.config), x, weights=self.norm[...], axis=axis)
        return norm(x, self.norm, self.config)

    def _embed(self, tokens: Int[Array, "*N"], axes: str) -> Float[Array, "*N E"]:
        # clipped, because a stray padding id must stay finite: NaN survives a mask in the gradient
        if training := axes != "cells":  # in steps, because the compiler finds no way from the table's layout in one
            tokens = divided(tokens, "lookups whole")
        table = self.embedding[...]
        if isinstance(table, Quantised):
            x = table.rows(tokens).astype(self.norm[...].dtype)
        else:
            x = table.at[tokens].get(mode="clip")
        if training:
            x = divided(divided(x, "lookups whole embed"), "contexts whole features")
        x = divided(x, axes)
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype) if self.config.scale_embedding else x

    def _angles(
        self, positions: Int[Array, "*N"], longest: int
    ) -> tuple[Float[Array, "K *N 1 half"], Float[Array, "K *N 1 half"]]:
        """Cosine and sine of every rotary table at positions below `longest`.

        Looked up, except on TPU: what is computed where it is needed, XLA:CPU computes again for every head of every
        layer, and a lookup it does not take along.
        """
        config, direct = self.config, on_tpu()
        ropes = [config.rope] if config.local_rope is None else [config.rope, config.local_rope]
        at = positions if direct else jnp.arange(longest, dtype=jnp.int32)
        turn = jnp.stack([at[..., None, None] * rotary_frequencies(r, config.head_dim) for r in ropes])
        return tuple(x if direct else x.at[:, positions].get(mode="clip") for x in (jnp.cos(turn), jnp.sin(turn)))

    def _pick(self, angles: tuple[Array, Array], setting: _Setting) -> tuple[Array, Array]:
        return tuple(table[0 if setting.rope is None else setting.rope] for table in angles)

    def _attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        lengths: Array,
        setting: _Setting,
        *,
        P: int,
        G: int = 0,
        axis: str = "C",
        cut: int = 1,
    ) -> Float[Array, "C N H D"]:
        """Attention of contexts [C, P] and of the tokens of G rows behind each, laid in so many parts (`spread.laid`).

        axis: the letter of C in `kernels.placement.LETTERS`.
        """
        config, T = self.config, (query.shape[1] - P) // max(G, 1)
        options = {"scale": config.score_scale, "softcap": config.attention_softcap, "P": P}
        arrays = (query, key, value, lengths)
        if config.exact:
            return exact.attend_together(config, P, G, axis, arrays[:3], lengths, setting.window)
        if on_tpu() and (cut == 1 or setting.window is None):
            window = None if setting.window is None else config.sliding_window
            some = window is not None and not all(config.windowed)
            windowed = setting.window < NOWHERE if some else None
            options |= {"T": T, "window": window, "windowed": windowed, "axis": axis}
            return attend_sequence(*arrays, **options, parts=cut)
        if cut > 1:
            return attend_spread(*arrays, **options, window=setting.window, G=G, parts=cut)
        return attend_together(*arrays, **options, window=setting.window, G=G)

    def _scan(self, layer: Callable, carry: PyTree, *, remat: bool = False, gather: bool = False) -> tuple[PyTree, Any]:
        """Run `layer(block, setting, carry)` over all layers.

        gather: the weights are divided over devices and come together for one layer at a time; again for the backward
        pass.
        """
        config = self.config
        sliding = np.array(config.windowed)
        setting = _Setting(
            index=np.arange(config.num_layers, dtype=np.int32),
            window=np.where(sliding, config.sliding_window or 0, NOWHERE).astype(np.int32) if sliding.any() else None,
            rope=None if config.local_rope is None else sliding.astype(np.int32),
        )
        graphdef, weights = nnx.split(self.layers)

        def body(carry: PyTree, inputs: tuple) -> tuple[PyTree, Any]:
            weights, setting = inputs
            block = nnx.merge(graphdef, gathered(weights) if gather else weights)
            return layer(block, setting, carry)

        policies = jax.checkpoint_policies
        policy = policies.nothing_saveable if remat else policies.save_only_these_names(KEPT)
        body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        inputs = (nnx.to_pure_dict(weights), setting)
        return jax.lax.scan(body, carry, inputs, unroll=config.num_layers <= UNROLLED)


def _norm(config: TransformerConfig, weight: Float[Array, "E"], x: Float[Array, "*N E"]) -> Float[Array, "*N E"]:
    return norm(x, weight, config)


def split(model: Transformer) -> tuple[nnx.GraphDef, PyTree]:
    """A model as hashable structure and parameters: a nested dict of arrays, layers stacked under "layers"."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: PyTree) -> Transformer:
    """The inverse of `split`; free, so it belongs inside jit and grad."""
    return nnx.merge(graphdef, params)


def create(config: TransformerConfig, key: Key, dtype: Any = jnp.float32) -> tuple[nnx.GraphDef, PyTree]:
    """A randomly initialised model: normal with deviation `initializer_range`, norms 1, biases 0."""
    return abstract(config, dtype)[0], _initial(config, np.dtype(dtype), key)


def abstract(config: TransformerConfig, dtype: Any = jnp.float32) -> tuple[nnx.GraphDef, PyTree]:
    """Structure and shapes of the parameters; nothing is allocated."""
    graphdef, params, _ = _describe(config, dtype)
    return graphdef, params


def logical_axes(config: TransformerConfig) -> PyTree:
    """For every parameter a tuple of axis names, in a nested dict like the parameters."""
    return _describe(config, jnp.float32)[2]


@partial(jax.jit, static_argnums=(0, 1))
def _initial(config: TransformerConfig, dtype: Any, key: Key) -> PyTree:
    return split(Transformer(config, rngs=nnx.Rngs(key), param_dtype=dtype))[1]


def _describe(config: TransformerConfig, dtype: Any) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    found: dict[str, Any] = {}

    def make() -> PyTree:
        graphdef, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0), param_dtype=dtype))
        found["graphdef"] = graphdef
        found["axes"] = {path: leaf.get_metadata("axes") for path, leaf in nnx.to_flat_state(state)}
        return nnx.to_pure_dict(state)

    params = jax.eval_shape(make)
    axes = jax.tree_util.tree_map_with_path(lambda path, _: found["axes"][tuple(k.key for k in path)], params)
    return found["graphdef"], params, axes
