"""Matrices in eight bits against a float64 transcription of the rounding and of the forward pass with it."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import TransformerConfig, create, load, merge
from grpo_jax.models.quantised import Quantised, quantised

GOLDEN = Path(__file__).parent / "golden"
L, E, H, K, D, M, V, P, T = 3, 16, 4, 2, 8, 24, 31, 5, 6
CHANNELS = {  # what an output channel is, by the letters of the matrix
    "query": ("LEHD", "LHD"),
    "key": ("LEHD", "LHD"),
    "value": ("LEHD", "LHD"),
    "output": ("LHDE", "LE"),
    "gate": ("LEM", "LM"),
    "up": ("LEM", "LM"),
    "down": ("LME", "LE"),
    "embedding": ("VE", "V"),
    "unembedding": ("EV", "V"),
}


def rounded(name, matrix):
    """Integers, and in their place the numbers they stand for, one channel after the other."""
    letters, channel = CHANNELS[name]
    order = [letters.index(x) for x in channel] + [i for i, x in enumerate(letters) if x not in channel]
    flat = (
        matrix.astype(np.float64)
        .transpose(order)
        .reshape(np.prod([matrix.shape[i] for i in order[: len(channel)]]), -1)
    )
    scales = np.abs(flat).max(axis=1) / 127
    integers = np.array([np.rint(row / s) if s else row for row, s in zip(flat, scales)])
    back = lambda x: x.reshape([matrix.shape[i] for i in order]).transpose(np.argsort(order))  # noqa: E731
    return back(integers), back(integers * scales[:, None])


def all_rounded(params):
    """The parameters with the numbers that their integers stand for."""
    one = lambda path, w: rounded(path[-1].key, np.asarray(w))[1] if path[-1].key in CHANNELS else np.float64(w)  # noqa: E731
    return jax.tree_util.tree_map_with_path(one, params)


def tiny(**changes):
    sizes = dict(
        vocab_size=V, hidden_size=E, intermediate_size=M, num_layers=L, num_heads=H, num_kv_heads=K, head_dim=D
    )
    return TransformerConfig(**sizes, initializer_range=0.3, **changes)


@partial(jax.jit, static_argnums=0)
def drawn(graphdef, params, contexts, lengths, rows):
    """Logits of rows, as the sampler computes them."""
    model = merge(graphdef, params)
    prefix = model.prefill(contexts, lengths)
    own = model.empty(*rows.shape, prefix.keys.dtype)
    hidden, own = model.decode(rows, prefix, lengths, own, 0)
    return model.logits(hidden.reshape(-1, hidden.shape[-1])), model.head(), own.keys


def forward(config, params, tokens):
    """Logits [T, V] of one sequence in float64: Qwen2's, whose head is the embedding."""
    layers = params["layers"]
    norm = lambda x, w: x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_epsilon) * w  # noqa: E731
    turn = np.arange(len(tokens))[:, None, None] * config.rope.theta ** (-np.arange(0, D, 2) / D)

    def rotated(x):
        one, two = x[..., : D // 2], x[..., D // 2 :]
        return np.concatenate(
            [one * np.cos(turn) - two * np.sin(turn), two * np.cos(turn) + one * np.sin(turn)], axis=-1
        )

    x = params["embedding"][tokens]
    for i in range(L):
        a, m = ({k: v[i] for k, v in layers[part].items()} for part in ("attention", "mlp"))
        y = norm(x, layers["attention_norm"][i])
        q, k, v = (np.einsum("te,ehd->thd", y, a[n]) + a[f"{n}_bias"] for n in ("query", "key", "value"))
        q, k = rotated(q), rotated(k)
        heard = np.zeros_like(q)
        for t in range(len(tokens)):
            for h in range(H):
                score = k[: t + 1, h // (H // K)] @ q[t, h] / np.sqrt(D)
                weight = np.exp(score - score.max())
                heard[t, h] = weight / weight.sum() @ v[: t + 1, h // (H // K)]
        x = x + np.einsum("thd,hde->te", heard, a["output"])
        y = norm(x, layers["mlp_norm"][i])
        gate = y @ m["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ m["up"])) @ m["down"]
    return norm(x, params["norm"]) @ params["embedding"].T


def test_integers_and_scales_of_every_channel():
    params = create(tiny(tie_embeddings=False), jax.random.key(0))[1]
    params["layers"]["mlp"]["gate"] = params["layers"]["mlp"]["gate"].at[1, :, 3].set(0.0)
    got = jax.jit(partial(quantised, dtype=jnp.bfloat16))(params)
    seen = 0
    for path, w in jax.tree_util.tree_leaves_with_path(params):
        name, found = path[-1].key, got
        for key in path:
            found = found[key.key]
        if name not in CHANNELS:
            assert found.dtype == jnp.bfloat16
            continue
        seen += 1
        integers, numbers = rounded(name, np.asarray(w))
        assert found.values.dtype == jnp.int8 and found.scale.dtype == jnp.float32
        np.testing.assert_array_equal(found.values, integers)
        np.testing.assert_allclose(found.matrix(jnp.float32), numbers, rtol=1e-6)
        assert np.prod(found.scale.shape) == np.prod([w.shape[CHANNELS[name][0].index(x)] for x in CHANNELS[name][1]])
        assert (np.abs(found.matrix(jnp.float32) - w) <= found.scale * 0.5001).all()
    assert seen == 9


def test_logits_are_those_of_the_rounded_matrices():
    config = tiny(tie_embeddings=True)
    graphdef, params = create(config, jax.random.key(2))
    rng = np.random.default_rng(0)
    noise = lambda path, w: w + 0.3 * rng.normal(size=w.shape).astype(np.float32) * ("bias" in path[-1].key)  # noqa: E731
    params = jax.tree_util.tree_map_with_path(noise, params)
    contexts, rows = rng.integers(0, V, (2, P)).astype(np.int32), rng.integers(0, V, (2, 3, T)).astype(np.int32)
    lengths = np.array([5, 2], np.int32)
    logits, head, keys = drawn(graphdef, quantised(params, None), contexts, lengths, rows)
    got = np.asarray(logits).T.reshape(2, 3, T, V)
    numbers = all_rounded(params)
    for c in range(2):
        for g in range(3):
            want = forward(config, numbers, np.r_[contexts[c, : lengths[c]], rows[c, g]])[lengths[c] :]
            np.testing.assert_allclose(got[c, g], want, atol=2e-4)
            unrounded = forward(config, jax.tree.map(np.float64, params), np.r_[contexts[c, : lengths[c]], rows[c, g]])
            assert np.abs(unrounded[lengths[c] :] - want).max() > 0.02  # the rounding is more than the tolerance
    assert keys.dtype == jnp.float32
    np.testing.assert_allclose(head, numbers["embedding"].T, rtol=1e-5)


@pytest.mark.parametrize("family", ["gemma3", "llama_biased"])
def test_families_compute_with_the_rounded_matrices(family):
    """What the families' own passes, which are tested elsewhere, compute of the same numbers in float32."""
    config, graphdef, params = load(GOLDEN / family)
    rng = np.random.default_rng(1)
    contexts, rows = (rng.integers(0, config.vocab_size, s).astype(np.int32) for s in ((2, P), (2, 2, T)))
    lengths = np.array([5, 2], np.int32)
    got, _, _ = drawn(graphdef, quantised(params, None), contexts, lengths, rows)
    numbers = jax.tree.map(np.float32, all_rounded(params))
    np.testing.assert_allclose(got, drawn(graphdef, numbers, contexts, lengths, rows)[0], atol=2e-4, rtol=1e-4)
    assert np.abs(got - drawn(graphdef, params, contexts, lengths, rows)[0]).max() > 2e-3


def test_bfloat16_keeps_integers_whole_and_computes_in_bfloat16():
    graphdef, params = create(tiny(tie_embeddings=True), jax.random.key(3))
    low = quantised(params, jnp.bfloat16)
    contexts, rows = np.ones((2, P), np.int32), np.ones((2, 3, T), np.int32)
    logits, head, keys = drawn(graphdef, low, contexts, np.array([5, 2], np.int32), rows)
    assert (logits.dtype, head.dtype, keys.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    exact, _, _ = drawn(graphdef, quantised(params, None), contexts, np.array([5, 2], np.int32), rows)
    assert 1e-4 < np.abs(logits - exact).max() < 0.03 * np.abs(exact).max()
    every = np.arange(-127, 128).astype(np.int8)
    np.testing.assert_array_equal(jnp.asarray(every).astype(jnp.bfloat16).astype(np.int32), every)


def test_a_matrix_is_read_whole():
    matrix = Quantised(jnp.ones((2, 3), jnp.int8), jnp.ones((1, 3)))
    assert matrix[...] is matrix and matrix.T.shape == (3, 2)
    with pytest.raises(TypeError, match="read whole"):
        matrix[0]
