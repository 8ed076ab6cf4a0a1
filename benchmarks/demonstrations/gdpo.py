"""Two or three binary rewards at once: what advantages can tell apart, and which of the rewards are learned."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.demonstrations import Row
from benchmarks.demonstrations.bandit import learn
from grpo_jax import losses
from grpo_jax.advantages.channels import decoupled, decoupled_over_rows
from grpo_jax.advantages.group import group_z_score

CLAIM = "more reward patterns get advantages of their own; both objectives are learned, not the easy one alone"

PROMPTS, GROUP, STEPS, RATE = 16, 8, 300, 0.1
START = jnp.array([0.0, -4.0])  # logits of meeting the easy and the hard objective: 0.5 and 0.018


def distinct(channels, group_size):
    """How many advantage vectors all patterns of binary rewards give: of their sum, and channel by channel."""
    patterns = np.array(list(itertools.product([0.0, 1.0], repeat=channels * group_size)))
    patterns = patterns.reshape(-1, group_size, channels)
    groups = np.zeros(group_size, int)
    plain = jax.jit(jax.vmap(lambda r: group_z_score(r.sum(axis=1), groups)))(patterns)
    apart = jax.jit(jax.vmap(lambda r: decoupled(r, groups, (1.0,) * channels)))(patterns)
    return [len(np.unique(np.round(a, 3) + 0.0, axis=0)) for a in (plain, apart)]


def loss(estimator):
    def of(logits, state, key):
        met = jax.random.bernoulli(key, jax.nn.sigmoid(jax.lax.stop_gradient(logits)), (PROMPTS * GROUP, 2))
        rewards, groups = met.astype(jnp.float32), jnp.repeat(jnp.arange(PROMPTS), GROUP)
        scores = jnp.sum(jax.nn.log_sigmoid(jnp.where(met, logits, -logits)), axis=1)
        return losses.reinforce(scores, estimator(rewards, groups)).mean(), state

    return of


def summed(rewards, groups):
    return group_z_score(rewards.sum(axis=1), groups)


def apart(rewards, groups):
    return decoupled_over_rows(rewards, groups, (1.0, 1.0))


def demonstrate(seeds: int) -> list[Row]:
    rows = []
    for channels, size in ((2, 3), (2, 4), (3, 3), (3, 4)):
        plain, ours = distinct(channels, size)
        rows.append(Row(f"distinct advantages, {channels} rewards, {size} completions", [plain], [ours], ">"))
    settings = {"steps": STEPS, "rate": RATE, "seeds": seeds, "observe": lambda logits, state: jax.nn.sigmoid(logits)}
    plain, ours = (learn(loss(f), START, **settings)[2] for f in (summed, apart))
    for k, name in enumerate(("easy", "hard")):
        half, end = (f"{name} objective after {n} updates" for n in (STEPS // 2, STEPS))
        expected = ">" if name == "hard" else ""
        rows.append(Row(half, plain[:, STEPS // 2, k], ours[:, STEPS // 2, k], expected))
        rows.append(Row(end, plain[:, -1, k], ours[:, -1, k], expected))
    return rows
