"""What the model computes with a Hugging Face directory, against what `transformers` computed with it."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models import TransformerConfig, abstract, load, merge, softcap
from grpo_jax.types import PyTree


def logits_of(model, hidden):
    return softcap((hidden @ model.head()).astype(jnp.float32), model.config.final_softcap)


@partial(jax.jit, static_argnums=0)
def row_logits(graphdef, params: PyTree, contexts, lengths, rows):
    model = merge(graphdef, params)
    return logits_of(model, model(contexts, lengths, rows))


@partial(jax.jit, static_argnums=(0, 4))
def greedy(graphdef, params: PyTree, tokens, lengths, count: int):
    """`count` greedy tokens after each prompt, by prefill and one decode step per token."""
    model = merge(graphdef, params)
    before = lengths - 1
    own = model.empty(len(tokens), 1, count, jnp.float32)
    prefix = model.prefill(tokens, before)

    def step(carry, column):
        token, own = carry
        hidden, own = model.decode(token[:, None, None], prefix, before, own, column)
        token = jnp.argmax(logits_of(model, hidden)[:, 0, 0], axis=-1)
        return (token, own), token

    last = jnp.take_along_axis(tokens, before[:, None], axis=1)[:, 0]
    return jax.lax.scan(step, (last, own), jnp.arange(count))[1].T


def check_directory(path: Path, expected: dict[str, np.ndarray], *, exact: bool = False) -> TransformerConfig:
    """Logits to 1e-4 and greedy tokens exactly, whether the prompt is all context, all row, or cut in two."""
    config, graphdef, params = load(path)
    if exact:
        config = dataclasses.replace(config, exact=True)
        graphdef, _ = abstract(config)
    tokens, lengths, logits = expected["tokens"], expected["lengths"], expected["logits"]
    width = tokens.shape[1]
    for cut in (np.zeros(3, np.int32), np.array([11, 3, 5], np.int32)):
        rows = np.stack([np.roll(row, -n) for row, n in zip(tokens, cut)])
        context = np.where(np.arange(14) < cut[:, None], tokens[:, :14], 99_999)
        got = row_logits(graphdef, params, context, cut, rows[:, None])[:, 0]
        for c in range(len(tokens)):
            steps = lengths[c] - cut[c]
            np.testing.assert_allclose(got[c, :steps], logits[c, cut[c] : lengths[c]], atol=1e-4, rtol=0)
    assert width > 20 and np.abs(logits).max() > 1
    got = greedy(graphdef, params, tokens, lengths, expected["greedy"].shape[1])
    np.testing.assert_array_equal(got, expected["greedy"])
    return config
