"""A policy that works on a task of unknown size, token by token, and must not stop before it is done.

Tokens 0 to 3 are work, and 4 stops; a work token that equals the last one repeats it and gets nowhere. A task is done
after 4 to 20 tokens that get somewhere; stopping then is right, stopping before is a guess that is right one time in
ten. Trained with a budget of 12 tokens, tried with 12 and with 24. The policy sees the last token and whether the task
is done; it starts with a habit of repeating itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.demonstrations import Row, bandit
from grpo_jax import advantages, losses
from grpo_jax.losses.truncation import conditionally_masked, repeats

CLAIM = "sparing a tenth of the plausible truncated completions is best at twice the budget, without loss of diversity"
PROMPTS, GROUP, BUDGET, STEPS, STOP, WINDOW = 16, 8, 12, 150, 4, 3
NEEDED = jnp.linspace(4, 20, PROMPTS).round()


def demonstrate(seeds: int) -> list[Row]:
    never, some, always = (course(seeds, probability) for probability in (0.0, 0.1, 1.0))
    rows = []
    for metric, expected in (("right, 24 tokens", ">"), ("right, 12 tokens", ""), ("length", ">"), ("entropy", "")):
        rows.append(Row(metric, never[metric], some[metric], expected, "none spared"))
    for metric, expected in (("right, 24 tokens", ">"), ("length", "<"), ("entropy", ">")):
        rows.append(Row(metric, always[metric], some[metric], expected, "all spared"))
    return rows


def course(seeds: int, probability: float) -> dict:
    def loss(params, state, key):
        sample_key, guess_key, spare_key = jax.random.split(key, 3)
        tokens, logps, lengths, finished, done = episodes(params, BUDGET, sample_key)
        right = judged(finished, done, guess_key)
        groups = jnp.repeat(jnp.arange(PROMPTS), GROUP)
        score = advantages.group_z_score(1.0 * right, groups)
        spared = conditionally_masked(
            ~finished,
            ~finished | right,  # what was cut off cannot be judged
            repeats(tokens, lengths, window=WINDOW),
            jax.random.uniform(spare_key, right.shape),
            probability=probability,
        )
        mask = jnp.arange(BUDGET) < lengths[:, None]
        spread = advantages.per_decision(jnp.where(spared, 0, score), mask)
        each = losses.ppo_clip(losses.token_ratio(logps, jax.lax.stop_gradient(logps)), spread, high=0.28)
        return losses.weighted_sum(each, losses.token_mean(jnp.ones(len(groups)), mask)), state

    habit = jnp.zeros((2, 5, 5)).at[:, jnp.arange(4), jnp.arange(4)].add(1.5).at[:, :, STOP].add(-0.5)
    params, _, _ = bandit.learn(loss, habit, steps=STEPS, rate=2.0, seeds=seeds)
    return jax.vmap(tried)(params, jax.random.split(jax.random.key(1), seeds))


def tried(params, key) -> dict:
    """The trained policy on 16 times as many completions."""
    short, long = (
        jax.vmap(lambda k, b=budget: measured(params, b, k))(jax.random.split(key, 16)) for budget in (12, 24)
    )
    return {
        "right, 12 tokens": short["right"].mean(),
        "right, 24 tokens": long["right"].mean(),
        "length": long["length"].mean(),
        "entropy": long["entropy"].mean(),
    }


def measured(params, budget: int, key) -> dict:
    sample_key, guess_key = jax.random.split(key)
    _, logps, lengths, finished, done = episodes(params, budget, sample_key)
    exists = jnp.arange(budget) < lengths[:, None]
    return {
        "right": judged(finished, done, guess_key).mean(),
        "length": lengths.mean(),
        "entropy": -jnp.where(exists, logps, 0).sum() / exists.sum(),
    }


def judged(finished, done, key):
    return finished & (done | jax.random.bernoulli(key, 0.1, done.shape))


def episodes(params, budget: int, key):
    """Tokens and log-probs [N, budget], lengths, whether they stopped, and whether the task was done then."""
    needed = jnp.repeat(NEEDED, GROUP)

    def token(carry, key):
        last, progress, ended = carry
        logits = jax.nn.log_softmax(params[(progress >= needed).astype(int), last])
        chosen = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        logp = jnp.take_along_axis(logits, chosen[:, None], axis=1)[:, 0]
        works = ~ended & (chosen != STOP) & (chosen != last)
        after = jnp.where(chosen == STOP, last, chosen), progress + works, ended | (chosen == STOP)
        return after, (chosen, logp, ~ended)

    n = PROMPTS * GROUP
    start = jnp.full(n, STOP), jnp.zeros(n, int), jnp.zeros(n, bool)  # no token came before
    (_, progress, ended), (tokens, logps, exists) = jax.lax.scan(token, start, jax.random.split(key, budget))
    return tokens.T, logps.T, exists.sum(axis=0), ended, progress >= needed
