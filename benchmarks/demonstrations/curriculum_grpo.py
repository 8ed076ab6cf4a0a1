"""Thinking of 0 to 12 tokens before an answer; a length reward whose budget shrinks from 12 to 4, or is 4 at once."""

from __future__ import annotations

from benchmarks.demonstrations import Row, scratch
from grpo_jax import segments
from grpo_jax.advantages.lengths import budget_at, triangular_length

CLAIM = "budgets of 12, 8, 5, 4 end at a higher accuracy than a budget of 4 from the start, at the same length"
STEPS = 300


def demonstrate(seeds: int) -> list[Row]:
    plain = scratch.learn(lambda right, lengths, groups, step: z(1.0 * right, groups), steps=STEPS, seeds=seeds)
    fixed, shrinking = (course(seeds, budgets) for budgets in ((4,), (12, 8, 5, 4)))
    end = lambda seen, metric: seen[metric][:, -1]  # noqa: E731
    return [
        Row("accuracy at the end", end(fixed, "accuracy"), end(shrinking, "accuracy"), ">", "always 4"),
        Row("length at the end", end(fixed, "length"), end(shrinking, "length"), "=", "always 4"),
        Row("accuracy at the end", end(plain, "accuracy"), end(shrinking, "accuracy"), ""),
        Row("length at the end", end(plain, "length"), end(shrinking, "length"), "<"),
    ]


def z(rewards, groups):
    return segments.z_score(rewards, groups, ddof=0, epsilon=1e-8, inside_root=True)


def course(seeds: int, budgets: tuple[int, ...], correct: float = 0.3, length: float = 0.6):
    def advantage(right, lengths, groups, step):
        budget = budget_at(step, budgets, interval=STEPS / len(budgets))
        return z(correct * right + length * triangular_length(lengths, budget), groups)

    return scratch.learn(advantage, steps=STEPS, seeds=seeds)
