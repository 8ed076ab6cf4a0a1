"""The demonstrations' toolbox and verdicts; the demonstrations themselves are run by hand."""

from __future__ import annotations

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import benchmarks.demonstrations as demonstrations
from benchmarks.demonstrations import Row, bandit
from benchmarks.demonstrations.__main__ import TOOLS, came_out, table
from grpo_jax import advantages, methods

NAMES = sorted({m.name for m in pkgutil.iter_modules(demonstrations.__path__)} - {*TOOLS, "__main__"})
# What `baseline`, `surrogates` and `mismatch` compare; and those without a claim against plain GRPO on a bandit.
BASELINES = {"grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "opo", "gpg", "gspo", "gmpo", "cispo", "sapo"}
WITHOUT = {"dapo", "guide_grpo", "sft"}


def test_each_method_of_its_own_has_one():
    assert set(methods.names()) - BASELINES - WITHOUT <= set(NAMES)
    for name in NAMES:
        module = importlib.import_module(f"benchmarks.demonstrations.{name}")
        assert len(module.CLAIM) > 20 and callable(module.demonstrate)


@pytest.mark.parametrize(
    ("plain", "method", "expected", "verdict"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], ">", "yes"),
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], "<", "NO"),
        ([1.0, 1.1, 0.9], [2.0, 2.1, 1.9], "=", "NO"),
        ([1.0, 2.0, 3.0], [1.1, 2.1, 3.1], ">", "tie"),
        ([1.0, 2.0, 3.0], [1.1, 2.1, 3.1], "=", "yes"),
        ([1.0, 2.0], [5.0, 6.0], "", ""),
        ([1.0], [1.5], ">", "yes"),
    ],
)
def test_verdicts(plain, method, expected, verdict):
    assert came_out(Row("m", plain, method, expected)) == verdict


def test_tables_show_both_and_the_verdict():
    lines = table("mine", [Row("reward", [0.25, 0.75], [1.0, 1.0], ">", "plain")]).splitlines()
    assert lines[0].split() == ["metric", "baseline", "mine", "paper", "came", "out"]
    assert " ".join(lines[1].split()) == "reward 0.5 +- 0.25 (plain) 1 +- 0 > tie"


def test_a_bandit_learns_what_is_rewarded():
    """Three prompts of four actions, of which one is right: seeds differ, all learn; the state counts the batches."""

    def loss(logits, state, key):
        ids, actions = bandit.draw(logits, 8, key)
        adv = advantages.group_z_score((actions == ids).astype(jnp.float32), ids)
        return -jnp.mean(adv * bandit.logps(logits, ids, actions)), state + 1

    share = lambda logits, state: jax.nn.softmax(logits)[jnp.arange(3), jnp.arange(3)].mean()  # noqa: E731
    logits, state, seen = bandit.learn(
        loss, jnp.zeros((3, 4)), steps=60, rate=3.0, seeds=2, state=jnp.zeros(()), observe=share
    )
    assert logits.shape == (2, 3, 4) and seen.shape == (2, 60) and state.tolist() == [60, 60]
    np.testing.assert_allclose(seen[:, 0], 0.25)
    assert (seen[:, -1] > 0.9).all() and seen[0, 5] != seen[1, 5]


def test_passes_see_the_policy_that_drew_the_batch():
    def loss(logits, state, key):
        return jnp.sum(logits), {**state, "gap": jnp.sum(state["behavior"] - logits)}

    start = {"behavior": jnp.zeros(2), "gap": jnp.zeros(())}
    logits, state, _ = bandit.learn(loss, jnp.zeros(2), steps=2, rate=0.5, seeds=1, state=start, passes=3)
    np.testing.assert_allclose(logits[0], -3.0)  # six steps of 0.5
    np.testing.assert_allclose(state["gap"], 2.0)  # two entries, two steps of 0.5 from the start of the second batch
    np.testing.assert_allclose(state["behavior"][0], -1.5)
