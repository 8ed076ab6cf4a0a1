"""Thinking of 0 to 12 tokens before an answer; paying for brevity nowhere, everywhere, or where answers are right."""

from __future__ import annotations

import jax.numpy as jnp

from benchmarks.demonstrations import Row, scratch
from grpo_jax import advantages
from grpo_jax.advantages.gates import top_groups
from grpo_jax.advantages.lengths import brevity

CLAIM = "shorter than plain GRPO at no loss of accuracy, which paying for brevity everywhere does lose"
STEPS = 300


def demonstrate(seeds: int) -> list[Row]:
    plain, everywhere, best = (course(seeds, fraction) for fraction in (0.0, 1.0, 0.2))
    return [
        Row("accuracy at the end", plain["accuracy"][:, -1], best["accuracy"][:, -1], "=", "grpo"),
        Row("accuracy at the end", everywhere["accuracy"][:, -1], best["accuracy"][:, -1], ">", "lambda = 1"),
        Row("mean accuracy", everywhere["accuracy"].mean(1), best["accuracy"].mean(1), ">", "lambda = 1"),
        Row("length at the end", plain["length"][:, -1], best["length"][:, -1], "<", "grpo"),
        Row("length at the end", everywhere["length"][:, -1], best["length"][:, -1], ">", "lambda = 1"),
    ]


def course(seeds: int, fraction: float):
    def advantage(right, lengths, groups, step):
        right = right.astype(jnp.float32)
        shorter = brevity(right, lengths, groups)
        return advantages.group_z_score(jnp.where(top_groups(right, groups, fraction=fraction), shorter, right), groups)

    return scratch.learn(advantage, steps=STEPS, seeds=seeds)
