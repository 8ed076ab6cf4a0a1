"""Heavy-tailed rewards in tiny groups: how often an advantage has the wrong sign, and what is learned from it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.demonstrations import Row
from benchmarks.demonstrations.bandit import draw, learn, logps
from grpo_jax import losses
from grpo_jax.advantages.group import group_z_score
from grpo_jax.advantages.median import median_centered

CLAIM = "the median flips fewer signs than the mean, most at G = 2, and learns more from groups of 2"

TRIALS, SIGMA = 2000, 1.0  # log-normal rewards: mean exp(sigma^2 / 2), median 1
PROMPTS, ACTIONS, GROUP, STEPS = 16, 8, 2, 300
RATES = jnp.array([0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0])


def flips(group_size, key):
    """Share of trained rows whose advantage has not the sign of reward - mean, or of reward - median, of the
    distribution: z-scores of groups of group_size and of group_size + 1, and around the median of the latter."""
    groups = jnp.repeat(jnp.arange(TRIALS), group_size + 1)
    rewards = jnp.exp(SIGMA * jax.random.normal(key, groups.shape))
    fewer = jnp.where(jnp.arange(len(groups)) % (group_size + 1) == 0, -1, groups)
    around, pivot = median_centered(rewards, groups)
    results = []
    for centre in (jnp.exp(SIGMA**2 / 2), 1.0):
        wrong = lambda a, centre=centre: jnp.sign(a) != jnp.sign(rewards - centre)  # noqa: E731
        results += [
            jnp.mean(wrong(group_z_score(rewards, fewer)), where=fewer >= 0),
            jnp.mean(wrong(group_z_score(rewards, groups))),
            jnp.mean(wrong(around), where=~pivot),
        ]
    return results


def loss(estimator):
    """Graded actions, 0 to 1, with heavy-tailed noise. "grpo" draws and trains G rows, the others train all but one of
    G + 1: "control" drops the smallest reward, "mad" and "std" the median under that scale."""

    def of(logits, state, key):
        drawing, noise = jax.random.split(key)
        groups, actions = draw(logits, GROUP + (estimator != "grpo"), drawing)
        rewards = actions / (ACTIONS - 1) + 0.3 * jnp.exp(SIGMA * jax.random.normal(noise, groups.shape))
        if estimator in ("mad", "std"):
            values, dropped = median_centered(rewards, groups, scale=estimator)
        else:
            values = group_z_score(rewards, groups)
            dropped = lowest(rewards, GROUP + 1) if estimator == "control" else jnp.zeros(len(groups), bool)
        lost = losses.reinforce(logps(logits, groups, actions), values)
        return jnp.sum(jnp.where(dropped, 0, lost)) / GROUP, state

    return of


def lowest(rewards, size):
    """The row with the smallest reward of each group: what the paper's control trains without."""
    return jax.nn.one_hot(jnp.abs(rewards).reshape(-1, size).argmin(axis=1), size, dtype=bool).reshape(-1)


def learned(estimator, seeds):
    """The policy's mean grade after training, at the rate of RATES at which it is highest."""
    start, grades = jnp.zeros((PROMPTS, ACTIONS)), jnp.arange(ACTIONS) / (ACTIONS - 1)
    end = jax.vmap(lambda rate: learn(loss(estimator), start, steps=STEPS, rate=rate, seeds=seeds)[0])(RATES)
    final = (jax.nn.softmax(end) @ grades).mean(axis=-1)
    return final[final.mean(axis=1).argmax()]


def demonstrate(seeds: int) -> list[Row]:
    rows = []
    for size in (2, 4, 8):
        of_mean = jax.jit(jax.vmap(lambda key, size=size: flips(size, key)))(jax.random.split(jax.random.key(0), seeds))
        for against, (equal_rows, equal_samples, median) in (("mean", of_mean[:3]), ("median", of_mean[3:])):
            label = f"wrong signs against the true {against}, G = {size}"
            rows.append(Row(label, equal_rows, median, "<", f"mean of {size}"))
            rows.append(Row(label, equal_samples, median, "<", f"mean of {size + 1}"))
    plain, control = learned("grpo", seeds), learned("control", seeds)
    for scale in ("mad", "std"):
        ours, label = learned(scale, seeds), f"grade after {STEPS} updates, G = {GROUP}, best rate, scale {scale}"
        rows.append(Row(label, plain, ours, ">", "grpo, equal rows"))
        rows.append(Row(label, control, ours, ">", "grpo, equal samples"))
    return rows
