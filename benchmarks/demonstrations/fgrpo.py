"""Four actions, right or wrong and consistent or not, from a policy that is right for inconsistent reasons."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.demonstrations import Row
from benchmarks.demonstrations.bandit import draw, learn, logps
from grpo_jax import losses
from grpo_jax.advantages.constraints import constrained, dual_init, dual_update

CLAIM = "a constraint reaches its target without harm to accuracy; a fixed weight of 0.1 on the same signal does not"

RIGHT, CONSISTENT = jnp.array([1.0, 1, 0, 0]), jnp.array([1.0, 0, 1, 0])
START = jnp.log(jnp.array([[0.02, 0.8, 0.03, 0.15]]))
PROMPTS, SIZE, STEPS, RATE = 16, 8, 400, 0.2
FIXED = {"grpo": 0.0, "weight 0.1": 0.1, "weight 0.3": 0.3, "weight 1": 1.0}  # weights in place of the multiplier


def loss(logits, duals, weight, key):
    """weight: a fixed one for the consistency, below 0 for the multiplier."""
    every = jnp.tile(logits, (PROMPTS, 1))  # one policy, many prompts
    groups, actions = draw(every, SIZE, key)
    signals = CONSISTENT[actions][:, None]
    values = constrained(RIGHT[actions], signals, groups, jnp.where(weight < 0, duals, weight))
    duals = dual_update(duals, signals, groups, targets=[0.9], eta=0.05)
    return losses.reinforce(logps(every, groups, actions), values).mean(), duals


def demonstrate(seeds: int) -> list[Row]:
    weights = jnp.array([*FIXED.values(), -1.0])

    def together(logits, duals, key):  # independent policies with the same draws
        each, duals = jax.vmap(loss, in_axes=(0, 0, 0, None))(logits, duals, weights, key)
        return each.sum(), duals

    start, duals = jnp.stack([START] * len(weights)), jnp.stack([dual_init(1)] * len(weights))
    watch = lambda logits, duals: duals[-1, 0]  # noqa: E731
    settings = {"steps": STEPS, "rate": RATE, "seeds": seeds, "state": duals, "observe": watch}
    logits, duals, seen = learn(together, start, **settings)
    last = jax.nn.softmax(logits)[:, :, 0]
    accuracy, consistency = last @ RIGHT, last @ CONSISTENT
    rows = []
    for k, label in enumerate(FIXED):
        claimed = label in ("grpo", "weight 0.1")
        rows.append(
            Row("consistency (target 0.9)", consistency[:, k], consistency[:, -1], ">" if claimed else "", label)
        )
        rows.append(Row("accuracy", accuracy[:, k], accuracy[:, -1], ">" if label == "grpo" else "", label))
    rows.append(Row("multiplier at the end", seen.max(axis=1), duals[:, -1, 0], "<", "its highest"))
    return rows
