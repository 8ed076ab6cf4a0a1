"""Six tokens of reasoning and an answer; a judge of reasoning that can be hacked.

The answer comes out right mostly if the reasoning holds the prompt's key token. The judge likes the key too, but each
"hack" token raises its score as much and helps nothing; its score is noisy. All completions are well formed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.demonstrations import Row, bandit
from grpo_jax import advantages, losses, segments
from grpo_jax.advantages.gates import posterior_reward

CLAIM = "behind the gate the judge is hacked less than without it, at an accuracy of at least that of the outcome alone"
PROMPTS, TOKENS, WORDS, STEPS = 16, 6, 8, 400
HACK = 0  # the key of a prompt is one of the words 1 to 7


def demonstrate(seeds: int) -> list[Row]:
    plain, free, gated = (outcome(seeds, gate) for gate in ("shut", "open", "outcome"))
    last = lambda seen, name: seen[name][:, -20:].mean(axis=1)  # noqa: E731
    return [
        Row("accuracy", last(plain, "accuracy"), last(gated, "accuracy"), ">", "outcome only"),
        Row("accuracy", last(free, "accuracy"), last(gated, "accuracy"), ">", "ungated"),
        Row("hack tokens", last(free, "hacks"), last(gated, "hacks"), "<", "ungated"),
        Row("hack tokens", last(plain, "hacks"), last(gated, "hacks"), "", "outcome only"),
        Row("groups with signal", last(plain, "signal"), last(gated, "signal"), ">", "outcome only"),
    ]


def outcome(seeds: int, gate: str):
    keys = jnp.arange(PROMPTS) % (WORDS - 1) + 1

    def batch(params, key):
        word_key, answer_key, judge_key = jax.random.split(key, 3)
        groups = jnp.repeat(jnp.arange(PROMPTS), 8)
        of_words = jax.nn.log_softmax(params["words"])[groups]
        words = jax.random.categorical(word_key, jax.lax.stop_gradient(of_words))
        found = (words == keys[groups, None]).any(axis=1)
        answer = params["answer"][groups] + jnp.where(found, 2.0, -3.0)
        right = jax.random.bernoulli(answer_key, jax.nn.sigmoid(answer))
        noise = 0.1 * jax.random.normal(judge_key, right.shape)
        score = jnp.clip(0.3 * found + 0.3 * (words == HACK).sum(axis=1) + noise, 0, 1)
        opened = {"shut": jnp.zeros(len(groups)), "open": jnp.ones(len(groups)), "outcome": right}[gate]
        reward = posterior_reward(jnp.ones(len(groups)), right, score, opened)
        chosen = jnp.take_along_axis(of_words, words[..., None], axis=2)[..., 0]
        logps = jnp.concatenate([chosen, jax.nn.log_sigmoid(jnp.where(right, answer, -answer))[:, None]], axis=1)
        return groups, words, right, reward, logps

    def loss(params, state, key):
        groups, words, right, reward, logps = batch(params, key)
        advantage = advantages.group_z_score(reward, groups)
        mask = jnp.ones(logps.shape, bool)
        ratio = losses.token_ratio(logps, jax.lax.stop_gradient(logps))
        each = losses.ppo_clip(ratio, advantages.per_decision(advantage, mask), high=0.28)
        signal = segments.has(advantage != 0, groups).mean()
        seen = {"accuracy": right.mean(), "hacks": (words == HACK).mean(), "signal": signal}
        return losses.weighted_sum(each, losses.token_mean(jnp.ones(len(groups)), mask)), seen

    start = {"words": jnp.zeros((PROMPTS, TOKENS, WORDS)), "answer": jnp.zeros(PROMPTS)}
    nothing = {name: jnp.zeros(()) for name in ("accuracy", "hacks", "signal")}
    _, _, seen = bandit.learn(
        loss, start, steps=STEPS, rate=0.5 * PROMPTS, seeds=seeds, state=nothing, observe=lambda params, state: state
    )
    return seen
