"""A sampler whose logits are off by a third, and what importance weights make of it; enumerated, so without chance.

All 81 completions of four tokens, any rewards, advantages over the exact value: only the sampler is wrong.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.demonstrations import Row
from grpo_jax import advantages
from grpo_jax.losses.mismatch import banded, capped, sequence_importance, token_importance

CLAIM = "weights take bias from the gradient and add spread; caps and bands give some of the bias back for less spread"
LENGTH, WORDS = 4, 3
TEXTS = np.array(list(itertools.product(range(WORDS), repeat=LENGTH)))


def demonstrate(seeds: int) -> list[Row]:
    """Bias and spread of one completion's update, relative to the gradient, under the sampler's distribution."""

    def one(key):
        logits_key, noise_key, reward_key = jax.random.split(key, 3)
        logits = jax.random.normal(logits_key, (LENGTH, WORDS))
        sampler = jax.nn.log_softmax(logits + jax.random.normal(noise_key, logits.shape) / 3)
        rewards = jax.random.uniform(reward_key, len(TEXTS))
        of = lambda table: table[jnp.arange(LENGTH), TEXTS]  # noqa: E731
        trainer, drawn = of(jax.nn.log_softmax(logits)), of(sampler)
        mask, true = jnp.ones(TEXTS.shape, bool), jnp.exp(trainer.sum(1))
        a = advantages.per_decision(rewards - true @ rewards, mask)
        token, whole = token_importance(trainer, drawn), sequence_importance(trainer, drawn, mask)
        weights = {
            "none": jnp.ones_like(token),
            "token, uncapped": token,
            "token TIS, 2": capped(token, cap=2.0),
            "IcePop, 0.5 to 5": banded(token, low=0.5, high=5.0),
            "sequence, uncapped": whole,
            "sequence TIS, 2": capped(whole, cap=2.0),
            "sequence MIS, 3": banded(whole, low=0.0, high=3.0),
        }
        slope = jax.jacobian(lambda x: of(jax.nn.log_softmax(x)))(logits)  # [texts, T, T, V]
        exact = jnp.einsum("n,nt,nt...->...", true, a, slope)
        chance = jnp.exp(drawn.sum(1))

        def measured(weight):
            each = jnp.einsum("nt,nt...->n...", weight * a, slope)
            mean = jnp.einsum("n,n...->...", chance, each)
            spread = jnp.sqrt(chance @ ((each - mean) ** 2).sum((1, 2)))
            return jnp.linalg.norm(mean - exact) / jnp.linalg.norm(exact), spread / jnp.linalg.norm(exact)

        return {name: measured(weight) for name, weight in weights.items()}

    found = jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), seeds)))
    bias, spread = found.pop("none")
    return [
        row
        for name, (less, other) in found.items()
        for row in (
            Row(f"bias, {name}", bias, less, "<", "uncorrected"),
            Row(f"spread, {name}", spread, other, "", "uncorrected"),
        )
    ]
