"""The error of a baseline from four completions and a prior that is wrong by a known amount. No training."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.demonstrations import Row
from grpo_jax import segments
from grpo_jax.advantages.shrunk import another_is_worth_it, shrunk_mean

CLAIM = "the shrunk baseline is near the better of mean and prior everywhere; more draws only where they disagree"

TRIALS, FIRST, MOST, TRUE = 2000, 4, 16, 0.0
BIASES = (0.0, 0.25, 0.75, 1.0)
IDS = jnp.repeat(jnp.arange(TRIALS), MOST)


def errors(bias, key):
    """Squared errors of the mean, of the shrunk baseline from FIRST draws, of the sequential one; its draws."""
    rewards = jnp.where(jax.random.uniform(key, (TRIALS * MOST,)) < (1 + TRUE) / 2, 1.0, -1.0)
    priors = jnp.full(TRIALS * MOST, TRUE + bias)
    number = jnp.tile(jnp.arange(MOST), TRIALS)

    def so_far(drawn):
        return jnp.where(number < drawn, IDS, -1)

    def another(_, drawn):
        more = another_is_worth_it(rewards, priors, so_far(drawn))
        return drawn + segments.has(more, IDS)

    def squared(baseline):
        return jnp.mean((baseline[::MOST] - TRUE) ** 2)  # the first row of each group has always been drawn

    first = jnp.full(TRIALS * MOST, FIRST)
    drawn = jax.lax.fori_loop(0, MOST - FIRST, another, first)
    return (
        squared(segments.mean(rewards, so_far(first))),
        squared(shrunk_mean(rewards, priors, so_far(first))),
        squared(shrunk_mean(rewards, priors, so_far(drawn))),
        drawn.mean(),
    )


def demonstrate(seeds: int) -> list[Row]:
    rows = []
    for bias in BIASES:
        mean, shrunk, sequential, drawn = jax.jit(jax.vmap(errors, in_axes=(None, 0)))(
            bias, jax.random.split(jax.random.key(0), seeds)
        )
        prior = jnp.full(seeds, bias**2)
        label = f"prior off by {bias}: MSE"
        rows.append(Row(f"{label}, 4 draws", mean, shrunk, "<" if bias < 0.5 else "=", "mean of 4"))
        rows.append(Row(f"{label}, 4 draws", prior, shrunk, "<" if bias > 0.5 else "=", "prior"))
        rows.append(Row(f"{label}, 4 to 16 draws", shrunk, sequential, "<" if bias > 0.5 else "", "4 draws"))
        rows.append(Row(f"prior off by {bias}: draws", jnp.full(seeds, 4.0), drawn, ">" if bias > 0.5 else "=", "4"))
    return rows
