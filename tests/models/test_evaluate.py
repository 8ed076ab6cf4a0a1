"""Log-probs of a batch against a plain forward of every row by itself, in float64 from the logits on."""

import dataclasses
import math
import re
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.losses import chunked_logps
from grpo_jax.models import TransformerConfig, abstract, create, evaluate, merge, softcap
from grpo_jax.models.evaluate import outweighs
from grpo_jax.types import Contexts

CONFIG = TransformerConfig(
    vocab_size=19,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    sliding_window=5,
    sliding_layers=(True, False),
    final_softcap=9.0,
    initializer_range=0.4,
)
GRAPHDEF, PARAMS = create(CONFIG, jax.random.key(2))
C, G, P, T = 4, 3, 9, 7
LENGTHS = np.array([9, 1, 4, 6], np.int32)


def batch(seed=0, *, c=C, g=G, p=P, t=T):
    rng = np.random.default_rng(seed)
    return SimpleNamespace(
        contexts=Contexts(tokens=rng.integers(0, 19, (c, p)).astype(np.int32), lengths=np.resize(LENGTHS, c)),
        completions=rng.integers(0, 19, (c * g, t)).astype(np.int32),
        temperature=np.resize(np.float32([1.0, 0.6, 1.7, 1.0, 2.5]), c * g),
    )


def parts(rows):
    return rows.contexts.tokens, rows.contexts.lengths, rows.completions, rows.temperature


@partial(jax.jit, static_argnames=("wants", "remat"))
def compute(params, tokens, lengths, completions, temperature, **options):
    rows = SimpleNamespace(
        contexts=Contexts(tokens=tokens, lengths=lengths), completions=completions, temperature=temperature
    )
    return evaluate(GRAPHDEF, params, rows, **options)


def evaluated(rows, **options):
    return compute(PARAMS, *parts(rows), **options)


@jax.jit
def plain_logits(tokens):
    model = merge(GRAPHDEF, PARAMS)
    none = jnp.zeros((len(tokens), 0), jnp.int32)
    hidden = model(none, jnp.zeros(len(tokens), jnp.int32), tokens[:, None])
    return softcap(hidden[:, 0] @ model.head(), CONFIG.final_softcap)


def float64_decisions(rows):
    """logps and entropy [N, T]: each row alone, its context before it, without padding in between."""
    n = len(rows.completions)
    sequences, starts = np.zeros((n, P + T), np.int32), []
    for i in range(n):
        c = i // (n // len(rows.contexts.lengths))
        sequence = [*rows.contexts.tokens[c][: rows.contexts.lengths[c]], *rows.completions[i]]
        sequences[i, : len(sequence)] = sequence
        starts.append(int(rows.contexts.lengths[c]) - 1)
    logits = np.asarray(plain_logits(sequences), np.float64)
    logps, entropy = np.zeros((n, T)), np.zeros((n, T))
    for i, start in enumerate(starts):
        z = logits[i, start : start + T] / rows.temperature[i]
        everything = z - z.max(-1, keepdims=True)
        everything -= np.log(np.exp(everything).sum(-1, keepdims=True))
        logps[i] = everything[np.arange(T), rows.completions[i]]
        entropy[i] = -(np.exp(everything) * everything).sum(-1)
    return logps, entropy


def test_logps_and_entropy_at_each_rows_temperature():
    rows = batch()
    got = evaluated(rows, wants=("entropy",))
    logps, entropy = float64_decisions(rows)
    np.testing.assert_allclose(got.logps, logps, atol=5e-5)
    np.testing.assert_allclose(got.stats["entropy"], entropy, atol=5e-5)
    assert got.logps.dtype == got.stats["entropy"].dtype == jnp.float32
    cold = batch()
    cold.temperature = np.ones_like(rows.temperature)
    assert np.abs(float64_decisions(cold)[0] - logps).max() > 0.5  # the temperatures of the test do something


def test_nothing_but_logps_unless_wanted():
    plain = evaluated(batch())
    assert plain.stats == {}
    np.testing.assert_allclose(plain.logps, evaluated(batch(), wants=("entropy",)).logps, atol=1e-6)


def test_in_two_turns_as_on_tpu(monkeypatch):
    """Where hidden states of half the rows fit fast memory: the same, and the same gradient of head and layers."""
    module, rows = sys.modules["grpo_jax.models.evaluate"], batch(g=4)
    weights = np.random.default_rng(3).standard_normal(rows.completions.shape).astype(np.float32)

    def gradient(params):
        said = evaluate(GRAPHDEF, params, rows, wants=("entropy",))
        return (weights * (said.logps + 0.3 * said.stats["entropy"])).sum()

    whole = evaluated(rows, wants=("entropy",)), jax.grad(gradient)(PARAMS)
    states, asked = C * 4 * T * 16 * 8, []
    monkeypatch.setattr(module, "on_tpu", lambda: True)
    monkeypatch.setattr(module, "STATES", states - 1)
    monkeypatch.setattr(module, "chunked_logps", lambda h, *a, **k: asked.append(h.shape) or chunked_logps(h, *a, **k))
    halves = evaluate(GRAPHDEF, PARAMS, rows, wants=("entropy",)), jax.grad(gradient)(PARAMS)
    assert set(asked) == {(C, 2, T, 16)}
    for want, got in zip(jax.tree.leaves(whole), jax.tree.leaves(halves), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5 * np.abs(want).max())


def test_padding_of_contexts_and_completions_does_not_matter():
    rows = batch()
    wider = SimpleNamespace(
        contexts=Contexts(
            tokens=np.pad(rows.contexts.tokens, ((0, 0), (0, 5)), constant_values=18), lengths=rows.contexts.lengths
        ),
        completions=np.pad(rows.completions, ((0, 0), (0, 4)), constant_values=18),
        temperature=rows.temperature,
    )
    for c, n in enumerate(LENGTHS):
        wider.contexts.tokens[c, n:] = 17
    np.testing.assert_allclose(evaluated(wider).logps[:, :T], evaluated(rows).logps, atol=2e-5)


def test_an_empty_context_is_finite():
    """Padding contexts have length 0, and their rows carry no weight; a NaN would survive the weight."""
    rows = batch()
    rows.contexts = rows.contexts.replace(lengths=np.array([9, 0, 0, 6], np.int32))
    rows.contexts.tokens[1:3] = 0
    rows.completions[3:9] = -1
    got = evaluated(rows, wants=("entropy",))
    assert np.isfinite(got.logps).all() and np.isfinite(got.stats["entropy"]).all()


def apart(rows):
    """The same rows, each with a copy of its context."""
    contexts = jax.tree.map(lambda x: np.repeat(x, G, axis=0), rows.contexts)
    return SimpleNamespace(contexts=contexts, completions=rows.completions, temperature=rows.temperature)


def test_gradients_are_those_of_rows_that_share_nothing():
    rows = batch(1)
    weights = np.random.default_rng(0).normal(size=(C * G, T))

    def gradient(rows, **options):
        def loss(params):
            said = compute(params, *parts(rows), wants=("entropy",), **options)
            return jnp.sum(weights * said.logps) + 0.3 * jnp.sum(said.stats["entropy"])

        return jax.tree.leaves(jax.jit(jax.grad(loss))(PARAMS))

    alone, shared = gradient(apart(rows)), gradient(rows, remat=True)
    scale = max(float(jnp.abs(x).max()) for x in alone)
    for want, got in zip(alone, shared, strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5 * scale)


def sizes(text):
    shapes = re.findall(r"\b(?:f32|bf16|s32|pred|u32)\[([\d,]+)\]", text)
    return {math.prod(map(int, shape.split(","))) for shape in shapes}


def compiled_gradient(config, *, c, g, p, t):
    """The text of the compiled gradient and its temporary memory; nothing is allocated."""
    graphdef, params = abstract(config)
    whole = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731

    def loss(params, tokens, lengths, completions):
        rows = SimpleNamespace(
            contexts=Contexts(tokens=tokens, lengths=lengths), completions=completions, temperature=jnp.ones(c * g)
        )
        return evaluate(graphdef, params, rows).logps.sum()

    compiled = jax.jit(jax.grad(loss)).lower(params, whole(c, p), whole(c), whole(c * g, t)).compile()
    return compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes


def test_a_context_is_computed_once_forward_and_backward():
    """No array has 3 contexts x 5 rows x 17 context tokens x (a part of) the width 14 elements, or a multiple."""
    config = dataclasses.replace(CONFIG, hidden_size=14, head_dim=14, intermediate_size=28)
    found = sizes(compiled_gradient(config, c=3, g=5, p=17, t=11)[0])
    assert 3 * (17 + 5 * 11) * 14 in found  # context and rows side by side
    assert not [size for size in found if size % (3 * 5 * 17 * 7) == 0]


def test_logits_of_all_decisions_never_exist():
    vocabulary = 100_003
    config = dataclasses.replace(CONFIG, vocab_size=vocabulary)
    text, temporary = compiled_gradient(config, c=2, g=8, p=8, t=256)
    rows = 2 * 8 * 256
    assert max(size for size in sizes(text)) < rows * vocabulary / 16
    assert temporary < rows * vocabulary * 4 / 4


def test_layers_keep_more_where_it_does_not_outweigh_the_parameters():
    """Qwen2.5-0.5B in bfloat16: 494M parameters, 7.9 GB of training state, 0.60 MB kept of a token."""
    config = TransformerConfig(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        qkv_bias=True,
        query_key_norm=False,
    )
    params = abstract(config, jnp.bfloat16)[1]
    assert not outweighs(config, 12_000, params) and outweighs(config, 14_000, params)


@pytest.mark.parametrize("exact, after_attention", [(False, 64 + 2 * 128), (True, 0)])
def test_layers_of_a_tiny_model_keep_more_though_its_parameters_are_less(exact, after_attention):
    """0.9 MB of training state, 2.5 KB kept of a token (1.3 in exact arithmetic): computed again from 64 MiB on."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 1, "num_heads": 4, "num_kv_heads": 4}
    config = TransformerConfig(vocab_size=258, head_dim=16, qkv_bias=False, query_key_norm=False, exact=exact, **sizes)
    params = abstract(config)[1]
    kept = 4 * (64 + 2 * 16 * 8 + after_attention)
    most = 2**26 // kept
    assert not outweighs(config, most, params) and outweighs(config, most + 1, params)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"\['kl', 'mean'\] are wanted"):
        evaluated(batch(), wants=("entropy", "mean", "kl"))
    rows = batch()
    rows.completions = rows.completions[:-1]
    with pytest.raises(ValueError, match="equal runs under their contexts, got 11 rows under 4 contexts"):
        evaluated(rows)
