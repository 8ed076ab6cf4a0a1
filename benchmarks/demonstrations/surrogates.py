"""Each batch is used twice, under every surrogate: what they gain, how far they move, how much they clip.

Completions of four tokens, scored by the share that is right; 16 prompts, tabular, one rate of learning for all.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.demonstrations import Row, bandit
from grpo_jax import advantages, losses
from grpo_jax.losses import surrogates

CLAIM = "surrogates differ in how far a batch that is used again may move the policy; no paper says by how much here"
LENGTH, WORDS, PROMPTS = 4, 3, 16


def demonstrate(seeds: int) -> list[Row]:
    found = {name: course(seeds, surrogate) for name, surrogate in SURROGATES.items()}
    rows = []
    for name in list(SURROGATES)[1:]:
        for metric in ("reward", "KL(new, old) per batch", "clipped"):
            if metric in found[name]:
                rows.append(Row(f"{metric}, {name}", found["ppo"][metric], found[name][metric], "", "ppo"))
    return rows


def ppo(new, old, a, mask):
    ratio = losses.token_ratio(new, old)
    low, high = losses.clip_events(ratio, a, low=0.2, high=0.2)
    return losses.ppo_clip(ratio, a), low | high


def gspo(new, old, a, mask, low=3e-4, high=4e-4):
    ratio = losses.sequence_ratio(new, old, mask)
    below, above = losses.clip_events(ratio, a, low=low, high=high)
    return losses.ppo_clip(ratio, a, low=low, high=high), below | above


SURROGATES = {
    "ppo": ppo,
    "gspo": gspo,
    "gspo, 0.2": lambda *x: gspo(*x, low=0.2, high=0.2),
    "gmpo": lambda new, old, a, mask: (surrogates.gmpo(new, old, a, mask), None),
    "cispo": lambda new, old, a, mask: (surrogates.cispo(new, losses.token_ratio(new, old), a), None),
    "sapo": lambda new, old, a, mask: (surrogates.sapo(losses.token_ratio(new, old), a), None),
}


def course(seeds: int, surrogate) -> dict[str, np.ndarray]:
    right = jax.random.randint(jax.random.key(7), (PROMPTS, LENGTH), 0, WORDS)
    mask = jnp.ones((PROMPTS * 8, LENGTH), bool)

    def loss(params, state, key):
        behavior = jax.nn.log_softmax(jax.lax.stop_gradient(state["behavior"]))
        words = jax.random.categorical(key, behavior[:, None], shape=(PROMPTS, 8, LENGTH)).reshape(-1, LENGTH)
        groups = jnp.repeat(jnp.arange(PROMPTS), 8)
        at = groups[:, None], jnp.arange(LENGTH), words
        reward = (words == right[groups]).mean(1)
        a = advantages.per_decision(advantages.group_z_score(reward, groups), mask)
        each, clipped = surrogate(jax.nn.log_softmax(params)[at], behavior[at], a, mask)
        share = jnp.zeros(()) if clipped is None else clipped.mean()
        return each.mean(), {**state, "clipped": share}

    def observe(params, state):
        new, old = jax.nn.log_softmax(params), jax.nn.log_softmax(state["behavior"])
        chance = jnp.take_along_axis(jnp.exp(new), right[..., None], -1)
        return chance.mean(), losses.kl.reverse(new, old).sum(1).mean(), state["clipped"]

    start = jnp.zeros((PROMPTS, LENGTH, WORDS))
    state = {"behavior": start, "clipped": jnp.zeros(())}
    *_, (reward, moved, clipped) = bandit.learn(
        loss, start, steps=60, rate=24.0, seeds=seeds, state=state, observe=observe, passes=2
    )
    found = {"reward": reward[:, -1], "KL(new, old) per batch": moved[:, 1:].mean(1)}
    return found | ({"clipped": clipped[:, 1:].mean(1)} if surrogate in (ppo, gspo) else {})
