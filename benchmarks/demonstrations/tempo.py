"""One token of a sequence decides, the others are noise: does an update go to the right place, and how fast?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.demonstrations import Row
from benchmarks.demonstrations.bandit import learn
from grpo_jax import advantages, losses
from grpo_jax.advantages.tree import prefix_gains, prefix_tree

CLAIM = "an early deciding token is found faster than by GRPO; late ones no faster, when prefixes are already unique"

VOCABULARY, LENGTH, GROUPS, SIZE = 6, 6, 2, 8
WHERE = {"first token decides": 0, "last token decides": LENGTH - 1}
IDS = jnp.repeat(jnp.arange(GROUPS), SIZE)
EVERY = jnp.ones((GROUPS * SIZE, LENGTH), bool)


def batch(logits, place, key):
    tokens = jax.random.categorical(key, jax.lax.stop_gradient(logits), shape=(GROUPS * SIZE, LENGTH))
    return tokens, (tokens[:, place] == 0).astype(jnp.float32)


def estimate(name, rewards, tokens):
    if name == "grpo":
        return advantages.per_decision(advantages.group_z_score(rewards, IDS), EVERY)
    return prefix_tree(rewards, IDS, tokens, jnp.full(GROUPS * SIZE, LENGTH))


def objective(logits, name, place, key):
    tokens, rewards = batch(logits, place, key)
    logps = jax.nn.log_softmax(logits)[jnp.arange(LENGTH), tokens]
    loss = losses.reinforce(logps, estimate(name, rewards, tokens))
    return losses.weighted_sum(loss, losses.token_mean(jnp.ones(GROUPS * SIZE), EVERY))


def success(logits, place):
    return jax.nn.softmax(logits[place])[0]


def cosines(name, place, seeds):
    """Of single updates with the exact gradient, at the uniform policy; the mean over 16 batches of each seed."""
    start = jnp.zeros((LENGTH, VOCABULARY))
    exact = jax.grad(success)(start, place).ravel()

    def one(key):
        step = -jax.grad(objective)(start, name, place, key).ravel()
        return step @ exact / jnp.maximum(jnp.linalg.norm(step) * jnp.linalg.norm(exact), 1e-9)

    keys = jax.random.split(jax.random.key(1), (seeds, 16))
    return jax.jit(jax.vmap(jax.vmap(one)))(keys).mean(axis=1)


def demonstrate(seeds: int) -> list[Row]:
    rows = []
    for label, place in WHERE.items():
        expected = "=" if place == LENGTH - 1 else ""
        both = [cosines(name, place, seeds) for name in ("grpo", "tempo")]
        rows.append(Row(f"{label}: cosine with the exact gradient", *both, expected or ">"))
        steps = []
        for name in ("grpo", "tempo"):
            loss = lambda logits, state, key, name=name, place=place: (objective(logits, name, place, key), state)  # noqa: E731
            start = jnp.zeros((LENGTH, VOCABULARY))
            observe = lambda logits, state, place=place: success(logits, place)  # noqa: E731
            rate = learn(loss, start, steps=50, rate=3.0, seeds=seeds, observe=observe)[2]
            steps.append(np.where((rate > 0.9).any(1), (rate > 0.9).argmax(1), 50))
        rows.append(Row(f"{label}: steps to 90% success (50 = never)", *steps, expected or "<"))
    tokens, rewards = batch(jnp.zeros((LENGTH, VOCABULARY)), 0, jax.random.key(2))
    gains = prefix_gains(rewards, IDS, tokens, jnp.full(GROUPS * SIZE, LENGTH))
    rows.append(Row("share of tokens with a changed value, at the start", [0.0], [float((gains != 0).mean())]))
    return rows
