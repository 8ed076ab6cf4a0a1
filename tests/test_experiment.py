"""A run from configuration to report: it resumes bit for bit, stops cleanly, and refuses what cannot be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from grpo_jax.experiment import Experiment
from grpo_jax.rewards import RewardError
from grpo_jax.training.metrics import read_metrics

SMALL = {
    "name": "small",
    "steps": 10,
    "model": {"path": "tiny", "dtype": "float32", "remat": False, "tiny": {"layers": 1, "hidden": 32, "mlp": 64}},
    "data": {"source": "addition", "max_prompt": 6},
    "rewards": ["exact", {"function": "length", "target": 1, "limit": 4, "weight": 0.5}],
    "batch": {"prompts": 4, "group_size": 4, "tokens_per_device": 1024},
    "sampling": {"max_new": 3},
    "method": {"name": "grpo", "kl": 0.01},
    "optimizer": {"learning_rate": 3e-3, "schedule": "cosine"},
    "evaluation": {"every": 5, "prompts": 8, "samples": 4, "k": [1, 4]},
    "checkpoint": {"every": 2},
    "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    "metrics": {"console": False, "tensorboard": False},
}
ONE_DEVICE = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """The mesh of these runs has one device, though the test process has eight."""
    from grpo_jax.training import assemble

    monkeypatch.setattr(assemble, "make_mesh", _first_device)


def _first_device(**sizes):
    from grpo_jax.training.mesh import make_mesh

    return make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])


def config(tmp_path: Path, **changes) -> dict:
    merged = json.loads(json.dumps(SMALL))
    for key, value in changes.items():
        merged[key] = (
            {**merged[key], **value} if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
        )
    return {**merged, "directory": str(tmp_path / "run")}


def leaves(experiment: Experiment) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(experiment.run.policies)]


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    """Ten steps straight equal some steps, SIGKILL in the middle of one, and the rest, metrics included."""
    straight = Experiment(config(tmp_path / "straight"))
    straight.train()

    broken = config(tmp_path / "killed")
    script = "import json, sys; from grpo_jax.experiment import Experiment; Experiment(json.loads(sys.argv[1])).train()"
    process = subprocess.Popen([sys.executable, "-c", script, json.dumps(broken)], env=ONE_DEVICE)
    metrics = Path(broken["directory"]) / "metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if metrics.exists() and sum('"train"' in line for line in metrics.read_text().splitlines()) >= 5:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = Experiment(broken).checkpoints.latest()
    assert done is not None and done < 10, "the run was to be killed before its end"

    resumed = Experiment(broken)
    resumed.train()
    assert resumed.run.state.step == straight.run.state.step == 10
    for a, b in zip(leaves(straight), leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    one, other = read_metrics(straight.directory), read_metrics(resumed.directory)
    for name in ("reward", "loss", "kl", "eval/pass@1"):
        np.testing.assert_array_equal(one[name].steps, other[name].steps)
        np.testing.assert_array_equal(one[name].values, other[name].values)


def test_several_updates_and_stored_groups_resume_too(tmp_path):
    changes = {"training": {"updates": 2}, "method": {"name": "dapo", "max_rounds": 2, "clip_high": 0.3}, "steps": 6}
    straight = Experiment(config(tmp_path / "straight", **changes))
    straight.train()
    parted = Experiment(config(tmp_path / "parted", **changes))
    parted.train(steps=3)
    again = Experiment(config(tmp_path / "parted", **changes))
    again.train()
    for a, b in zip(leaves(straight), leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_reward_that_raises_stops_the_run_with_its_checkpoint(tmp_path):
    def reward(completions, step, **columns):
        if step == 3:
            raise KeyError("no such key")
        return [float(len(c)) for c in completions]

    experiment = Experiment(config(tmp_path, evaluation={"prompts": 1, "every": 0}), reward_functions=[reward])
    with pytest.raises(RewardError, match="reward") as caught:
        experiment.train()
    assert "the same command goes on" in "".join(caught.value.__notes__)
    assert experiment.checkpoints.latest() == 3
    again = Experiment(
        config(tmp_path, evaluation={"prompts": 1, "every": 0}),
        reward_functions=[lambda completions: [0.0] * len(completions)],
    )
    again.train()
    assert again.run.state.step == 10


def test_failed_rewards_can_be_marked_instead(tmp_path):
    def reward(completions):
        return [float("nan")] * len(completions)

    experiment = Experiment(config(tmp_path, on_reward_error="mask", steps=2), reward_functions=[reward])
    numbers = experiment.train()
    assert np.isfinite(numbers["reward"])


def test_sigterm_stops_after_the_step_in_hand(tmp_path):
    def reward(completions, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return [0.0] * len(completions)

    experiment = Experiment(config(tmp_path), reward_functions=[reward])
    experiment.train()
    assert experiment.run.state.step == 5 == experiment.checkpoints.latest()


def test_a_resumed_run_is_the_same_run(tmp_path):
    Experiment(config(tmp_path)).train(steps=2)
    with pytest.raises(ValueError, match="another optimizer"):
        Experiment(config(tmp_path, optimizer={"learning_rate": 1e-3})).train()


def test_what_a_run_writes(tmp_path):
    experiment = Experiment(config(tmp_path, steps=4))
    numbers = experiment.train()
    assert {"pass@1", "pass@4", "maj@4", "greedy"} <= numbers.keys()
    series = read_metrics(experiment.directory)
    wanted = {
        "reward", "reward_std", "reward/exact", "reward/length", "no_signal", "kl", "entropy", "clip_low", "clip_high",
        "ratio_p01", "ratio_p99", "gap_max", "gap_mean", "length_mean", "length_max", "truncated", "grad_norm", "loss",
        "tokens_sampled_per_s", "tokens_trained_per_s", "seconds", "seconds/sample", "seconds/reward", "seconds/update",
        "memory_gib", "compilations", "learning_rate", "gap_kl",
    }  # fmt: skip
    assert wanted <= series.keys()
    assert (series["ratio_max"].values == 1.0).all(), "one update per batch is on policy"
    assert series["gap_max"].values.max() < 1e-4
    assert series["compilations"].values[1:].sum() == 0, "no recompilation after the first step"
    twice = [name for name in experiment.compiled.recompiled() if "graph" in name or "evaluate" in name]
    assert not twice, "what was compiled ahead is what the run needed"
    for name in ("config.yaml", "samples.jsonl", "report.html", "report.png"):
        assert (experiment.directory / name).stat().st_size > 0


def test_without_kl_there_is_no_reference(tmp_path):
    experiment = Experiment(config(tmp_path, method={"name": "grpo", "kl": 0.0}, steps=1))
    experiment.train()
    assert list(experiment.run.policies) == ["policy"]


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_checkpoint_goes_on_on_another_mesh(tmp_path, monkeypatch, mesh):
    Experiment(config(tmp_path, steps=3)).train(steps=2)
    from grpo_jax.training import assemble
    from grpo_jax.training import mesh as meshes

    monkeypatch.setattr(assemble, "make_mesh", lambda **_: meshes.make_mesh(**mesh))
    wider = Experiment(config(tmp_path, steps=3))
    wider.train()
    assert wider.run.state.step == 3
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(wider.run.policies)} == {8}
    monkeypatch.setattr(assemble, "make_mesh", _first_device)
    alone = Experiment(config(tmp_path / "alone", steps=3))
    alone.train()
    for a, b in zip(leaves(alone), leaves(wider), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_rows_in_memory_chat_and_own_functions(tmp_path):
    def shortness(prompts, completions, topic, **columns):
        assert completions[0][0]["role"] == "assistant" and prompts[0][0]["role"] == "user" and topic[0] == "tea"
        return [1.0 / (1 + len(c[0]["content"])) for c in completions]

    from grpo_jax.data import load_tokenizer

    tokenizer = load_tokenizer("bytes")
    tokenizer.save(tmp_path / "tokenizer")
    raw = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    raw["chat_template"] = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}a:"
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(raw))
    rows = [{"prompt": [{"role": "user", "content": f"q{i}"}], "topic": "tea"} for i in range(8)]
    settings = config(tmp_path, steps=2, rewards=[], evaluation={"every": 0})
    settings["data"] = {"max_prompt": 16, "tokenizer": str(tmp_path / "tokenizer")}
    experiment = Experiment(settings, prompts=rows, reward_functions=[shortness])
    experiment.train()
    group = experiment.sample(rows[0]["prompt"], count=3)
    assert len(group) == 3 and len(experiment.domain.text(group)) == 3
    experiment.plot()


def test_wrong_input_is_refused_before_anything_is_sampled(tmp_path):
    with pytest.raises(ValueError, match="no reward function"):
        Experiment(config(tmp_path, rewards=[]))
    with pytest.raises(ValueError, match="needs 'anser'.*Did you mean 'answer'"):
        Experiment(config(tmp_path), reward_functions=[lambda completions, anser: []])
    with pytest.raises(ValueError, match="did you mean 'mc_grpo'"):
        Experiment(config(tmp_path, method={"name": "mcgrpo"}))
    with pytest.raises(ValueError, match="kll"):
        Experiment(config(tmp_path, method={"name": "grpo", "kll": 1}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_interrupted_run_goes_on_in_the_same_process_with_the_same_prompts(tmp_path):
    asked = []

    def reward(completions, prompt_id, step):
        if step == 2 and not asked.count("stopped"):
            asked.append("stopped")
            raise KeyboardInterrupt
        return [float(len(c)) for c in completions]

    broken = Experiment(config(tmp_path / "a", steps=4, evaluation={"every": 0}), reward_functions=[reward])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    broken.train()
    asked.append("stopped")
    straight = Experiment(config(tmp_path / "b", steps=4, evaluation={"every": 0}), reward_functions=[reward])
    straight.train()
    assert broken.pool.state() == straight.pool.state()
    for a, b in zip(leaves(straight), leaves(broken), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_older_checkpoint_can_be_looked_at_and_gone_on_from(tmp_path):
    def uneven(completions):
        return [float(sum(map(ord, text)) % 2) for text in completions]

    settings = config(tmp_path, steps=4, checkpoint={"every": 2, "keep": 3})
    experiment = Experiment(settings, reward_functions=[uneven])
    experiment.train()
    last = jax.tree.leaves(experiment.run.params["policy"])
    assert experiment.restore_params(2) == 2
    assert any((a != b).any() for a, b in zip(last, jax.tree.leaves(experiment.model.params), strict=True))
    experiment.evaluate()
    experiment.resume(2)
    assert experiment.run.state.step == 2


def test_a_refused_resume_stays_refused(tmp_path):
    Experiment(config(tmp_path)).train(steps=2)
    other = Experiment(config(tmp_path, rewards=["exact"]))
    for _ in range(2):
        with pytest.raises(ValueError, match="another rewards"):
            other.train()


def test_columns_with_gaps_and_huge_numbers(tmp_path):
    rows = [
        {"prompt": f"{i}", "hint": "h", "answer": "1", "level": None if i < 4 else i, "huge": 10**400} for i in range(8)
    ]
    settings = config(tmp_path, steps=3, rewards=[], evaluation={"every": 0}, method="guide_grpo")
    settings["data"] = {"max_prompt": 24}

    def odd(completions, prompt_id):
        return [float((len(c) + i) % 2) for i, c in enumerate(completions)]

    Experiment(settings, prompts=rows, reward_functions=[odd]).train()
