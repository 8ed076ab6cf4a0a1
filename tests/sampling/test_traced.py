"""A draw inside a larger program is the draw of `sample`: the same completions and log-probs, row by row."""

from __future__ import annotations

from collections import Counter
from functools import partial

import jax
import numpy as np

from grpo_jax import models
from grpo_jax.data import load_tokenizer
from grpo_jax.sampling import LanguageModel
from grpo_jax.training.batches import padded
from grpo_jax.training.deal import Layout
from grpo_jax.training.mesh import make_mesh
from grpo_jax.types import Prompt, Request


def test_rows_are_those_of_sample():
    """Several launches, one prompt twice, a smaller budget, restricted options, and padding rows."""
    config = models.TransformerConfig(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
        initializer_range=0.3,
    )  # fmt: skip
    graphdef, params = models.create(config, jax.random.key(0))
    language = LanguageModel(
        graphdefs={"policy": graphdef}, tokenizer=load_tokenizer("bytes"), mesh=make_mesh(devices=jax.devices()[:1]),
        max_prompt=4, max_new=5, tokens=56, cells=(2, 4),
    )  # fmt: skip
    domain, key, params = language.domain(), jax.random.key(1), {"policy": params}
    prompts = [Prompt(3, "ab", {"level": 1.0}), Prompt(5, "c", {"level": None}), Prompt(3, "ab", {"level": 1.0})]
    requests = [Request(p, count=3, max_new=4, temperature=0.8, options={"top_k": 9}) for p in prompts]
    wanted = domain.sample(params, requests, key)
    rows, launches = domain.prepare(requests, Counter())
    assert len(launches.cells.budget) > 1
    template = padded(rows, Layout(3, 4, 8, 5), updates=1)
    template = template.replace(weights=np.float32(template.prompt_ids >= 0))
    drawn = jax.device_get(jax.jit(partial(domain.draw, params))(template, launches, key))
    expected = padded(wanted, Layout(3, 4, 8, 5), updates=1)
    assert len(drawn) == 12 and (drawn.lengths[:9] > 0).all() and not drawn.lengths[9:].any()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), drawn, expected)
    np.testing.assert_array_equal(drawn.completions, expected.completions)
