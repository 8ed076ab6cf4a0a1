"""A small recommendation task: "bd7=" names two topics and an item number that was seen; the answer is a list of items.

Items are a topic's letter and a digit, one per line ("b1\\nd4\\nb9"). Each topic has a few good digits, which a policy
has to learn. A rank hits if its item is good, of a topic that was asked for, not seen, and not in the list already.
"""

from __future__ import annotations

import numpy as np

from grpo_jax.types import Scored

TOPICS, RANKS = "abcdef", 4


def problems(*, held_out: int = 64, good: int = 4, seed: int = 0):
    """(train, held_out) rows: the prompt, and the relevant items separated by spaces."""
    draw = np.random.default_rng(seed)
    digits = {topic: sorted(draw.permutation(10)[:good].tolist()) for topic in TOPICS}
    rows = [
        {"prompt": f"{a}{b}{seen}=", "relevant": " ".join(f"{t}{d}" for t in (a, b) for d in digits[t] if d != seen)}
        for a in TOPICS
        for b in TOPICS
        for seen in range(10)
        if a != b
    ]
    rows = [rows[i] for i in draw.permutation(len(rows))]
    return rows[held_out:], rows[:held_out]


def demonstrations(problems, *, count: int, noise: float = 0.4, cut: float = 0.2, seed: int = 0):
    """`count` lists to start from: relevant items in random order, each replaced by any item of the catalogue with
    probability `noise`; a share `cut` is an item short or one too long."""
    draw, rows = np.random.default_rng(seed), []
    for place in draw.integers(len(problems), size=count).tolist():
        relevant = problems[place]["relevant"].split()
        length = RANKS + (draw.choice([-1, 1]) if draw.random() < cut else 0)
        items = [relevant[i] for i in draw.permutation(len(relevant))[:length]]
        items = [f"{draw.choice(list(TOPICS))}{draw.integers(10)}" if draw.random() < noise else i for i in items]
        rows.append({"prompt": problems[place]["prompt"], "completion": "\n".join(items)})
    return rows


def hits(prompts, completions, relevant, **columns):
    """Channels hits/0 ... hits/3: 1 where the rank hits."""
    return Scored({"hits": _hits(completions, relevant)})


def perfect(prompts, completions, relevant, **columns):
    """1 if every rank hits and nothing comes after."""
    table = _hits(completions, relevant)
    return [float(row.all() and c.count("\n") == RANKS - 1) for row, c in zip(table, completions)]


def _hits(completions, relevant) -> np.ndarray:
    table = np.zeros((len(completions), RANKS))
    for row, completion, wanted in zip(table, completions, relevant):
        left = set(wanted.split())
        for rank, item in enumerate(completion.split("\n")[:RANKS]):
            row[rank] = item in left
            left.discard(item)
    return table
