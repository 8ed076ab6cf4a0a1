"""Promises of the design that no other file of tests holds: masks are data, and `[N, T, V]` never exists."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import data, models
from grpo_jax.methods.disco import disco
from grpo_jax.methods.grpo import grpo
from grpo_jax.sampling import LanguageModel
from grpo_jax.training.deal import choose_layout
from grpo_jax.training.loop import Run, iterate
from grpo_jax.training.mesh import make_mesh
from grpo_jax.training.step import begin

VOCABULARY = 40_000


class OneTokenTooMany:
    """A tokenizer whose padding, beginning and stop are ordinary tokens that also occur inside completions."""

    vocab_size, stop_ids, pad_id = 8, (7,), 0

    def encode(self, text):
        return np.array([int(c) for c in text], np.int32)

    encode_prompt = encode

    def decode(self, ids):
        return "".join(map(str, ids))


def run_of(method, *, vocab_size=8, prompts=2, group_size=4, max_new=6, tokenizer=None, tokens=4096) -> Run:
    config = models.TransformerConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        initializer_range=0.3,
    )
    graphdef, params = models.create(config, jax.random.key(0))
    mesh = make_mesh(devices=jax.devices()[:1])
    tokenizer = tokenizer or OneTokenTooMany()
    rows = [{"prompt": "123", "answer": "4"}, {"prompt": "00", "answer": "0"}, {"prompt": "7", "answer": "7"}]
    pool = data.Pool.open(rows, tokenizer=tokenizer)
    language = LanguageModel(
        graphdefs={"policy": graphdef}, tokenizer=tokenizer, mesh=mesh, max_prompt=3, max_new=max_new, tokens=tokens
    )
    optimizer = optax.sgd(0.1)

    def verify(prompts, rows, texts, step):
        scores = np.array([[float(len(text) % 2)] for text in texts], np.float32)
        return rows.replace(scores=scores, channels=("odd",), channel_weights=(1.0,))

    return Run(
        method=method,
        domain=language.domain(),
        pool=pool,
        verify=verify,
        optimizer=optimizer,
        mesh=mesh,
        layout=choose_layout(
            group_size=group_size, prompts=prompts, context_width=8, decisions=max_new, tokens_per_device=tokens
        ),
        policies={"policy": begin(params, optimizer, mesh)},
        state=method.init(pool),
    )


def test_masks_are_data():
    """Tokens that elsewhere mean padding or stop are trained when the policy chose them; what does not exist is not."""
    run = run_of(grpo(prompts=3, group_size=16, kl=0.0), prompts=3, group_size=16)
    seen = []
    run.log = lambda batch, reports: seen.append(batch)
    for _ in range(4):
        iterate(run)
    pads = stops = 0
    for batch in seen:
        tokens, mask, lengths = (np.asarray(x) for x in (batch.completions, batch.completion_mask, batch.lengths))
        exists = np.arange(tokens.shape[1]) < lengths[:, None]
        np.testing.assert_array_equal(mask, exists)
        pads += ((tokens == 0) & exists).sum()
        stops += ((tokens == 7) & exists).sum()
        assert not ((tokens == 7) & (np.arange(tokens.shape[1]) < lengths[:, None] - 1)).any(), "a stop ends the row"
    assert pads > 10 and stops > 10, "the tokens in question did occur, and were trained"


@pytest.mark.parametrize("method", [grpo, disco], ids=["per decision", "scalar"])
def test_no_array_over_all_decisions_and_the_vocabulary(method):
    """Neither sampling nor an update holds logits of every decision: the largest array is far below N*T*V."""
    prompts, group_size, max_new = 4, 16, 32
    biggest: dict[str, int] = {}
    run = run_of(
        method(prompts=prompts, group_size=group_size),
        vocab_size=VOCABULARY,
        prompts=prompts,
        group_size=group_size,
        max_new=max_new,
        tokens=1 << 16,
    )
    logits = prompts * group_size * max_new * VOCABULARY
    update = run.compiled._update["policy"]

    def spying(policy, batch, arrays, order, count, *, first):
        text = update.lower(policy, batch, arrays, order, count, first=first).compile().as_text()
        sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"[a-z]\w*\[([\d,]+)\]", text)]
        biggest["update"] = int(max(sizes))
        return update(policy, batch, arrays, order, count, first=first)

    run.compiled._update["policy"] = spying
    iterate(run)
    # A chunk of logits has at most 64 MiB, 2^24 floats; all of them would be five times that.
    assert logits > 4 * 2**24
    assert biggest["update"] <= 2**24


def test_a_group_without_signal_moves_nothing_without_kl():
    run = run_of(grpo(prompts=2, group_size=4))
    run.verify = lambda prompts, rows, texts, step: rows.replace(
        scores=np.full((len(rows), 1), 0.85, np.float32), channels=("flat",), channel_weights=(1.0,)
    )
    before = jax.device_get(run.policies["policy"].params)
    reports = []
    run.log = lambda batch, updates: reports.extend(updates)
    iterate(run)
    assert reports[0]["grad_norm"] == 0
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(run.policies["policy"].params))
    assert jnp.isfinite(reports[0]["loss"])
