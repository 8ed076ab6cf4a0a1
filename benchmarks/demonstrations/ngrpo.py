"""Prompts that are solved once in a hundred completions: how long until they are learned from groups of eight."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.demonstrations import Row
from benchmarks.demonstrations.bandit import draw, learn, logps
from grpo_jax import losses
from grpo_jax.advantages.group import group_z_score
from grpo_jax.advantages.virtual import with_virtual_best

CLAIM = "failures teach: the plateau is left sooner; without the asymmetric bounds training is less stable"

PROMPTS, ACTIONS, GROUP, STEPS, PASSES = 32, 100, 8, 150, 4  # action 0 is right
RATES = (1.0, 10.0)


def loss(estimator, low, high):
    def of(logits, state, key):
        behavior = jax.lax.stop_gradient(state["behavior"])
        groups, actions = draw(behavior, GROUP, key)
        values = estimator((actions == 0).astype(jnp.float32), groups)
        ratio = jnp.exp(logps(logits, groups, actions) - logps(behavior, groups, actions))
        lost = losses.ppo_clip(ratio, values, low=low, high=high)
        taught = jnp.any((values != 0).reshape(PROMPTS, GROUP), axis=1).mean()
        return jnp.sum(lost) / GROUP, {**state, "taught": taught}

    return of


def measured(estimator, low, high, seeds):
    """Metrics [rates, seeds]."""

    def watch(logits, state):
        policy = jax.nn.softmax(logits)
        entropy = -jnp.sum(policy * jnp.log(policy + 1e-30), axis=1).mean()
        return policy[:, 0].mean(), entropy, state["taught"]

    def at(rate):
        start = jnp.zeros((PROMPTS, ACTIONS))
        state = {"behavior": start, "taught": jnp.float32(0)}
        settings = {"steps": STEPS, "seeds": seeds, "passes": PASSES, "state": state, "observe": watch}
        return learn(loss(estimator, low, high), start, rate=rate, **settings)[2]

    success, entropy, taught = jax.vmap(at)(jnp.array(RATES))
    return {
        f"updates until success is 0.5 (at most {STEPS})": jnp.sum(success <= 0.5, axis=2),
        "prompts that teach, first 20 updates": taught[:, :, 1:21].mean(axis=2),
        "entropy at update 20": entropy[:, :, 20],
        "largest fall of the success rate": jnp.max(jax.lax.cummax(success, axis=2) - success, axis=2),
        "success in the end": success[:, :, -1],
    }


def demonstrate(seeds: int) -> list[Row]:
    plain = measured(group_z_score, 0.2, 0.2, seeds)
    ours = measured(with_virtual_best, 0.16, 0.24, seeds)
    symmetric = measured(with_virtual_best, 0.2, 0.2, seeds)
    sooner, teaching, _, fall, end = plain
    rows = []
    for k, rate in enumerate(RATES):
        for name in plain:
            expected = {sooner: "<", teaching: ">", end: ">"}.get(name, "")
            rows.append(Row(f"{name}, rate {rate:g}", plain[name][k], ours[name][k], expected))
        for name, expected in ((sooner, ""), (fall, "<")):
            rows.append(Row(f"{name}, rate {rate:g}", symmetric[name][k], ours[name][k], expected, "bounds 0.2"))
    return rows
