"""Reg-GRPO with several steps on one batch, at step sizes where clipping bites."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.demonstrations import Row, bandit
from grpo_jax import advantages, losses
from grpo_jax.losses.regression import group_regression

CLAIM = "clipping leaves part of the samples without a gradient; the regression none, and it earns more reward"
PROMPTS, ANSWERS, GROUP, STEPS, PASSES = 16, 32, 8, 30, 4
RATES = (0.5, 1.0, 2.0, 4.0, 8.0)
EPSILON = 0.1
REWARDS = jax.random.uniform(jax.random.key(3), (PROMPTS, ANSWERS))


def grpo(rho, targets, ids):
    """A completion of one decision: the ratio is that of the sequence."""
    return losses.ppo_clip(losses.token_ratio(rho, jnp.zeros_like(rho)), targets).mean()


def reg_grpo(rho, targets, ids):
    """Scaled so that the first pass over a batch is that of GRPO: the same rate means the same."""
    return group_regression(rho, targets, ids, epsilon=EPSILON) * EPSILON / 2


def train(objective, seeds):
    """Expected reward at the end and the share of samples without a gradient in the last pass: [rates, seeds] each."""

    def loss(logits, state, key):
        ids, actions = bandit.draw(state["behavior"], GROUP, key)
        old = jax.lax.stop_gradient(bandit.logps(state["behavior"], ids, actions))
        targets = advantages.group_z_score(REWARDS[ids, actions], ids, epsilon=1e-4)
        rho = bandit.logps(logits, ids, actions) - old
        slopes = jax.grad(objective)(jax.lax.stop_gradient(rho), targets, ids)
        silent = jnp.mean((slopes == 0) & (targets != 0))
        return state["rate"] * objective(rho, targets, ids), {**state, "silent": state["silent"] + silent / STEPS}

    def run(rate):
        logits = jnp.zeros((PROMPTS, ANSWERS))
        state = {"behavior": logits, "silent": jnp.zeros(()), "rate": rate}
        last, state, _ = bandit.learn(loss, logits, steps=STEPS, rate=PROMPTS, seeds=seeds, state=state, passes=PASSES)
        return (jax.nn.softmax(last) * REWARDS).sum(-1).mean(-1), state["silent"]

    return map(np.asarray, jax.vmap(run)(jnp.array(RATES)))


def demonstrate(seeds: int) -> list[Row]:
    (plain, silent), (ours, quiet) = train(grpo, seeds), train(reg_grpo, seeds)
    rows = [Row(f"expected reward, rate {rate}", plain[i], ours[i], ">") for i, rate in enumerate(RATES)]
    best = plain[plain.mean(1).argmax()], ours[ours.mean(1).argmax()]
    rows.append(Row("expected reward, each at its best rate", *best, ">"))
    return rows + [Row(f"share without gradient, rate {rate}", *pair, "<") for rate, *pair in zip(RATES, silent, quiet)]
