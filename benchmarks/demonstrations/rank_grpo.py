"""Lists of six items from a table of logits: is the end of a list learnt faster when every rank has its own reward?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.demonstrations import Row
from benchmarks.demonstrations.bandit import learn
from grpo_jax import losses
from grpo_jax.advantages.group import group_z_score
from grpo_jax.advantages.ranks import rank_rewards, rank_z_scores

CLAIM = "a reward per rank teaches the end of a list faster than one reward for the whole list"
PROMPTS, RANKS, ITEMS, RELEVANT, GROUP_SIZE, STEPS, RATE = 12, 6, 30, 8, 8, 120, 1.0
GAIN = 1 / np.log2(np.arange(RANKS) + 2)
GROUPS = jnp.repeat(jnp.arange(PROMPTS), GROUP_SIZE)


def by_list(hits):
    """Plain GRPO: the list's discounted gain, the same advantage at every rank."""
    return jnp.broadcast_to(group_z_score(hits @ GAIN, GROUPS)[:, None], hits.shape)


def by_rank(decay):
    return lambda hits: rank_z_scores(rank_rewards(hits, decay=decay), GROUPS)


def hits_of(lists):
    """Items below RELEVANT are relevant, once."""
    again = (lists[:, :, None] == lists[:, None]) & (np.arange(RANKS)[:, None] > np.arange(RANKS))
    return ((lists < RELEVANT) & ~again.any(axis=2)).astype(jnp.float32)


def loss_of(advantage):
    def loss(logits, state, key):
        now = jnp.repeat(jax.lax.stop_gradient(logits), GROUP_SIZE, axis=0)
        lists = jax.random.categorical(key, now)
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits)[GROUPS], lists[:, :, None], axis=2)[:, :, 0]
        hits = hits_of(lists)
        each = losses.reinforce(logps, advantage(hits))
        return each.sum() / GROUP_SIZE, {"gain": (hits @ GAIN).mean() / GAIN.sum()}  # prompts share no parameters

    return loss


def demonstrate(seeds: int) -> list[Row]:
    def run(advantage):
        """Chance of a relevant item at the last rank, and normalised discounted gain, before every step."""

        def observe(logits, state):
            return jax.nn.softmax(logits)[:, -1, :RELEVANT].sum(-1).mean(), state["gain"]

        start, state = jnp.zeros((PROMPTS, RANKS, ITEMS)), {"gain": jnp.zeros(())}
        loss = loss_of(advantage)
        return learn(loss, start, steps=STEPS, rate=RATE, seeds=seeds, state=state, observe=observe)[2]

    plain, own, later = run(by_list), run(by_rank("exp_inf")), run(by_rank("log_decay"))
    rows = []
    for step in (30, STEPS - 1):
        for name, k in (("relevant at the last rank", 0), ("discounted gain", 1)):
            rows.append(Row(f"{name}, step {step}", plain[k][:, step], own[k][:, step], ">"))
            rows.append(Row(f"{name}, step {step}, log_decay", plain[k][:, step], later[k][:, step], ">"))
    return rows
