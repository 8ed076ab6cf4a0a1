"""The three ways through the transformer compute one function."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import KeysValues, TransformerConfig, abstract, create, load, merge, split

GOLDEN = Path(__file__).parent / "golden"
C, G, P, T = 3, 2, 9, 8
LENGTHS = np.array([9, 4, 0], np.int32)
TINY = TransformerConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4
)


def batch(vocab, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocab, (C, P)).astype(np.int32), rng.integers(0, vocab, (C, G, T)).astype(np.int32)


@pytest.fixture(scope="module", params=["qwen2_window", "gemma3"])
def model(request):
    return load(GOLDEN / request.param)


@pytest.fixture(scope="module")
def tiny():
    return create(TINY, jax.random.key(0))


@partial(jax.jit, static_argnums=0)
def train_hidden(graphdef, params, contexts, lengths, rows):
    return merge(graphdef, params)(contexts, lengths, rows)


@partial(jax.jit, static_argnums=0)
def prefilled(graphdef, params, contexts, lengths):
    return merge(graphdef, params).prefill(contexts, lengths)


@partial(jax.jit, static_argnums=0)
def decoded(graphdef, params, tokens, prefix, lengths, own, column):
    return merge(graphdef, params).decode(tokens, prefix, lengths, own, column)


def cached_hidden(model, contexts, rows, chunks):
    _, graphdef, params = model
    prefix = prefilled(graphdef, params, contexts, LENGTHS)
    own = merge(graphdef, params).empty(*rows.shape, jnp.float32)
    own = KeysValues(*(jnp.full(x.shape, 7.0) for x in own))  # stale columns must not be seen
    hidden, column = [], 0
    for size in chunks:
        out, own = decoded(graphdef, params, rows[:, :, column : column + size], prefix, LENGTHS, own, column)
        hidden.append(out)
        column += size
    return jnp.concatenate(hidden, axis=2), own


@pytest.mark.parametrize("chunks", [(1,) * T, (3, 1, 4)], ids=["columns", "chunks"])
def test_decode_equals_training_forward(model, chunks):
    config, graphdef, params = model
    contexts, rows = batch(config.vocab_size)
    want = train_hidden(graphdef, params, contexts, LENGTHS, rows)
    got, _ = cached_hidden(model, contexts, rows, chunks)
    np.testing.assert_allclose(got, want, atol=3e-5)


def test_decode_leaves_other_columns_alone(model):
    config, graphdef, params = model
    contexts, rows = batch(config.vocab_size)
    whole = cached_hidden(model, contexts, rows, (3, 1, 4))[1]
    part = cached_hidden(model, contexts, rows, (3, 1))[1]
    np.testing.assert_array_equal(part.keys[..., 4:], 7.0)
    np.testing.assert_array_equal(part.values[..., :4, :], whole.values[..., :4, :])


def alone_hidden(graphdef, params, contexts, lengths, rows):
    """Every row by itself, its prompt before it in one plain causal sequence, padded on the right."""
    sequences = np.zeros((C, G, P + T), np.int32)
    for c, n in enumerate(lengths):
        sequences[c, :, :n], sequences[c, :, n : n + T] = contexts[c, :n], rows[c]
    nothing = np.zeros((C * G, 0), np.int32), np.zeros(C * G, np.int32)
    hidden = merge(graphdef, params)(*nothing, sequences.reshape(C * G, 1, P + T)).reshape(C, G, P + T, -1)
    return jnp.stack([hidden[c, :, n : n + T] for c, n in enumerate(lengths)])


def test_a_group_equals_each_row_alone_behind_its_own_prompt(model):
    config, graphdef, params = model
    contexts, rows = batch(config.vocab_size)
    together = train_hidden(graphdef, params, contexts, LENGTHS, rows)
    np.testing.assert_allclose(together, alone_hidden(graphdef, params, contexts, LENGTHS, rows), atol=3e-5)


def test_later_tokens_and_other_rows_do_not_matter_earlier_ones_do(model):
    config, graphdef, params = model
    contexts, rows = batch(config.vocab_size)
    base = train_hidden(graphdef, params, contexts, LENGTHS, rows)
    changed = rows.copy()
    changed[:, 0, 5] = (changed[:, 0, 5] + 1) % config.vocab_size
    got = train_hidden(graphdef, params, contexts, LENGTHS, changed)
    np.testing.assert_array_equal(got[:, 0, :5], base[:, 0, :5])
    np.testing.assert_array_equal(got[:, 1], base[:, 1])
    assert (np.abs(got[:, 0, 5:] - base[:, 0, 5:]).max(-1) > 0).all()


PROBE = np.sin(np.arange(C * G * T)).reshape(C, G, T, 1).astype(np.float32)


@partial(jax.jit, static_argnums=(0, 5))
def gradient(graphdef, params, contexts, lengths, rows, remat=False):
    return jax.grad(lambda p: jnp.sum(PROBE * merge(graphdef, p)(contexts, lengths, rows, remat=remat)))(params)


def assert_trees_close(one, other, relative):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=relative * float(jnp.abs(b).max()) + 1e-12)


def test_gradients_are_finite_and_invariant_to_padding_and_remat():
    config, graphdef, params = load(GOLDEN / "gemma3")
    contexts, rows = batch(config.vocab_size)
    base = gradient(graphdef, params, contexts, LENGTHS, rows)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(base))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(base["layers"]["mlp"]))
    garbage = np.concatenate([contexts, np.zeros((C, 4), np.int32)], axis=1)
    garbage = np.where(np.arange(P + 4) < LENGTHS[:, None], garbage, np.where(np.arange(P + 4) % 2, 2**30, -(2**30)))
    assert_trees_close(gradient(graphdef, params, garbage, LENGTHS, rows, True), base, 1e-5)


def test_gradient_equals_that_of_plain_sequences():
    """A context's own pass is differentiated too, once, with the sum of what its rows want of it."""
    config, graphdef, params = load(GOLDEN / "gemma3")
    contexts, rows = batch(config.vocab_size)
    base = gradient(graphdef, params, contexts, LENGTHS, rows)
    alone = jax.jit(jax.grad(lambda p: jnp.sum(PROBE * alone_hidden(graphdef, p, contexts, LENGTHS, rows))))(params)
    assert_trees_close(base, alone, 2e-5)


def test_prefill_is_finite_beyond_the_lengths_and_right_within(model):
    config, graphdef, params = model
    contexts, _ = batch(config.vocab_size)
    padded = np.where(np.arange(P) < LENGTHS[:, None], contexts, 2**30)
    full, part = (
        prefilled(graphdef, params, contexts, np.full(C, P, np.int32)),
        prefilled(graphdef, params, padded, LENGTHS),
    )
    for one, other in ((full.keys.swapaxes(-1, -2), part.keys.swapaxes(-1, -2)), (full.values, part.values)):
        assert one.shape == (config.num_layers, C, config.num_kv_heads, P, config.head_dim)
        assert np.isfinite(other).all()
        for c in range(C):
            np.testing.assert_allclose(one[:, c, :, : LENGTHS[c]], other[:, c, :, : LENGTHS[c]], atol=1e-6)


def test_bfloat16_parameters_compute_in_bfloat16_near_float32():
    config, graphdef, params = load(GOLDEN / "qwen2_window")
    contexts, rows = batch(config.vocab_size)
    want = train_hidden(graphdef, params, contexts, LENGTHS, rows)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    got = train_hidden(graphdef, half, contexts, LENGTHS, rows)
    assert got.dtype == jnp.bfloat16
    error = np.abs(got.astype(np.float32) - want)
    assert error.mean() < 0.05 * np.abs(want).mean()
    own = merge(graphdef, half).empty(C, G, T, jnp.bfloat16)
    hidden, own = decoded(graphdef, half, rows, prefilled(graphdef, half, contexts, LENGTHS), LENGTHS, own, 0)
    assert hidden.dtype == own.keys.dtype == jnp.bfloat16
    assert np.abs(hidden.astype(np.float32) - got.astype(np.float32)).mean() < 0.05 * np.abs(want).mean()


def test_parameters_are_a_plain_nested_dict_with_stacked_layers(tiny):
    graphdef, params = tiny

    def check(tree):
        assert type(tree) is dict or isinstance(tree, jax.Array)
        return [check(value) for value in tree.values()] if type(tree) is dict else None

    check(params)
    assert {x.shape[0] for x in jax.tree.leaves(params["layers"])} == {TINY.num_layers}
    assert params["layers"]["attention"]["query"].shape == (2, 16, 4, 4)
    assert params["layers"]["attention"]["output"].shape == (2, 4, 4, 16)
    assert params["layers"]["mlp"]["down"].shape == (2, 24, 16)
    model = merge(graphdef, params)
    assert model.config == TINY
    again, same = split(model)
    assert again == graphdef and hash(again) == hash(graphdef)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(params)))


def test_abstract_allocates_nothing_and_matches_create(tiny):
    config = dataclasses.replace(TINY, tie_embeddings=False, vocab_size=10**9, hidden_size=10**6)
    graphdef, shapes = abstract(config, jnp.bfloat16)
    assert shapes["unembedding"].shape == (10**6, 10**9)
    assert shapes["embedding"].dtype == jnp.bfloat16
    graphdef, shapes = abstract(TINY, jnp.float32)
    other, params = tiny
    assert graphdef == other and hash(graphdef) == hash(other)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), params)


def test_initialisation(tiny):
    config = dataclasses.replace(TINY, hidden_size=64, vocab_size=500, initializer_range=0.05, norm_offset=True)
    _, params = create(config, jax.random.key(0))
    for weight in (params["embedding"], params["layers"]["mlp"]["gate"], params["layers"]["attention"]["output"]):
        np.testing.assert_allclose(np.std(weight), 0.05, rtol=0.1)
        np.testing.assert_allclose(np.mean(weight), 0.0, atol=0.01)
    matrices = {**params["layers"]["attention"], **params["layers"]["mlp"]}
    matrices = [np.asarray(matrix) for name, matrix in matrices.items() if "bias" not in name]
    drawn = [matrix[layer].ravel()[:100] for matrix in matrices for layer in (0, 1)]
    assert len(np.unique(np.concatenate(drawn))) == 100 * len(drawn) == 1400
    assert (params["layers"]["attention"]["query_bias"] == 0).all()
    assert (params["norm"] == 0).all() and (tiny[1]["norm"] == 1).all()
    again, other = (create(TINY, jax.random.key(seed))[1]["embedding"] for seed in (0, 1))
    assert (again == tiny[1]["embedding"]).all() and (other != again).all()


def test_head_is_the_embedding_when_tied():
    for name, tied in (("qwen2_window", True), ("qwen2", False)):
        config, graphdef, params = load(GOLDEN / name)
        assert config.tie_embeddings == tied == ("unembedding" not in params)
        want = params["embedding"].T if tied else params["unembedding"]
        np.testing.assert_array_equal(merge(graphdef, params).head(), want)


def test_decode_of_more_tokens_than_columns_is_an_error():
    config, graphdef, params = load(GOLDEN / "qwen2")
    model = merge(graphdef, params)
    contexts, rows = batch(config.vocab_size)
    with pytest.raises(ValueError, match="8 tokens per row .* 4 columns"):
        model.decode(rows, model.prefill(contexts, LENGTHS), LENGTHS, model.empty(C, G, 4, jnp.float32), 0)


def test_no_keys_and_values_of_all_layers_and_no_repeated_context_in_training():
    """Compiled memory of the forward pass: the same for 4 and 12 layers, and no copy of the context for more rows."""
    width = 512
    config = dataclasses.replace(TINY, num_heads=1, num_kv_heads=1, head_dim=64, num_layers=4)

    def temporary(config, group):
        graphdef, shapes = abstract(config)
        whole = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
        step = jax.jit(lambda params, *arrays: merge(graphdef, params)(*arrays))
        compiled = step.lower(shapes, whole(2, width), whole(2), whole(2, group, 1)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    base = temporary(config, 2)
    context = 2 * width * config.head_dim * 4  # bytes of the keys of two contexts
    assert temporary(dataclasses.replace(config, num_layers=12), 2) - base < context
    assert temporary(config, 10) - base < 2 * context  # repeated for 8 more rows it would be 8 of keys, 8 of values
