"""Runs with model.exact: no gap in any step, fused or not; what does not go with it is refused, what fails is said."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import pieces
from grpo_jax.experiment import Experiment
from grpo_jax.models import TransformerConfig, create, exact, export
from grpo_jax.rewards import in_graph
from grpo_jax.training import assemble
from grpo_jax.training.configuration import ConfigurationError, parse
from grpo_jax.training.mesh import make_mesh

SMALL = {
    "steps": 3,
    "model": {"path": "tiny", "dtype": "float32", "exact": True, "tiny": {"layers": 1, "hidden": 16, "heads": 2}},
    "data": {"source": "memory", "max_prompt": 6},
    "batch": {"prompts": 3, "group_size": 4, "tokens_per_device": 128},
    "sampling": {"max_new": 20, "temperature": 0.7},
    "training": {"updates": 3},
    "optimizer": {"learning_rate": 1e-2},
    "metrics": {"tensorboard": False},
}
ROWS = [{"prompt": f"{i}+{j}=", "wanted": 48 + i} for i in range(3) for j in range(4)]


@in_graph
def in_the_program(tokens, wanted):
    return -jnp.abs(tokens[:, 0] - wanted) / 100


def on_the_host(completions, wanted):
    return [-abs(len(text) - w) / 100 for text, w in zip(completions, wanted)]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(assemble, "make_mesh", lambda **sizes: make_mesh(data=1, devices=jax.devices()[:1]))
    monkeypatch.setattr("grpo_jax.experiment.report", lambda directory: ("", ""))


def steps_of(folder, reward, **model):
    merged = {**SMALL, "model": SMALL["model"] | model, "directory": str(folder)}
    Experiment(merged, prompts=ROWS, reward_functions=[reward]).train()
    lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("reward", [in_the_program, on_the_host], ids=["fused", "part by part"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_step_has_a_gap(tmp_path, capsys, reward, dtype):
    """Though the weights change, and micro-batches, old log-probs and the sampler are all of other shapes."""
    steps = steps_of(tmp_path / "exact", reward, dtype=dtype)
    assert len(steps) == 3
    assert all(s["gap_max"] == s["gap_mean"] == s["gap_kl"] == 0.0 and s["grad_norm"] > 0 for s in steps)
    said = capsys.readouterr().out
    assert "whatever there is of them (model.exact)" in said and "model.exact is on" not in said
    plain = steps_of(tmp_path / "plain", reward, dtype=dtype, exact=False)
    assert any(s["gap_max"] > 0 for s in plain)
    if dtype == "float32":  # the same completions
        assert steps[0]["reward"] == pytest.approx(plain[0]["reward"], abs=1e-6)


def test_a_backend_on_which_it_fails_is_told(tmp_path, capsys, monkeypatch):
    """Here one whose tiles are other ones for every number of tokens."""
    in_tiles = exact._in_tiles
    other = lambda x: x * (1 + 1e-6 * x.size) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    monkeypatch.setattr(exact, "_in_tiles", lambda *x: jax.tree.map(other, in_tiles(*x)))
    steps = steps_of(tmp_path, on_the_host)
    assert all(s["gap_max"] > 0 for s in steps)
    said = capsys.readouterr().out
    assert said.count("model.exact is on, but log-probs of sampling and of training differ by") == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"sampling": {"max_new": 20, "precision": "int8"}},
            "model.exact makes sampling and training compute the same, but",
        ),
        (
            {"mesh": {"sequence": 2}},
            "model.exact needs all tokens of a completion on one device, but mesh.sequence is 2",
        ),
        ({"model": {**SMALL["model"], "exact": "yes"}}, "model.exact is"),
    ],
    ids=lambda x: "" if isinstance(x, str) else next(iter(x)),
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        parse({**SMALL, **changes})


def test_pieces_agree_to_the_bit(tmp_path):
    """`pieces.load(..., exact=True)`: a loop of one's own has no gap either, and evaluates what a plain one does."""
    config = TransformerConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        initializer_range=0.3,
    )
    export(tmp_path / "model", config, create(config, jax.random.key(3))[1])
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    load = partial(pieces.load, tmp_path / "model", tokenizer="bytes", mesh=mesh)
    model, plain = load(exact=True), load()
    rows, _ = pieces.sample_groups(model, ["ab", "cde"], jax.random.key(0), group_size=3, max_new=9)
    said = jax.jit(lambda params, rows: pieces.evaluate(model, params, rows))(model.params, rows)
    there = np.asarray(rows.exists)
    np.testing.assert_array_equal(np.asarray(said.logps)[there], rows.sampler_logps[there])
    np.testing.assert_array_equal(rows.behavior_logps[there], rows.sampler_logps[there])
    other = pieces.evaluate(plain, plain.params, rows)
    np.testing.assert_allclose(np.asarray(said.logps)[there], np.asarray(other.logps)[there], atol=2e-5)
    np.testing.assert_allclose(
        np.asarray(said.stats["entropy"])[there], np.asarray(other.stats["entropy"])[there], atol=2e-5
    )
