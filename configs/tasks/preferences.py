"""A judge of sums that compares two answers, and the reward that it makes: the share of comparisons won."""

from __future__ import annotations

import numpy as np

from grpo_jax.advantages.preferences import tournament, win_rates


def closer(answers, first, second, *, tie: int = 0):
    """1 where the first text is nearer to the right sum, 0 where the second is; 0.5 if no more than `tie` apart."""

    def distance(text: str, answer: str) -> int:
        return abs(int(text) - int(answer)) if text.isdecimal() and text.isascii() else 10**6

    gaps = np.array([distance(b, y) - distance(a, y) for y, a, b in zip(answers, first, second)])
    return np.where(np.abs(gaps) <= tie, 0.5, gaps > 0).tolist()


def win_rate(prompts, completions, prompt_id, answer, *, both_orders: bool = False, **columns):
    """The share of the other completions of its prompt that one beats; none for a single completion."""
    groups = np.unique(prompt_id, return_inverse=True)[1]
    verdicts = tournament(closer, answer, [c.strip() for c in completions], groups, both_orders=both_orders)
    rates = np.asarray(win_rates(verdicts, groups))
    return [None if np.isnan(rate) else float(rate) for rate in rates]
