"""Exact arithmetic: right by transformers and by float64; each token by itself; the same bits in whatever shapes."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparisons import check_directory

from grpo_jax.models import TransformerConfig, abstract, create, evaluate, exact, merge
from grpo_jax.models.cached import KeysValues

ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent / "golden"
CONFIG = TransformerConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    initializer_range=0.3,
    exact=True,
)


@pytest.mark.parametrize("name", ["gemma3", "llama_biased", "qwen2_window", "qwen3"])
def test_logits_and_greedy_tokens_equal_transformers(name):
    with np.load(GOLDEN / name / "expected.npz") as expected:
        assert check_directory(GOLDEN / name, dict(expected), exact=True).exact


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_are_those_of_ordinary_arithmetic(remat):
    """Of every weight, through rows and contexts, and of what a padded context holds nothing."""
    graphdef, params = create(CONFIG, jax.random.key(0))
    plain, _ = abstract(dataclasses.replace(CONFIG, exact=False))
    rng = np.random.default_rng(0)
    contexts, rows = (rng.integers(0, 50, shape, dtype=np.int32) for shape in ((2, 9), (2, 3, 7)))
    slope = rng.normal(size=(2, 3, 7, 32)).astype(np.float32)

    @partial(jax.jit, static_argnums=0)
    def gradient(graphdef, params):
        def loss(params):
            hidden = merge(graphdef, params)(contexts, np.array([9, 4], np.int32), rows, remat=remat)
            return (hidden * slope).sum(), hidden

        return jax.grad(loss, has_aux=True)(params)

    got, want = gradient(graphdef, params), gradient(plain, params)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.abs(b).max())), rtol=0)


@pytest.mark.parametrize(
    "which, remat", [("logps", False), ("entropy", False), ("both", True), ("some rows", True)], ids=str
)
def test_gradients_of_log_probs_and_entropy_are_those_of_ordinary_arithmetic(which, remat):
    """With windows, caps, temperatures and an empty context."""
    caps = {"attention_softcap": 20.0, "final_softcap": 15.0}
    config = dataclasses.replace(CONFIG, family="gemma2", **caps, sliding_window=5, sliding_layers=(True, False, True))
    graphdef, params = create(config, jax.random.key(0))
    plain, _ = abstract(dataclasses.replace(config, exact=False))
    rng, (C, G, T) = np.random.default_rng(0), (3, 2, 9)
    tokens = lambda *shape: jnp.asarray(rng.integers(0, 50, shape), jnp.int32)  # noqa: E731
    rows = SimpleNamespace(
        contexts=SimpleNamespace(tokens=tokens(C, 40), lengths=jnp.array([40, 7, 0])),
        completions=tokens(C * G, T),
        temperature=jnp.array([1.0, 0.7, 0.5, 1.0, 1.0, 2.0]),
    )
    slopes = rng.normal(size=(2, C * G, T)).astype(np.float32)
    slopes[0 if which == "entropy" else 1] *= which == "both"
    slopes[:, ::2] *= which != "some rows"

    @partial(jax.jit, static_argnums=0)
    def gradient(graphdef, params):
        def loss(params):
            said = evaluate(graphdef, params, rows, wants=("entropy",), remat=remat)
            numbers = jnp.stack([said.logps, said.stats["entropy"]])
            return (numbers * slopes).sum(), numbers

        return jax.grad(loss, has_aux=True)(params)

    (got, said), (want, expected) = gradient(graphdef, params), gradient(plain, params)
    np.testing.assert_allclose(said, expected, atol=2e-5)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.abs(b).max())), rtol=0)


def attention(queries, prefix, lengths, keys, values, column, window, cap):
    """Row by row, in float64; keys and values [C, G, T, Hkv, D], the prefix's [C, P, Hkv, D]."""
    out = np.zeros(queries.shape)
    C, G, S, H, _ = queries.shape
    for c, g, s, h in np.ndindex(C, G, S, H):
        k = h // (H // keys.shape[3])
        here = column + s
        near = slice(0, here + 1)
        seen = np.concatenate([prefix[0][c, : lengths[c], k], keys[c, g, near, k]])
        heard = np.concatenate([prefix[1][c, : lengths[c], k], values[c, g, near, k]])
        scores = cap * np.tanh(seen @ queries[c, g, s, h] * CONFIG.score_scale / cap)
        scores[: max(0, len(seen) - window)] = -np.inf
        weights = np.exp(scores - scores.max())
        out[c, g, s, h] = weights @ heard / weights.sum()
    return out


@pytest.mark.parametrize("shape", [(3, 5, 1), (1, 2, 1), (2, 1, 6)], ids=str)
@pytest.mark.parametrize("window", [10_000, 20])
def test_attention_is_that_of_float64(shape, window):
    (C, G, S), rng, D, K = shape, np.random.default_rng(1), 8, exact.keys_at_once()
    column, lengths = K - S // 2, np.array([0, K + 5, 2 * K])[-C:]
    queries = rng.normal(size=(C, G, S, 4, D))
    context = [rng.normal(size=(C, 2 * K, 2, D)) for _ in "kv"]
    own = [rng.normal(size=(C, G, 2 * K, 2, D)) for _ in "kv"]
    want = attention(queries, context, lengths, *own, column, window, 3.0)

    prefix = KeysValues(np.moveaxis(context[0], 1, -1)[None], np.swapaxes(context[1], 1, 2)[None])
    blocks = [np.moveaxis(x.reshape(C * G, 2, K, 2, D), 1, 0)[None, :, None] for x in own]  # [1, B, 1, N, K, Hkv, D]
    blocks = [np.concatenate([x, rng.normal(size=x.shape)], axis=3) for x in blocks]  # and rows that are not in hand
    cache = KeysValues(np.moveaxis(blocks[0], -3, -1), np.swapaxes(blocks[1], -3, -2))
    to32 = partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    config = dataclasses.replace(CONFIG, attention_softcap=3.0)
    got = jax.jit(partial(exact.attend_cached, config))(
        to32(queries), to32(prefix), jnp.asarray(lengths, jnp.int32), to32(cache), 0, column, window
    )
    np.testing.assert_allclose(got, want, atol=2e-6, rtol=0)


def double(matrix, x, scale):
    return jnp.tanh(x @ matrix) * scale[..., None]


@pytest.mark.parametrize("count", [1, 64, 65, 200])
def test_each_token_of_a_tile_by_itself(count):
    """The same bits alone and among others, even if one of those is NaN, the first one too; gradients as without."""
    rng = np.random.default_rng(2)
    matrix, x, scale = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((16, 24), (count, 16), (count,)))
    tiled = jax.jit(lambda w, x, scale: exact.in_tiles(double, x, scale, weights=w, axis="C"))
    got = tiled(matrix, x, scale)
    np.testing.assert_allclose(got, np.tanh(np.float64(x) @ np.float64(matrix)) * np.float64(scale)[:, None], atol=1e-5)
    np.testing.assert_array_equal(tiled(matrix, x[-1:], scale[-1:]), got[-1:])
    for bad in {0, count // 2} - {count - 1}:
        spoilt = tiled(matrix, x.at[bad].set(jnp.nan), scale)
        np.testing.assert_array_equal(np.delete(spoilt, bad, 0), np.delete(got, bad, 0))
        assert np.isnan(spoilt[bad]).all()
    square = lambda way: jax.grad(lambda w, x: (way(w, x, scale) ** 2).sum(), (0, 1))(matrix, x)  # noqa: E731
    for a, b in zip(square(tiled), square(double), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_the_loop_of_one_tile_stays_a_loop():
    """Opened, what is in it would be compiled together with what is around it."""
    x, matrix = jnp.ones((3, 16)), jnp.ones((16, 24))
    tiled = jax.jit(lambda w, x: 2 * exact.in_tiles(double, x + 1, x[:, 0], weights=w, axis="C"))
    assert " while(" in tiled.lower(matrix, x).compile().as_text()


PROOF = """
import dataclasses, json, sys, jax
from benchmarks import exact

name, dtype = sys.argv[1:]
config = dataclasses.replace(exact.MODELS[name], exact=True)
print(json.dumps(exact.compared(config, jax.numpy.dtype(dtype))))
"""


@pytest.mark.parametrize(
    "name, dtype, flags",
    [
        ("windows, caps, two ropes", "float32", ""),
        (
            "norms of queries and keys",
            "bfloat16",
            "--xla_cpu_use_fusion_emitters=false --xla_force_host_platform_device_count=4",
        ),
    ],
    ids=["device", "mesh"],
)
def test_no_decision_differs_as_users_compile_it(name, dtype, flags):
    """In a process of its own, because these tests are compiled with little optimisation."""
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    asked = [sys.executable, "-c", PROOF, name, dtype]
    result = subprocess.run(asked, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found.pop("decisions") > 1000
    assert len(found) == (11 if "device_count" in flags else 8)
    assert set(found.values()) == {0}, found
