"""Completions of six binary tokens, three objectives of which two conflict, and a reward model fitted to them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.demonstrations import Row, bandit
from grpo_jax import losses
from grpo_jax.advantages.channels import decoupled_over_rows
from grpo_jax.advantages.group import group_z_score
from grpo_jax.advantages.shaping import combine

CLAIM = "each weighting lands at its own point of the front, a single objective drives the others down"
BITS = np.array(list(np.ndindex(*[2] * 6)))  # all 64 completions
ONES = BITS.mean(axis=1)
OBJECTIVES = np.stack([np.sqrt(ONES), np.sqrt(1 - ONES), (np.diff(BITS) != 0).mean(axis=1)], axis=1)  # [64, 3]
WEIGHTS = [(1 / 3, 1 / 3, 1 / 3), (0.6, 0.2, 0.2), (0.2, 0.6, 0.2)]
STEPS, RATE, GROUPS, GROUP_SIZE = 300, 1.0, 4, 8


def reward_model(scales=(1.0, 1.0, 1.0), samples: int = 512, noise: float = 0.05):
    """Linear regression on tokens and their products, from noisy labels of random completions."""
    draw = np.random.default_rng(0)
    pairs = [BITS[:, i] * BITS[:, j] for i in range(6) for j in range(i)]
    features = np.column_stack([np.ones(64), BITS, *pairs])
    seen = draw.integers(64, size=samples)
    labels = OBJECTIVES[seen] + draw.normal(0, noise, (samples, 3))
    return jnp.float32(features @ np.linalg.lstsq(features[seen], labels, rcond=None)[0] * np.array(scales))


def learn(seeds: int, weights, scores, *, normalize_first: bool = False):
    """W runs side by side, with weights [W, 3] and scores [W, 64, 3]: expected objectives at the end, [S, W, 3]."""

    def one(logits, weights, scores, key):
        logits = jnp.tile(logits, (GROUPS, 1))
        groups, actions = bandit.draw(logits, GROUP_SIZE, key)
        if normalize_first:
            advantages = decoupled_over_rows(scores[actions], groups, weights)
        else:
            advantages = group_z_score(combine(scores[actions], weights), groups, epsilon=1e-4)
        return losses.reinforce(bandit.logps(logits, groups, actions), advantages).mean()

    def loss(logits, state, key):
        return jax.vmap(one)(logits, weights, scores, jax.random.split(key, len(weights))).sum(), state

    last, _, _ = bandit.learn(loss, jnp.zeros((len(weights), 64)), steps=STEPS, rate=RATE, seeds=seeds)
    return np.asarray(jax.nn.softmax(last)) @ OBJECTIVES


def demonstrate(seeds: int) -> list[Row]:
    fitted, uneven = reward_model(), reward_model(scales=(1.0, 0.1, 1.0))
    weights, scores = jnp.array([*WEIGHTS, (1, 0, 0), (0.5, 0.5, 0)]), jnp.stack([fitted] * 4 + [uneven])
    *points, alone, summed = learn(seeds, weights, scores).swapaxes(0, 1)
    (normalized,) = learn(seeds, weights[-1:], scores[-1:], normalize_first=True).swapaxes(0, 1)
    untrained, rows = np.full((seeds, 3), OBJECTIVES.mean(axis=0)), []
    for weights, point in zip(WEIGHTS, points):
        best, name = (OBJECTIVES @ weights).max(), " ".join(f"{w:.1f}" for w in weights)
        rows += [
            Row(f"short of the best, weights {name}", best - untrained @ weights, best - point @ weights, "<", "start"),
            Row(f"second objective, weights {name}", alone[:, 1], point[:, 1], ">", "first objective alone"),
        ]
    return [
        *rows,
        Row("second in tenths, weights 0.5 0.5 0", summed[:, 1], normalized[:, 1], ">", "sum, then normalise"),
    ]
