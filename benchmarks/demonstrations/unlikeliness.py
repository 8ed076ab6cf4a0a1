"""A table of answers to each prompt, a fifth of them right: do rare right ones gain when likely ones are discounted?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.demonstrations import Row
from benchmarks.demonstrations.bandit import draw, learn, logps
from grpo_jax import losses, segments
from grpo_jax.advantages.group import group_z_score
from grpo_jax.advantages.unlikely import discount_likely

CLAIM = "rare right answers gain probability more often, and more different right answers survive"
PROMPTS, ANSWERS, GROUP_SIZE, STEPS, PENALTY = 32, 64, 32, 40, 0.25
RATE = 0.5  # plain GRPO then ends near 0.8; at rate 1 it ends at 0.98, and the first row comes out the other way
TABLE = np.random.default_rng(0)
RIGHT = jnp.asarray(TABLE.permuted(np.repeat([[True] * 13 + [False] * 51], PROMPTS, axis=0), axis=1))
START = jnp.asarray(TABLE.normal(0, 1, (PROMPTS, ANSWERS)), jnp.float32)


def loss_of(penalty):
    def loss(logits, state, key):
        groups, answers = draw(logits, GROUP_SIZE, key)
        chosen = logps(logits, groups, answers)
        right = RIGHT[groups, answers]
        rewards = right.astype(jnp.float32)
        mixed = segments.has(right, groups) & segments.has(~right, groups)
        kept = jnp.where(mixed, groups, -1)
        earned = discount_likely(rewards, chosen, kept, penalty=penalty)
        each = losses.reinforce(chosen, group_z_score(earned, kept))
        return each.sum() / GROUP_SIZE, seen(state, logits, groups, answers, right)  # prompts share no parameters

    return loss


def seen(state, logits, groups, answers, right):
    """Adds up, for the last batch, how many of its least and most likely right answers have become likelier."""
    before, now = (logps(table, *state["rows"]) for table in (state["logits"], logits))
    rank = segments.rank(before, jnp.where(state["right"], 0, -1))
    count = state["right"].sum()
    quarters = jnp.stack([rank < count / 4, rank >= 3 * count / 4]) & state["right"]
    rose = (quarters & (now > before)).sum(axis=1)
    return {
        "logits": jax.lax.stop_gradient(logits),
        "rows": (groups, answers),
        "right": right,
        "rose": state["rose"] + rose,
        "of": state["of"] + quarters.sum(axis=1),
    }


def demonstrate(seeds: int) -> list[Row]:
    def run(penalty):
        n = PROMPTS * GROUP_SIZE
        none = (jnp.zeros(n, jnp.int32), jnp.zeros(n, jnp.int32))
        state = {"logits": START, "rows": none, "right": jnp.zeros(n, bool), "rose": jnp.zeros(2, int)}
        state["of"] = jnp.zeros(2, int)
        logits, state, _ = learn(loss_of(penalty), START, steps=STEPS, rate=RATE, seeds=seeds, state=state)
        share = jax.nn.softmax(logits)
        mass = jnp.where(RIGHT, share, 0).sum(-1)
        within = jnp.where(RIGHT, share, 0) / mass[..., None]
        entropy = -jnp.where(within > 0, within * jnp.log(jnp.where(within > 0, within, 1)), 0).sum(-1).mean(-1)
        return (*(state["rose"] / jnp.maximum(state["of"], 1)).T, entropy, mass.mean(-1))

    plain, own, strong = run(0.0), run(PENALTY), run(2 * PENALTY)
    metrics = [("least likely quarter: rose", ">"), ("likeliest quarter: rose", ""), ("entropy of right ones", ">")]
    metrics.append(("pass@1", ""))
    return [
        Row(name + suffix, baseline, values, expected)
        for suffix, result in (("", own), (", penalty 0.5", strong))
        for (name, expected), baseline, values in zip(metrics, plain, result)
    ]
