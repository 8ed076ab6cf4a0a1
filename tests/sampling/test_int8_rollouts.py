"""Rollouts drawn with int8 matrices: the same on every mesh, gathered as bytes, and what training sees of them."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives

from grpo_jax.experiment import Experiment
from grpo_jax.models import TransformerConfig, create, logical_axes, shardings
from grpo_jax.models.quantised import quantised
from grpo_jax.rewards import in_graph
from grpo_jax.sampling import LanguageModel
from grpo_jax.sampling.weights import Arrangement, arrange, prepared
from grpo_jax.training import assemble
from grpo_jax.training.configuration import ConfigurationError, parse
from grpo_jax.training.correction import corrected, uncorrected
from grpo_jax.training.mesh import make_mesh
from grpo_jax.types import Decisions, Method, Prompt, Request

CONFIG = TransformerConfig(
    vocab_size=16,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    initializer_range=0.4,
)
GRAPHDEF, PARAMS = create(CONFIG, jax.random.key(1))
T = 6


class Letters:
    stop_ids = (15,)

    def encode_prompt(self, text):
        return np.array([ord(c) - ord("a") for c in text], np.int32)

    encode = encode_prompt


def language(sizes, **options):
    mesh = make_mesh(**sizes) if sizes else make_mesh(devices=jax.devices()[:1])
    arrangement = arrange(CONFIG, mesh, jnp.float32, **options)
    return LanguageModel(
        {"policy": GRAPHDEF}, Letters(), mesh, max_prompt=8, max_new=T, tokens=4096, arrangement=arrangement
    )


def rows_of(params, sizes, **options):
    model = language(sizes, **options)
    params = jax.device_put(params, shardings(logical_axes(CONFIG), model.mesh))
    given = np.array([3, 4], np.int32), np.full(2, np.nan, np.float32)
    asked = [Request(Prompt(i, text), count=4) for i, text in enumerate(["abc", "jd"])]
    return model.sample(
        {"policy": params}, [*asked, Request(Prompt(2, "kk"), count=2, prefix=given)], jax.random.key(5)
    )


@pytest.fixture(scope="module")
def reference():
    return rows_of(PARAMS, {}, precision="int8")


def test_completions_and_their_log_probs_are_those_of_the_rounded_model(reference):
    """Drawn in float32 with the numbers that the integers stand for; given decisions are scored alike."""
    numbers = jax.tree.map(
        lambda x: x if isinstance(x, jax.Array) else x.matrix(jnp.float32),
        quantised(PARAMS, None),
        is_leaf=lambda x: not isinstance(x, dict),
    )
    same, other = rows_of(numbers, {}), rows_of(PARAMS, {})
    np.testing.assert_array_equal(reference.completions, same.completions)
    np.testing.assert_allclose(reference.sampler_logps, same.sampler_logps, atol=2e-5)
    given = np.s_[8:, :2]
    assert np.isnan(reference.behavior_logps[given]).all()
    assert np.abs(reference.sampler_logps[given] - other.sampler_logps[given]).max() > 1e-3


@pytest.mark.parametrize(
    "sizes, weights",
    [(dict(data=2, fsdp=2, tensor=2), "divided"), (dict(fsdp=4, tensor=2), "gathered")],
    ids=["divided", "gathered"],
)
def test_the_mesh_does_not_matter(reference, sizes, weights):
    rows = rows_of(PARAMS, sizes, wanted=weights, precision="int8")
    np.testing.assert_array_equal(rows.completions, reference.completions)
    np.testing.assert_allclose(rows.sampler_logps, reference.sampler_logps, atol=1e-4)


def test_bytes_cross_the_network_and_scales_lie_as_their_channels():
    mesh = make_mesh(fsdp=4, tensor=2)
    arrangement = arrange(CONFIG, mesh, jnp.bfloat16, wanted="gathered", precision="int8")
    here = jax.device_put(PARAMS, shardings(logical_axes(CONFIG), mesh))
    program = prepared(arrangement, jnp.bfloat16)
    got, want = program(here), prepared(Arrangement(precision="int8"), jnp.bfloat16)(PARAMS)
    for x, y, place in zip(*map(jax.tree.leaves, (got, want, arrangement.to)), strict=True):
        assert x.sharding == place
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
    gate, down = (got["layers"]["mlp"][name] for name in ("gate", "down"))
    assert gate.scale.shape == (1, 1, 24) and gate.scale.sharding.shard_shape((1, 1, 24)) == (1, 1, 12)
    assert down.values.sharding.shard_shape((1, 24, 16)) == (1, 12, 16) and down.scale.is_fully_replicated
    text = program.lower(here).compile().as_text()
    seen = [c for c in collectives(text) if c.kind == "all-gather"]
    integers = sum(c.size for c in seen if not c.floating)
    assert integers == sum(x.size for x in jax.tree.leaves(got) if x.dtype == jnp.int8) / 2 > 0
    assert sum(c.size for c in seen if c.floating) < 0.05 * integers
    size = 1e-6 * sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(got))
    assert f"gathered weights: {size:.3g} MB of int8 per device" in arrangement.said


SMALL = {
    "steps": 3,
    "model": {"path": "tiny", "dtype": "float32", "tiny": {"layers": 1, "hidden": 16, "heads": 2, "mlp": 16}},
    "data": {"source": "memory", "max_prompt": 6},
    "batch": {"prompts": 3, "group_size": 4, "tokens_per_device": 1024},
    "sampling": {"max_new": 3, "precision": "int8"},
    "method": {"name": "grpo"},
    "optimizer": {"learning_rate": 1e-2},
    "checkpoint": {"every": 2},
    "metrics": {"tensorboard": False},
}
ROWS = [{"prompt": f"{i}+{j}=", "wanted": 48 + i} for i in range(3) for j in range(4)]


@in_graph
def close(tokens, wanted):
    return -jnp.abs(tokens[:, 0] - wanted) / 100


def experiment(folder, **changes):
    merged = {**SMALL, **{k: {**SMALL.get(k, {}), **v} for k, v in changes.items()}, "directory": str(folder)}
    return Experiment(merged, prompts=ROWS, reward_functions=[close])


def records(run):
    lines = map(json.loads, (Path(run.directory) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


def test_a_run_sees_the_gap_resumes_to_the_bit_and_evaluates_what_it_saves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assemble, "make_mesh", lambda **sizes: make_mesh(data=1, devices=jax.devices()[:1]))
    monkeypatch.setattr("grpo_jax.experiment.report", lambda directory: ("", ""))
    straight, parted = experiment(tmp_path / "straight"), experiment(tmp_path / "parted")
    straight.train(3), parted.train(2)
    again = experiment(tmp_path / "parted")
    again.train(3)
    for a, b in zip(*(jax.tree.leaves(x.run.policies) for x in (straight, again)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype != jnp.int8
    one, other = records(straight), records(again)
    for name in ("gap_mean", "gap_kl", "reward", "loss"):
        assert [r[name] for r in one] == [r[name] for r in other]
    assert all(r["gap_mean"] > 1e-4 and r["gap_kl"] > 0 and r["ratio_max"] == 1.0 for r in one)
    assert uncorrected("int8", cap=None) in capsys.readouterr().out
    assert uncorrected("int8", cap=2.0) == uncorrected(None, cap=None) == ""
    prompt = straight.pool[0]
    rows, plain = straight.sample(prompt), experiment(tmp_path / "plain", sampling={"precision": None})
    plain.begin(straight._params()["policy"])
    np.testing.assert_array_equal(rows.sampler_logps, plain.sample(prompt).sampler_logps)


def test_what_cannot_be_is_said():
    wrong = {**SMALL, "sampling": {"precision": "int4"}}
    with pytest.raises(ConfigurationError, match='sampling.precision is "int4" .text.; expected int8, or null'):
        parse(wrong)
    with pytest.raises(ConfigurationError, match="training.importance_cap is 0.0 .number.; expected number above 0"):
        parse({**SMALL, "training": {"importance_cap": 0.0}})


def test_the_loss_of_each_sampled_token_is_weighed():
    old = np.log(np.array([[0.2, 0.9, 0.5, 0.3]]))
    sampler = np.log(np.array([[0.4, 0.3, 0.5, 0.1]]))
    behavior = np.where([[True, True, True, False]], sampler, np.nan)
    plain = Method(*[None] * 7)._replace(objective=lambda new, batch, arrays: (new.logps, {"ratio": new.logps}))
    rows = SimpleNamespace(old=Decisions(logps=old), behavior_logps=behavior, sampler_logps=sampler)
    new = Decisions(logps=jnp.array([[1.0, 2.0, 3.0, 4.0]]))
    loss, reported = corrected(plain, cap=2.0).objective(new, rows, {})
    np.testing.assert_allclose(reported["importance"], [[0.5, 2.0, 1.0, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(loss, [[0.5, 4.0, 3.0, 4.0]], rtol=1e-6)
    assert set(reported) == {"ratio", "importance"} and corrected(plain, cap=None) is plain
    whole = plain._replace(objective=lambda new, batch, arrays: (new.logps.sum(), {}))
    with pytest.raises(ValueError, match="importance_cap is 2.0, which weighs the loss of each token"):
        corrected(whole, cap=2.0).objective(new, rows, {})
