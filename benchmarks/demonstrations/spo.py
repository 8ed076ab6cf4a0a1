"""64 prompts of very different difficulty, 64 completions a step: 8 groups of 8, or one of each prompt."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.demonstrations import Row
from benchmarks.demonstrations.bandit import draw, learn, logps
from grpo_jax import advantages, losses
from grpo_jax.advantages.tracker import (
    RHO_MIN,
    Tracker,
    completion_drift,
    forgetting,
    single_stream,
    success_rate,
    tracker_init,
    tracker_update,
)

CLAIM = "nearly every completion of SPO carries signal, not so GRPO's; at equal cost SPO succeeds more often"

PROMPTS, ACTIONS, SIZE, STEPS, RATE, OFFLINE = 64, 16, 8, 300, 10.0, 8
ALL = jnp.arange(PROMPTS)
HERE = jnp.ones((PROMPTS, 1), bool)


def start():
    """Action 0 is right, with initial success rates from 0.01 to 0.9."""
    right = jnp.linspace(0.01, 0.9, PROMPTS)
    return jnp.full((PROMPTS, ACTIONS), 0.0).at[:, 0].set(jnp.log(right / (1 - right) * (ACTIONS - 1)))


def success(logits):
    return jax.nn.softmax(logits)[:, 0]


def surrogate(logits, prompts, actions, values):
    """PPO's clipped loss, at its first update."""
    now = logps(logits, prompts, actions)
    ratio = losses.token_ratio(now, jax.lax.stop_gradient(now))
    return losses.ppo_clip(ratio, values, low=0.2, high=0.28).mean()


def grpo_loss(logits, state, key):
    which, what = jax.random.split(key)
    asked = jax.random.choice(which, PROMPTS, (PROMPTS // SIZE,), replace=False)
    groups, actions = draw(logits[asked], SIZE, what)
    values = advantages.group_z_score((actions == 0).astype(jnp.float32), groups)
    return surrogate(logits, asked[groups], actions, values), {"signal": (values != 0).mean()}


def spo_loss(adaptive):
    def loss(logits, state, key):
        now = jax.lax.stop_gradient(logits)
        tracker, fixed = state["tracker"], jnp.full(PROMPTS, RHO_MIN)
        if adaptive:
            moved = completion_drift(state["stored"], logps(now, ALL, state["before"])[:, None], HERE)
            rho = forgetting(jnp.where(state["step"] > 1, moved, 0))
        taken = tracker_update(tracker, ALL, (state["last"] == 0).astype(jnp.float32), rho if adaptive else fixed)
        tracker = jax.tree.map(lambda new, old: jnp.where(state["step"] > 0, new, old), taken, tracker)
        _, actions = draw(logits, 1, key)
        values = single_stream((actions == 0).astype(jnp.float32), success_rate(tracker), ALL)
        after = {
            "tracker": tracker,
            "before": state["last"],
            "stored": logps(now, ALL, state["last"])[:, None],
            "last": actions,
            "step": state["step"] + 1,
            "signal": (values != 0).mean(),
        }
        return surrogate(logits, ALL, actions, values), after

    return loss


def begin():
    trials = jax.random.uniform(jax.random.key(3), (OFFLINE, PROMPTS)) < success(start())
    none, actions = jnp.zeros((PROMPTS, 1)), jnp.zeros(PROMPTS, jnp.int32)
    tracker = tracker_init(trials.sum(axis=0), jnp.full(PROMPTS, OFFLINE))
    return {"tracker": tracker, "before": actions, "stored": none, "last": actions, "step": 0, "signal": 0.0}


def error(logits, state):
    tracker: Tracker = state["tracker"]
    return jnp.abs(success_rate(tracker) - success(logits)).mean()


def demonstrate(seeds: int) -> list[Row]:
    settings = {"steps": STEPS, "rate": RATE, "seeds": seeds}
    watch = lambda logits, state: (success(logits).mean(), state["signal"])  # noqa: E731
    _, _, (plain, signal) = learn(grpo_loss, start(), state={"signal": 0.0}, observe=watch, **settings)
    both = lambda logits, state: (*watch(logits, state), error(logits, state))  # noqa: E731
    _, _, (mean, own, adaptive) = learn(spo_loss(True), start(), state=begin(), observe=both, **settings)
    _, _, (_, _, constant) = learn(spo_loss(False), start(), state=begin(), observe=both, **settings)
    rows = [Row("share of completions with a non-zero advantage", signal[:, 1:].mean(1), own[:, 1:].mean(1), ">")]
    for n in (30, 100, 300):
        rows.append(Row(f"mean success after {n * PROMPTS} completions", plain[:, n - 1], mean[:, n - 1], ">"))
    rows.append(Row("tracker's mean |v - p|", constant.mean(1), adaptive.mean(1), "<", baseline="constant rho"))
    return rows
