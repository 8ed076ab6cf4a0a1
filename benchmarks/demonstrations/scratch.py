"""Thinking before the answer: lengths of 0 to 12, and answers that need about 6 of them until they have been learned.

A completion is a length and an answer; the right one has the logit skill + 1.2 min(length, 6) - 7 - difficulty, so that
with a skill that grows fewer tokens suffice. Skill and mean length are learned for each of 16 prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks.demonstrations import bandit
from grpo_jax import losses

PROMPTS, LONGEST, GROUP = 16, 12, 8
LENGTHS = jnp.arange(LONGEST + 1)
DIFFICULTY = jnp.linspace(-1.5, 1.5, PROMPTS)


def learn(advantage: Callable[[Array, Array, Array, Array], Float[Array, "N"]], *, steps: int, seeds: int) -> dict:
    """Accuracy and mean length before every step, [seeds, steps].

    advantage(correct, lengths, group_ids, step) -> [N].
    """

    def loss(params, state, key):
        length_key, answer_key = jax.random.split(key)
        of_length = spread(params)
        groups, lengths = bandit.draw(of_length, GROUP, length_key)
        answer = logits(params)[groups, lengths]
        right = jax.random.bernoulli(answer_key, jax.nn.sigmoid(answer))
        logps = jnp.stack([of_length[groups, lengths], jax.nn.log_sigmoid(jnp.where(right, answer, -answer))], axis=1)
        each = advantage(right, lengths, groups, state["step"])[:, None]
        ratio = losses.token_ratio(logps, jax.lax.stop_gradient(logps))
        return losses.ppo_clip(ratio, jnp.broadcast_to(each, ratio.shape)).mean(), {"step": state["step"] + 1}

    start = {"length": jnp.full(PROMPTS, 8.0), "skill": jnp.zeros(PROMPTS)}
    state = {"step": jnp.int32(0)}
    return bandit.learn(loss, start, steps=steps, rate=0.2 * PROMPTS, seeds=seeds, state=state, observe=observe)[2]


def spread(params: Any) -> Float[Array, "B L"]:
    """Log-probs of the lengths: a bell of width 1.5 around the prompt's own."""
    return jax.nn.log_softmax(-(((LENGTHS - params["length"][:, None]) / 1.5) ** 2) / 2)


def logits(params: Any) -> Float[Array, "B L"]:
    """Of the right answer, by prompt and length."""
    return (params["skill"] - DIFFICULTY)[:, None] + 1.2 * jnp.minimum(LENGTHS, 6) - 7


def observe(params: Any, state: Any) -> dict:
    chance = jnp.exp(spread(params))
    right = jnp.sum(chance * jax.nn.sigmoid(logits(params)), axis=1)
    return {"accuracy": right.mean(), "length": jnp.sum(chance * LENGTHS, axis=1).mean()}
