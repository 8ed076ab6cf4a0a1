"""A first choice of two modes with different rewards, and a second one of quality within the mode."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.demonstrations import Row
from benchmarks.demonstrations.bandit import learn
from grpo_jax import losses
from grpo_jax.advantages.strata import stratified

CLAIM = "within strata the rare mode learns its inner choice better; a blend of both gives the highest total reward"

PROMPTS, GROUP, STEPS, RATE = 16, 8, 200, 0.2
# [mode, inner choice: bad, good]; mode 1 is rare, hard and noisy, and pays once its inner choice is learned
MEAN, NOISE = jnp.array([[0.5, 0.6], [0.2, 0.8]]), jnp.array([0.05, 0.4])
START = {"mode": jnp.log(jnp.array([0.85, 0.15])), "inner": jnp.zeros((2, 2))}
ALPHAS = (0.0, 0.5, 0.8, 1.0)


def sampled(params, prompts, key):
    """Groups, both choices and rewards of a batch, all prompts alike."""
    choosing, deciding, noise = jax.random.split(key, 3)
    params = jax.lax.stop_gradient(params)
    groups = jnp.repeat(jnp.arange(prompts), GROUP)
    mode = jax.random.categorical(choosing, params["mode"], shape=groups.shape)
    inner = jax.random.categorical(deciding, params["inner"][mode])
    return groups, mode, inner, MEAN[mode, inner] + NOISE[mode] * jax.random.normal(noise, groups.shape)


def at_the_start(alpha, key):
    """Variance of advantages, and how often they have the sign of the better inner choice."""
    groups, mode, inner, rewards = sampled(START, 1000, key)
    values = stratified(rewards, groups, mode, alpha=alpha)
    return values.var(), jnp.mean(jnp.sign(values) == 2 * inner - 1, where=values != 0)


def loss(alpha):
    def of(params, state, key):
        groups, mode, inner, rewards = sampled(params, PROMPTS, key)
        values = stratified(rewards, groups, mode, alpha=alpha)
        logps = jax.nn.log_softmax(params["mode"])[mode] + jax.nn.log_softmax(params["inner"])[mode, inner]
        return losses.reinforce(logps, values).mean(), state

    return of


def trained(alpha, seeds):
    """The inner accuracy of mode 1, the share of mode 1, and the expected reward after training."""
    params, _, _ = learn(loss(alpha), START, steps=STEPS, rate=RATE, seeds=seeds)
    mode, inner = jax.nn.softmax(params["mode"]), jax.nn.softmax(params["inner"])
    return inner[:, 1, 1], mode[:, 1], jnp.sum(mode[:, :, None] * inner * MEAN, axis=(1, 2))


def demonstrate(seeds: int) -> list[Row]:
    rows, keys = [], jax.random.split(jax.random.key(0), seeds)
    start, end = {}, {}
    for alpha in ALPHAS:
        start[alpha] = jax.jit(jax.vmap(lambda key, alpha=alpha: at_the_start(alpha, key)))(keys)
        end[alpha] = trained(alpha, seeds)
    (variance, agreement), (inner, rare, reward) = start[0.0], end[0.0]
    for alpha in ALPHAS[1:]:
        rows += [
            Row(f"variance of advantages, alpha {alpha}", variance, start[alpha][0], "<"),
            Row(f"agreement with the better inner choice, alpha {alpha}", agreement, start[alpha][1], ">"),
            Row(f"inner accuracy of the rare mode after training, alpha {alpha}", inner, end[alpha][0], ">"),
            Row(f"share of the rare mode after training, alpha {alpha}", rare, end[alpha][1]),
            Row(f"expected reward after training, alpha {alpha}", reward, end[alpha][2], ">" if alpha < 1 else ""),
        ]
    return rows + [Row("expected reward, alpha 0.8", end[1.0][2], end[0.8][2], ">", "alpha 1")]
