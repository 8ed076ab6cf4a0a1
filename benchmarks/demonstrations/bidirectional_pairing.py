"""Prompts that share a skill, learnt from two of them: which two teach the rest?"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.demonstrations import Row
from grpo_jax import losses
from grpo_jax.advantages.pairing import pair_advantages, success_bands

CLAIM = "a hard and a brittle prompt teach more, and with less spread, than two that are solved half of the time"
PROMPTS, ANSWERS, FEATURES, GROUP_SIZE, COPIES, STEPS, RATE = 256, 8, 32, 8, 4, 40, 0.3
GROUPS = jnp.repeat(jnp.arange(2 * COPIES), GROUP_SIZE)


def problems(key):
    """Answers are vectors; the right one, number 0, has something of a direction that is the same for all prompts."""
    answers, skill, policy = jax.random.split(key, 3)
    table = jax.random.normal(answers, (PROMPTS, ANSWERS, FEATURES)) / jnp.sqrt(FEATURES)
    direction = jax.random.normal(skill, (FEATURES,)) / jnp.sqrt(FEATURES)
    start = 1.5 * direction + jax.random.normal(policy, (FEATURES,)) * 1.5
    return table.at[:, 0].add(direction), start


def rates(policy, table):
    return jax.nn.softmax(table @ policy)[:, 0]


def choices(table, start):
    """Two prompts in the middle, two hard ones, two easy ones, and a pair of hard and easy."""
    p = rates(start, table)
    hard, easy = success_bands(jnp.round(p * GROUP_SIZE) / GROUP_SIZE, group_size=GROUP_SIZE)
    two = lambda inside, rate: jnp.argsort(jnp.where(inside, 0, 1) + jnp.abs(p - rate))[:2]  # noqa: E731
    middle, hard, easy = two(p > 0, 0.5), two(hard, 1.5 / GROUP_SIZE), two(easy, 1 - 1.5 / GROUP_SIZE)
    return {"middle": middle, "hard": hard, "easy": easy, "pair": jnp.stack([hard[0], easy[0]])}


def train(start, table, chosen, key):
    own = table[chosen][GROUPS // COPIES]  # [rows, answers, features]

    def loss(policy, key):
        logits = jnp.einsum("naf,f->na", own, policy)
        answers = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits), answers[:, None], axis=1)[:, 0]
        return losses.reinforce(logps, pair_advantages((answers == 0) * 1.0, GROUPS)).mean()

    step = lambda policy, key: (policy - RATE * jax.grad(loss)(policy, key), None)  # noqa: E731
    return jax.lax.scan(step, start, jax.random.split(key, STEPS))[0]


def demonstrate(seeds: int) -> list[Row]:
    def one(key):
        world, sampling = jax.random.split(key)
        table, start = problems(world)
        sets = choices(table, start)
        unseen = jnp.ones(PROMPTS, bool).at[jnp.concatenate(list(sets.values()))].set(False)

        def judged(policy):
            p = rates(policy, table)
            return jnp.mean(p, where=unseen), jnp.mean(1 - (1 - p) ** 8, where=unseen)

        return {"start": judged(start)} | {
            name: judged(train(start, table, chosen, sampling)) for name, chosen in sets.items()
        }

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4 * seeds))  # the worlds differ much
    rows = [Row("pass@1 before", found["start"][0], found["start"][0])]
    for k, metric in enumerate(("pass@1", "pass@8")):
        gains = {name: found[name][k] - found["start"][k] for name in ("middle", "hard", "easy", "pair")}
        spread = {name: jnp.abs(gain - gain.mean()) for name, gain in gains.items()}
        rows += [Row(f"gain in {metric}, other prompts", gains[b], gains["pair"], ">", b) for b in gains if b != "pair"]
        rows.append(Row(f"spread of the gain in {metric}", spread["middle"], spread["pair"], "<", "middle"))
    return rows
