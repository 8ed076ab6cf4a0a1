"""A policy that knows its sums but writes 3 of 10 answers so that they can be read, at any length.

A completion is a length up to 12, a form (readable or not) and an answer, right or wrong; long thinking helps up to 6
tokens, and what runs to 12 is cut off and cannot be read. Three rewards, of which two see no label.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.demonstrations import Row, bandit
from grpo_jax import advantages, losses
from grpo_jax.advantages.lengths import format_length

CLAIM = "without labels, form and length raise accuracy at least as far as labels do; form alone does less"
PROMPTS, LONGEST, STEPS, KNOWN = 16, 12, 200, 0.0


def demonstrate(seeds: int) -> list[Row]:
    labels, form, both = (accuracy(seeds, reward) for reward in ("labels", "form", "both"))
    ignorant = accuracy(seeds, "both", known=-9.0)
    early, end = STEPS // 8, -1
    return [
        Row("accuracy at first", labels[:, 0], both[:, 0], "=", "labels"),
        Row(f"accuracy after {early} steps", labels[:, early], both[:, early], "=", "labels"),
        Row("accuracy at the end", labels[:, end], both[:, end], ">", "labels"),
        Row("accuracy at the end", form[:, end], both[:, end], ">", "form alone"),
        Row("of a policy that knows nothing", ignorant[:, 0], ignorant[:, end], "", "at first"),
    ]


def chances(params):
    """Of each length, of a readable form, and of the right answer at each length."""
    thought = 0.7 * jnp.minimum(jnp.arange(LONGEST + 1), 6) - 2.5
    return jax.nn.log_softmax(params["length"]), params["form"], params["answer"][:, None] + thought


def accuracy(seeds: int, kind: str, known: float = KNOWN):
    def loss(params, state, key):
        lengths_key, form_key, answer_key = jax.random.split(key, 3)
        of_length, form, answer = chances(params)
        groups, lengths = bandit.draw(of_length, 8, lengths_key)
        readable = jax.random.bernoulli(form_key, jax.nn.sigmoid(form[groups]))
        right = jax.random.bernoulli(answer_key, jax.nn.sigmoid(answer[groups, lengths]))
        formed = readable & (lengths < LONGEST)
        none = jnp.zeros(len(groups))
        reward = {
            "labels": lambda: 1.0 * (formed & right),
            "form": lambda: 0.5 * formed,
            "both": lambda: format_length(lengths, formed, none, maximum=LONGEST),
        }[kind]()
        logps = of_length[groups, lengths] + bernoulli(form[groups], readable)
        logps = (logps + bernoulli(answer[groups, lengths], right))[:, None]
        advantage = advantages.group_z_score(reward, groups)[:, None]
        return losses.ppo_clip(losses.token_ratio(logps, jax.lax.stop_gradient(logps)), advantage).mean(), state

    def share_right(params, state):
        of_length, form, answer = chances(params)
        right = jnp.sum(jnp.exp(of_length) * jax.nn.sigmoid(answer) * (jnp.arange(LONGEST + 1) < LONGEST), axis=1)
        return (jax.nn.sigmoid(form) * right).mean()

    start = {
        "length": jnp.zeros((PROMPTS, LONGEST + 1)),
        "form": jnp.full(PROMPTS, jnp.log(3 / 7)),
        "answer": jnp.full(PROMPTS, known),
    }
    return bandit.learn(loss, start, steps=STEPS, rate=0.1 * PROMPTS, seeds=seeds, observe=share_right)[2]


def bernoulli(logit, outcome):
    return jax.nn.log_sigmoid(jnp.where(outcome, logit, -logit))
